"""A delta learns colours that the shelf never saw or named, and taken off it was never there. Slow: two short
trainings of the shelf's small modules."""

from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from scored import scored

from mplug2 import adapt, anatomy, hub
from mplug2.data import scenes
from mplug2.data.grammar import NUMBERS
from mplug2.data.handwriting import Composed, Handwriting
from mplug2.modules.forms import Lora
from mplug2.network import Network
from mplug2.recipe import AdamW, Objective, Recipe
from mplug2.recipes import image_qa
from mplug2.train import train

# A colour's name -> the known colour, and the order of its channels that makes the new one.
HUES = {
    "orange": ("blue", (2, 1, 0)),
    "pink": ("yellow", (0, 2, 1)),
    "cyan": ("yellow", (2, 1, 0)),
    "violet": ("blue", (1, 0, 2)),
    "lime": ("blue", (1, 2, 0)),
    "mint": ("blue", (0, 2, 1)),
}


@dataclass(frozen=True)
class NewColours:
    """What colour a digit is, of six colours that the shelf never saw. None of their names is a word of its
    tokenizer: an answer is spelled, in five to seven pieces that it never wrote."""

    seed: int = 0

    def source(self, split: str) -> "Drawn":
        return Drawn(self, split)


@dataclass(frozen=True)
class Drawn:
    data: NewColours
    split: str

    def __len__(self) -> int:
        return 100_000 if self.split == "train" else 600

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Random(f"{self.data.seed}/{self.split}/{index}")
        name = rng.choice(list(HUES))
        colour, channels = HUES[name]
        scene = scenes.compose(rng, self.split, count=1)
        (digit,) = scene.digits
        scene = replace(scene, digits=(replace(digit, colour=colour),))
        return {
            "index": index,
            "question": f"what colour is the {NUMBERS[digit.kind]}",
            "answer": name,
            "clips": scenes.render(scene)[..., channels],
        }


@dataclass(frozen=True)
class OldQuestions:
    """What the shelf was asked, on glyphs that it never saw."""

    def source(self, split: str) -> Composed:
        return Composed(Handwriting("question"), split)


STEPS = 900
WORDS = ("*kernel", "embedding.words")
FORMS = {
    "decoder": Lora(rank=3, targets=WORDS),  # it writes pieces that it never wrote
    "fusion": Lora(rank=1),
    "universal": Lora(rank=1),
    "vision": Lora(rank=1),
}


def recipe(rate: float, forms: dict[str, Lora]) -> Recipe:
    """The shelf's modules, all of them trained, or frozen with deltas of these forms."""
    small = image_qa.small()
    whole = replace(
        hub.on_shelf(small),
        name="colours",
        objectives={
            "answer": Objective(
                task=small.objectives["image_answer"].task,
                data=NewColours(),
                batch=48,
                lengths={"question": 16, "answer": 10},
            )
        },
        evaluations={},
        optimizer=AdamW(learning_rate=rate, warmup=10, beta2=0.98),
        learning_rates={},
        steps=STEPS,
        log_every=20,
        checkpoint_every=10_000,
    )
    modes: Any = dict.fromkeys(whole.modules, "frozen") | dict.fromkeys(forms, "lora")
    return replace(whole, modes=modes, deltas=forms) if forms else whole


@pytest.mark.slow
def test_lora_learns_new_colours_nearly_as_well_as_full_training_does_and_old_questions_stay_when_it_is_off(
    tmp_path,
):
    """Measured on two shared CPU cores, 600 examples. All parameters: 1.000 after 300, 500 and 900 steps at a
    rate of 1e-3. LoRA, 34,464 of 1,894,304 parameters (1.82%), at 5e-3: 0.932 after 300 steps, 0.957 and
    0.942 after 500 (at two commits), 0.952 after 900."""
    whole = recipe(1e-3, {})
    network, params, _ = hub.assemble(whole)
    old, said = scored(whole, network, params, OldQuestions())
    assert scored(whole, network, params, NewColours())[0] == 0
    full = train(whole, tmp_path / "full")
    best, _ = scored(whole, network, full.params, NewColours())
    little = recipe(5e-3, FORMS)
    lora = train(little, tmp_path / "lora")
    beside = Network(little.parts, little.execution)
    sizes = anatomy.parameters(beside)
    trained = sum(sizes[name] for name in sizes if little.trains(name))
    share = trained / sum(sizes[name] for name in whole.modules)
    found, _ = scored(little, beside, lora.params, NewColours())
    print(f"full {best:.3f}, LoRA {found:.3f} with {trained} parameters ({share:.2%})")
    assert share <= 0.02 and found >= 0.95 * best > 0.9
    assert scored(little, *adapt.without(beside, lora.params), OldQuestions()) == (old, said)
