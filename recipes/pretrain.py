"""Pretraining: text, images and videos together; every task in every step, one network. mPLUG-2 section 3.3.

The shelf's modules come from `small()`; README.md has the whole table.
Number (handwriting, test split): `small()`, seed 0, 48 minutes on two CPU cores: image captions 96%
exact (95% interval 95 to 97), image questions 88% (86 to 90), digits 98% (97 to 99), zero-shot 98%
(97 to 98), video questions 94% (92 to 96), video captions 97% exact (96 to 98). `quick()`,
five minutes on the same: image captions 80% exact (76 to 84), image questions 67% (62 to 72), digits 94%
(92 to 97), each on the first 300 examples.
"""

from collections.abc import Mapping
from dataclasses import replace

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = (
    "vision",
    "temporal",
    "text",
    "universal",
    "fusion",
    "decoder",
    "contrastive",
    "matching",
    "vision_classifier",
    "text_classifier",
    "unmasker",
)

# objective: its share of the size's batch, the weight of its loss. Those of equal share on pictures see the
# same ones. The weights keep what is loud from drowning what is slow to learn, reading digits: a contrastive
# loss pulls at its features as strongly as its temperature is low, and a heavier classification loss delays
# captions tenfold.
MIXTURE = {
    "image_caption": (1.0, 1.0),
    "image_answer": (1.0, 0.25),
    "image_contrast": (1.0, 0.03),
    "image_classify": (1.0, 0.3),
    "image_match": (0.25, 0.05),
    "image_unmask": (0.25, 0.05),
    "video_caption": (0.25, 0.3),
    "video_answer": (0.25, 0.1),
    "video_contrast": (0.25, 0.01),
    "text_classify": (0.25, 0.1),
    "text_complete": (0.25, 0.1),
}


# What a few minutes are enough for: reading digits comes first.
QUICK = {
    name: its
    for name, its in MIXTURE.items()
    if name not in ("image_match", "image_unmask", "video_contrast")
} | {"image_answer": (1.0, 0.15), "image_contrast": (1.0, 0.01)}

EVALUATIONS = (
    "text_classify",
    "text_complete",
    "image_classify",
    "image_zero_shot",
    "image_caption",
    "image_answer",
    "image_retrieval",
    "image_match",
    "video_caption",
    "video_answer",
    "video_answer_shuffled",
    "video_retrieval",
)


def recipe(size: Size, mixture: Mapping[str, tuple[float, float]] = MIXTURE) -> Recipe:
    return size.recipe(
        "pretrain",
        MODULES,
        {name: size.objective(name, share=share, weight=weight) for name, (share, weight) in mixture.items()},
        # Whoever does not learn to match is not asked.
        tuple(name for name in EVALUATIONS if name != "image_match" or name in mixture),
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return replace(recipe(SMALL), steps=12_000)


def quick() -> Recipe:
    """A few minutes from scratch on two cores: what `make quickstart` trains."""
    return replace(recipe(replace(SMALL, batch=32), QUICK), name="pretrain.quick", steps=2300)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
