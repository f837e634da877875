"""Text completion: a prefix language model (the answer to a question on a description) and masked words.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("text", "universal", "decoder", "unmasker")
OBJECTIVES = ("text_complete", "text_unmask")
EVALUATIONS = ("text_complete",)


def recipe(size: Size) -> Recipe:
    return size.recipe(
        "text_complete", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
