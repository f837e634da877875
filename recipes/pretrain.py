"""Pretraining: text, images and videos together; every task in every step, one network. mPLUG-2 section 3.3.

The shelf's modules come from `small()`. Number (handwriting, test split): not measured.
"""

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

# objective: its share of the size's batch, the weight of its loss
MIXTURE = {
    "image_caption": (1.0, 1.0),
    "image_answer": (1.0, 1.0),
    "image_contrast": (1.0, 0.5),
    "image_match": (0.5, 0.5),
    "image_unmask": (0.5, 0.25),
    "image_classify": (0.5, 0.5),
    "video_caption": (0.5, 1.0),
    "video_answer": (0.5, 1.0),
    "video_contrast": (0.5, 0.5),
    "text_classify": (0.5, 0.25),
    "text_complete": (0.5, 0.25),
}

EVALUATIONS = (
    "image_classify",
    "image_zero_shot",
    "image_caption",
    "image_answer",
    "image_retrieval",
    "video_caption",
    "video_answer",
    "video_answer_shuffled",
    "video_retrieval",
    "text_classify",
    "text_complete",
)


def recipe(size: Size) -> Recipe:
    return size.recipe(
        "pretrain",
        MODULES,
        {name: size.objective(name, share=share, weight=weight) for name, (share, weight) in MIXTURE.items()},
        EVALUATIONS,
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return replace(recipe(SMALL), steps=10_000)


def quick() -> Recipe:
    """A few minutes from scratch on two cores: what `make quickstart` trains."""
    return replace(recipe(replace(SMALL, batch=32)), name="pretrain.quick", steps=1000)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
