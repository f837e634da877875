"""A delta learns a question that the shelf was never asked, and taken off it was never there. Slow: two short
trainings of the shelf's small modules."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import pytest

from mplug2 import adapt, anatomy, hub
from mplug2.data import scenes
from mplug2.data.grammar import NUMBERS
from mplug2.data.handwriting import Composed, Handwriting
from mplug2.generate import Greedy
from mplug2.inference import Compiled, Inference, answers
from mplug2.modules.forms import Lora
from mplug2.network import Network
from mplug2.recipe import AdamW, Objective, Recipe
from mplug2.recipes import image_qa
from mplug2.train import train

SIDES = {"at the top or at the bottom": ("top", "bottom"), "on the left or on the right": ("left", "right")}


@dataclass(frozen=True)
class Halves:
    """The question "is the three at the top or at the bottom": the shelf knows corners ("top left"), and
    never gave half of one for an answer. Two answers a question, equally likely."""

    seed: int = 0

    def source(self, split: str) -> "Drawn":
        return Drawn(self, split)


@dataclass(frozen=True)
class Drawn:
    data: Halves
    split: str

    def __len__(self) -> int:
        return 100_000 if self.split == "train" else 600

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Random(f"{self.data.seed}/{self.split}/{index}")
        scene = scenes.compose(rng, self.split, count=1)
        which, (first, second) = rng.choice(list(SIDES.items()))
        return {
            "index": index,
            "question": f"is the {NUMBERS[scene.digits[0].kind]} {which}",
            "answer": first if first in scene.where.split() else second,
            "clips": scenes.render(scene),
        }


@dataclass(frozen=True)
class OldQuestions:
    """What the shelf was asked, on glyphs that it never saw."""

    def source(self, split: str) -> Composed:
        return Composed(Handwriting("question"), split)


def accuracy(
    recipe: Recipe, network: Network, params: Any, data: Any, limit: int = 600
) -> tuple[float, list[str]]:
    compiled = Compiled(network, params, recipe.preprocessing)
    inference = Inference(compiled=compiled, recipe=recipe, tokenizer=recipe.tokenizer, limit=limit)
    writer = inference.writer(Greedy(length=4))
    examples, ids = inference.over(data, {"question": 16}, 100, answers, writer)
    said = inference.texts(ids)
    return float(np.mean([word == one["answer"] for word, one in zip(said, examples, strict=True)])), said


def recipe(steps: int, rate: float) -> Recipe:
    small = image_qa.small()
    return replace(
        hub.on_shelf(small),
        name="halves",
        objectives={
            "answer": Objective(
                task=small.objectives["image_answer"].task,
                data=Halves(),
                batch=48,
                lengths={"question": 16, "answer": 4},
            )
        },
        evaluations={},
        optimizer=AdamW(learning_rate=rate, warmup=10, beta2=0.98),
        learning_rates={},
        steps=steps,
        log_every=20,
        checkpoint_every=1000,
    )


def adapting(steps: int, rate: float, forms: dict[str, Lora]) -> Recipe:
    whole = recipe(steps, rate)
    modes: Any = dict.fromkeys(whole.modules, "frozen") | dict.fromkeys(forms, "lora")
    return replace(whole, modes=modes, deltas=forms)


@pytest.mark.slow
def test_lora_learns_a_new_question_as_well_as_full_training_does_and_old_ones_stay_when_it_is_off(tmp_path):
    """Measured once, 600 examples each, on two shared CPU cores: the shelf 0.04 of the new questions; all
    1,894,304 parameters 1.00 (after 28 steps); LoRA, 29,696 of them (1.57%), 1.00 after 100 steps. Old
    questions: 0.878 before, 0.47 and 0.65 after, 0.878 with the delta off."""
    whole = recipe(60, 1e-3)
    network, params, _ = hub.assemble(whole)
    old, said = accuracy(whole, network, params, OldQuestions())
    full = train(whole, tmp_path / "full")
    best, _ = accuracy(whole, network, full.params, Halves())
    little = adapting(100, 5e-3, {"fusion": Lora(rank=4), "text": Lora(rank=4)})
    lora = train(little, tmp_path / "lora")
    beside = Network(little.parts, little.execution)
    sizes = anatomy.parameters(beside)
    assert sum(sizes[name] for name in sizes if little.trains(name)) <= 0.02 * sum(
        sizes[name] for name in whole.modules
    )
    assert accuracy(little, beside, lora.params, Halves())[0] >= 0.95 * best > 0.9
    assert accuracy(little, *adapt.without(beside, lora.params), OldQuestions()) == (old, said)
