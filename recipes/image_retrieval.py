"""Image-text retrieval: contrast ranks a gallery; matching learns true pairs from near ones.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("vision", "text", "universal", "fusion", "contrastive", "matching")
OBJECTIVES = ("image_contrast", "image_match")
EVALUATIONS = ("image_retrieval", "image_zero_shot", "image_match")


def recipe(size: Size) -> Recipe:
    return size.recipe(
        "image_retrieval", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
