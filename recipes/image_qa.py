"""Image question answering: count, colour, kind, size, place, side, relation, sum.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("vision", "text", "universal", "fusion", "decoder")
OBJECTIVES = ("image_answer",)
EVALUATIONS = ("image_answer",)


def recipe(size: Size) -> Recipe:
    return size.recipe("image_qa", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS)


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
