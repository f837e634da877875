"""Image captioning: the kind, colour and place of every digit of a picture.

Number (handwriting, test split): not measured.
"""

from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

MODULES = ("vision", "universal", "decoder")
OBJECTIVES = ("image_caption",)
EVALUATIONS = ("image_caption",)


def recipe(size: Size) -> Recipe:
    return size.recipe(
        "image_caption", MODULES, {name: size.objective(name) for name in OBJECTIVES}, EVALUATIONS
    )


def tiny() -> Recipe:
    return recipe(TINY)


def small() -> Recipe:
    return recipe(SMALL)


def base() -> Recipe:
    return recipe(BASE)


def large() -> Recipe:
    return recipe(LARGE)
