"""Text classification: does a statement follow from a description? Entailment, text alone.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("text", "universal", "text_classifier")
OBJECTIVES = ("text_classify",)
EVALUATIONS = ("text_classify",)


def recipe(size: Size) -> Recipe:
    return size.recipe(
        "text_classify", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
