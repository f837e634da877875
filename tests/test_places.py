"""A place is where something lies: spelt in any way it is the same, and it decides nothing."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug2 import places, recipes
from mplug2.data.annotations import CaptionLines
from mplug2.data.stream import Mixture
from mplug2.data.tokens import SentencePiece
from mplug2.data.videos import Videos
from mplug2.errors import RecipeError
from mplug2.overrides import apply
from mplug2.recipe import Objective, Recipe
from mplug2.settings import differences, fingerprint, settings

ROOT = "objectives.video_caption.data.root"


def at(root: str) -> Recipe:
    return apply(recipes.find("msvd_caption.tiny"), [f"{ROOT}={root}", "cards.vision=vision-small"])


@pytest.fixture
def ds(tmp_path, monkeypatch):
    (tmp_path / "ds").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ds")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "ds"


@pytest.mark.parametrize("spelt", ["ds", "./ds", "ds/", "ds/../ds", "~/ds", "link", "{here}/ds"])
def test_a_place_spelt_otherwise_is_the_same_recipe_with_the_same_folder(spelt, ds):
    recipe, other = at("ds"), at(spelt.format(here=ds.parent))
    assert fingerprint(recipe) == fingerprint(other)
    assert differences(settings(recipe), other) == []
    assert Path(places.found(other)[ROOT]).resolve() == ds
    assert Path(places.found(other)[ROOT]).is_absolute()


def test_another_place_is_the_same_recipe_and_another_folder(ds):
    (ds.parent / "moved").mkdir()
    assert fingerprint(at("ds")) != fingerprint(at("moved"))
    assert differences(settings(at("ds")), at("moved")) == []


def test_home_is_where_a_shell_has_it_and_other_places_stay_as_they_are_spelt(ds):
    (objective,) = places.at_home(apply(at("~/ds"), ["tokenizer.model=sub/x.model"])).objectives.values()
    assert objective.data.root == str(ds)
    assert places.at_home(at("ds")) == at("ds")


def test_cards_by_a_relative_path_are_places_and_those_of_the_shelf_are_names(ds):
    recipe = apply(at("ds"), ["cards.universal=sub/universal.json"])
    assert places.fixed(recipe).cards == {
        "vision": "vision-small",
        "universal": str(ds.parent / "sub" / "universal.json"),
    }


def test_names_of_what_is_shipped_are_no_places(ds):
    (ds.parent / "vision-small").mkdir()
    assert set(places.found(at("ds"))) == {ROOT, ROOT.replace("objectives", "evaluations")}
    tokenizer = places.found(dataclasses.replace(at("ds"), tokenizer=SentencePiece("sub/other.model")))
    assert tokenizer["tokenizer.model"] == str(ds.parent / "sub" / "other.model")


def test_places_are_put_back_from_another_folder(ds, tmp_path, monkeypatch):
    recipe, there = at("ds"), tmp_path / "elsewhere"
    kept = places.found(recipe)
    there.mkdir()
    monkeypatch.chdir(there)
    put = places.put(at("ds"), kept)
    assert put.objectives["video_caption"].data.root == str(ds)
    assert places.nameless(put).objectives["video_caption"].data.root == "ds"


@dataclasses.dataclass(frozen=True)
class Own:
    folder: Path
    labels_path: str = "ds"
    view: str = "ds"  # a word that happens to be the name of a folder


def test_places_of_a_users_own_class_are_known_by_type_and_by_name(ds):
    found = places.found({"data": Own(Path("ds"))})
    assert found == {"data.folder": str(ds), "data.labels_path": str(ds)}
    put = places.put({"data": Own(Path("ds"))}, found)["data"]
    assert put == Own(ds, str(ds), "ds")


def test_places_within_a_mixture_are_found_and_decide_nothing(ds):
    def mixed(root: str) -> Recipe:
        data = Mixture({Videos(root=root, annotations=CaptionLines()): 2.0})
        one = recipes.find("msvd_caption.tiny").objectives["video_caption"]
        objectives = {"a": dataclasses.replace(one, data=data)}
        return dataclasses.replace(at("ds"), objectives=objectives, evaluations={})

    assert places.found(mixed("ds"))["objectives.a.data.parts.0.root"] == str(ds)
    assert places.fixed(mixed("ds")) == mixed(str(ds))
    assert differences(settings(mixed("ds")), mixed("link")) == []


@dataclasses.dataclass(frozen=True)
class Table:
    rows: np.ndarray


def test_an_array_in_a_data_object_decides_by_its_content():
    recipe = recipes.find("image_classify.tiny")
    task = recipe.objectives["image_classify"].task

    def holding(*tables: list[int]) -> Recipe:
        objectives = {
            f"o{i}": Objective(task=task, data=Table(np.array(rows)), batch=2)
            for i, rows in enumerate(tables)
        }
        return dataclasses.replace(recipe, objectives=objectives)

    assert fingerprint(holding([1, 2])) == fingerprint(holding([1, 2])) != fingerprint(holding([1, 3]))
    assert differences(settings(holding([1, 2])), holding([1, 3])) == ["objectives.o0.data.rows"]
    assert len(holding([1, 2], [1, 2]).feeds) == 2  # arrays have no one answer to ==


def test_what_would_fill_pages_is_told_by_its_hash():
    recipe, told = recipes.find("image_classify.tiny"), []
    (name,) = recipe.objectives
    long: tuple[Any, ...] = (list(range(5000)), dict.fromkeys(range(5000)), "x" * 5000, set(range(5000)))
    for value in long:
        holding = dataclasses.replace(recipe.objectives[name], data=Own(Path("ds"), view=value))
        told.append(settings(dataclasses.replace(recipe, objectives={name: holding})))
    assert all(len(str(one)) < 10_000 for one in told)


def test_an_object_that_holds_itself_is_refused():
    recipe, loop = recipes.find("image_classify.tiny"), Table(np.zeros(1))
    object.__setattr__(loop, "rows", loop)
    objective = Objective(task=recipe.objectives["image_classify"].task, data=loop, batch=2)
    with pytest.raises(RecipeError, match="image_classify.tiny holds an object that holds itself"):
        settings(dataclasses.replace(recipe, objectives={"a": objective}))


def test_a_field_that_an_older_version_did_not_know_has_its_default():
    recipe = recipes.find("image_classify.tiny")
    before = {name: value for name, value in settings(recipe).items() if name != "optimizer.beta2"}
    assert differences(before, recipe) == []
    assert differences(before, apply(recipe, ["optimizer.beta2=0.9"])) == ["optimizer.beta2"]
