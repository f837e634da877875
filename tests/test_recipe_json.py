"""A recipe of the zoo is JSON and back, whole; what a stranger writes there runs nothing and is refused by
its field."""

import json

import pytest
from toy import toy

from mplug2 import recipes
from mplug2.errors import RecipeError
from mplug2.overrides import apply
from mplug2.recipe_json import NotOursError, decode, encode
from mplug2.settings import settings


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_of_the_zoo_is_written_and_read_back(name):
    for make in recipes.sizes(name).values():
        recipe = make()
        again = decode(json.loads(json.dumps(encode(recipe), allow_nan=False)))
        assert again == recipe and settings(again, operation=True) == settings(recipe, operation=True)


def test_what_only_its_own_code_can_make_is_not_written():
    with pytest.raises(NotOursError, match="toy:Layer is not the zoo's"):
        encode(toy())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told["objectives"]["a"].update(task={"function": "os:system"}), "'os:system' is not"),
        (
            lambda told: told["objectives"]["a"].update(task={"function": "mplug2.tools.main:main"}),
            "objectives.a.task: 'mplug2.tools.main:main' is not a function of mplug2.metrics, mplug2.tasks",
        ),
        (lambda told: told.update(mesh={"type": "mplug2.train:Outcome"}), "mesh: .*is not a dataclass of"),
        (lambda told: told.update(mesh={"type": "mplug2.data.augment:gone"}), "this version .* no dataclass"),
        (lambda told: told["optimizer"].update(rate=1), "optimizer.rate: AdamW has no such field"),
        (lambda told: told.update(steps="ten"), "steps is 'ten', expected a whole number"),
        (lambda told: told.update(objectives={"pairs": [1]}), "objectives.pairs: expected pairs"),
        (lambda told: told.update(objectives={"pairs": [[{}, 1]]}), "objectives.pairs: unhashable"),
        (lambda told: told.clear(), "expected a Recipe, got a dict"),
    ],
)
def test_a_strangers_recipe_is_refused_with_its_field(change, said):
    recipe = recipes.find("image_classify.tiny")
    told = json.loads(json.dumps(encode(recipe)))
    told["objectives"]["a"] = told["objectives"].pop("image_classify")
    change(told)
    with pytest.raises(RecipeError, match=said):
        decode(told)


def test_a_mixture_is_written_too():
    from dataclasses import replace

    from mplug2.data.handwriting import Handwriting
    from mplug2.data.stream import Mixture

    recipe = apply(recipes.find("image_classify.tiny"), ["steps=3"])
    (name,) = recipe.objectives
    mixed = Mixture({Handwriting("digit"): 3, Handwriting("digit", seed=1): 1.5})
    recipe = replace(recipe, objectives={name: replace(recipe.objectives[name], data=mixed)})
    assert decode(json.loads(json.dumps(encode(recipe)))) == recipe
