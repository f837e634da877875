"""Video classification: the digit that moves through a video.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("vision", "temporal", "universal", "vision_classifier")
OBJECTIVES = ("video_classify",)
EVALUATIONS = ("video_classify",)


def recipe(size: Size) -> Recipe:
    return size.recipe(
        "video_classify", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
