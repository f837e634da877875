"""Modules of two runs that never met understand each other through a connector. Slow: a training from scratch
and one of the connector."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from scored import scored

from mplug2 import hub, tasks
from mplug2.data import grammar, scenes
from mplug2.hub import publishing
from mplug2.modules import connector
from mplug2.network import Network
from mplug2.recipe import AdamW, Objective, Recipe
from mplug2.recipes import image_caption
from mplug2.recipes.world import SMALL
from mplug2.train import train


@dataclass(frozen=True)
class Corners:
    """One digit: its kind, colour and corner in words."""

    def source(self, split: str) -> "Drawn":
        return Drawn(split)


@dataclass(frozen=True)
class Drawn:
    split: str

    def __len__(self) -> int:
        return 1_000_000 if self.split == "train" else 600

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = scenes.compose(Random(f"{self.split}/{index}"), self.split, count=1)
        said = {"caption": grammar.caption(scene), "label": scene.digits[0].kind}
        return {"index": index, "clips": scenes.render(scene), **said}


CAPTION = Objective(task=tasks.caption, data=Corners(), batch=48, lengths={"caption": 16})
LABEL = Objective(task=tasks.classify_vision, data=Corners(), batch=48, lengths={}, weight=0.3)


def recipe(steps: int, rate: float, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "corners",
        "objectives": {"caption": CAPTION},
        "evaluations": {},
        "steps": steps,
        "optimizer": AdamW(learning_rate=rate, warmup=50, beta2=0.98),
        "log_every": 50,
        "checkpoint_every": 10_000,
    }
    return replace(image_caption.small(), **fields | changes)


@pytest.mark.slow
def test_the_shelfs_vision_serves_another_runs_language_side_through_a_connector(tmp_path):
    """Measured once on two shared CPU cores, exact captions of 600 pictures: the other run, with its own
    vision, 0.887 after 600 steps; its language side with the shelf's vision 0.005, and 0.990 after 300 steps
    of a connector alone: the shelf's vision sees better than the one that it stands in for."""
    modules = image_caption.small().modules
    other = recipe(
        600,
        1e-3,
        seed=5,
        modules={**modules, "vision_classifier": SMALL.modules["vision_classifier"]},
        objectives={"caption": CAPTION, "label": LABEL},  # digits are read earlier when they are named alone
    )
    run = train(other, tmp_path / "other")
    network = Network(other.parts, other.execution)
    full, _ = scored(other, network, run.params, Corners(), "caption")
    place = tmp_path / "cards"
    for module in ("universal", "decoder"):
        publishing.publish(place, f"{module}-other", module, modules[module], run.params[module])
    cards = {"vision": "vision-small", "universal": str(place), "decoder": str(place)}
    joined = recipe(
        300,
        3e-3,
        modules={**modules, "connector": connector.Config(inputs=128, width=128, dropout=0.0)},
        modes={**dict.fromkeys(cards, "frozen"), "connector": "init"},
        cards=cards,
        learning_rates={},
    )
    network, params, _ = hub.assemble(joined)
    before, _ = scored(joined, network, params, Corners(), "caption")
    after, _ = scored(joined, network, train(joined, tmp_path / "run").params, Corners(), "caption")
    print(f"the other run {full:.3f}; with the shelf's vision {before:.3f}, connected {after:.3f}")
    assert before < 0.2 * full and after >= 0.95 * full > 0.8
