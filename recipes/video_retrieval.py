"""Video-text retrieval: contrast ranks a gallery; matching learns true pairs from near ones.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("vision", "temporal", "text", "universal", "fusion", "contrastive", "matching")
OBJECTIVES = ("video_contrast", "video_match")
EVALUATIONS = ("video_retrieval", "video_match")


def recipe(size: Size) -> Recipe:
    return size.recipe(
        "video_retrieval", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
