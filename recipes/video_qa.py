"""Video question answering: motion, order, event, count, colour, kind.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("vision", "temporal", "text", "universal", "fusion", "decoder")
OBJECTIVES = ("video_answer",)
EVALUATIONS = ("video_answer", "video_answer_shuffled")


def recipe(size: Size) -> Recipe:
    return size.recipe("video_qa", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS)


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
