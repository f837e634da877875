"""Deltas as cards: they name their base by sha256, compose with no other, and are switched by request."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from adapted import OF, adapted, computed
from fresh import drawn, fresh
from toy import same

from mplug2 import adapt, hub, recipes
from mplug2.data.pixels import Preprocessing
from mplug2.data.tokens import SentencePiece
from mplug2.errors import CardError
from mplug2.hub import lock, publishing
from mplug2.hub.card import Parent, Parents, read_card
from mplug2.modules import decoder, vision
from mplug2.modules.forms import Lora
from mplug2.network import Network
from mplug2.predict import Predictor
from mplug2.recipe import Recipe
from mplug2.roles import Config
from mplug2.run import open_run
from mplug2.tools import evaluate
from mplug2.tools.main import main
from mplug2.tools.publish import main as publish

SCHEMA = json.loads((Path(__file__).parent.parent / "checkpoints" / "card.schema.json").read_text())
MODULES: dict[str, Config] = {
    "vision": vision.tiny(),
    "universal": OF,
    "decoder": dataclasses.replace(decoder.tiny(), vocabulary=SentencePiece().size),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Three modules, and a delta of `universal`."""
    folder = tmp_path_factory.mktemp("cards")
    cards = {
        module: publishing.publish(folder / "base", f"{module}-a", module, config, fresh(MODULES)[module])
        for module, config in MODULES.items()
    }
    publishing.publish(
        folder / "delta",
        "universal_delta-a",
        "universal_delta",
        Lora().delta(OF),
        adapted()[1]["universal_delta"],
        base=cards["universal"].file.sha256,
    )
    return folder


def test_a_deltas_card_comes_back_names_its_base_and_fits_the_schema(published):
    card = hub.find(published / "delta")
    assert card == read_card(published / "delta" / "universal_delta-a.json")
    assert card.base == hub.find(published / "base", "universal").file.sha256
    jsonschema.validate(json.loads((published / "delta" / "universal_delta-a.json").read_text()), SCHEMA)
    config, params = hub.load(card)
    assert config == Lora().delta(OF)
    same(params, adapted()[1]["universal_delta"])
    assert card.file.bytes < hub.find(published / "base", "universal").file.bytes / 2
    for change, said in (
        ({"base": None}, "base: is None, expected the sha256 of the universal"),
        ({"base": "0"}, "base: is '0', expected 64 hexadecimal digits"),
        ({"module": "universal"}, "base: is .*, expected nothing, universal is no delta"),
    ):
        with pytest.raises(CardError, match=said):
            dataclasses.replace(card, **change)


def test_base_and_delta_cards_compose_and_another_base_is_refused_with_both_sides(published, tmp_path):
    network, params = hub.compose(published / "base", published / "delta")
    assert list(network.configs) == [*sorted(MODULES), "universal_delta"]
    mine, own = adapted()
    np.testing.assert_array_equal(computed(network, params), computed(mine, own))
    other = publishing.publish(tmp_path, "universal-b", "universal", OF, fresh(MODULES, seed=1)["universal"])
    delta = hub.find(published / "delta")
    with pytest.raises(
        CardError, match=f"delta of the universal of sha256 {delta.base}, .*{other.file.sha256}"
    ):
        hub.compose(other, delta)
    with pytest.raises(CardError, match="no card of universal is given"):
        hub.compose(published / "base" / "vision-a.json", delta)
    with pytest.raises(CardError, match="no card of universal is given"):
        hub.deltas({}, delta)


def lora_recipe(folder: Path, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "modules": MODULES,
        "objectives": {},
        "modes": dict.fromkeys(MODULES, "frozen") | {"universal": "lora"},
        "deltas": {"universal": Lora()},
        "cards": dict.fromkeys(MODULES, str(folder / "base")),
    }
    return Recipe(name="test", **fields | changes)


def test_a_recipe_begins_a_delta_or_goes_on_from_a_published_one(published, tmp_path):
    recipe = lora_recipe(published)
    network, params, report = hub.assemble(recipe)
    assert list(params) == [*MODULES, "universal_delta"]
    lines = {line.module: line for line in report.lines}
    assert (
        lines["universal"].mode == "lora"
        and lines["universal"].loaded
        and not lines["universal_delta"].loaded
    )
    assert lines["universal_delta"].initialised
    np.testing.assert_array_equal(computed(network, params), computed(*adapt.without(network, params)))
    goes_on = lora_recipe(
        published,
        modes=dict(recipe.modes) | {"universal_delta": "full"},
        cards=dict(recipe.cards) | {"universal_delta": str(published / "delta")},
    )
    _, params, _ = hub.assemble(goes_on)
    same(params["universal_delta"], adapted()[1]["universal_delta"])
    assert goes_on.trains("universal_delta") and not goes_on.trains("universal")
    locked = lock.of(goes_on)
    locked.write(tmp_path / "lock.json")
    same(lock.compose(lock.read(tmp_path / "lock.json"))[1], params)
    publishing.publish(tmp_path, "universal-b", "universal", OF, fresh(MODULES, seed=1)["universal"])
    wrong = dataclasses.replace(
        goes_on, cards=dict(goes_on.cards) | {"universal": str(tmp_path / "universal-b.json")}
    )
    with pytest.raises(CardError, match="is a delta of the universal of sha256"):
        hub.assemble(wrong)


def test_requests_choose_their_delta_and_nothing_is_compiled_again(published, monkeypatch):
    traced, bind = [], Network.bind
    monkeypatch.setattr(Network, "bind", lambda *given: (traced.append(given[0]), bind(*given))[1])
    clips = np.random.default_rng(1).integers(0, 256, (2, 1, 32, 32, 3), np.uint8)
    cards = hub.cards(published / "base")
    bare = Predictor(*hub.compose(*cards.values()), SentencePiece(), Preprocessing())
    bare.cards = cards
    before = bare.caption(clips)
    mine = bare.adapted(published / "delta")
    found = mine.caption(clips)
    assert len(mine._compiled) == 1 and traced.count(bare.network) == 1
    both = Predictor(*hub.compose(*cards.values(), published / "delta"), SentencePiece(), Preprocessing())
    assert found == both.caption(clips)
    assert bare.caption(clips) == before == mine.adapted().caption(clips)
    same(bare.params, mine.adapted().params)
    delta = hub.find(published / "delta")
    with pytest.raises(CardError, match=f"delta of the universal of sha256 {'0' * 64}, card universal-a has"):
        bare.adapted(dataclasses.replace(delta, base="0" * 64))


def test_eval_scores_cards_adapted_by_a_deltas_card_of_their_base_only(published, tmp_path, capsys):
    base, delta = str(published / "base"), str(published / "delta")
    recipe, network, params, _ = evaluate.opened([delta, base], ["evaluations.image_caption.batch=2"])
    assert list(recipe.modules) == sorted(MODULES) and "image_caption" in recipe.evaluations
    assert network.configs["universal_delta"] == Lora().delta(OF)
    same(params["universal_delta"], adapted()[1]["universal_delta"])
    publishing.publish(tmp_path, "universal-b", "universal", OF, drawn({"universal": OF})["universal"])
    for words, said in (
        ([str(tmp_path), delta], "is a delta of the universal of sha256"),
        ([delta], "no card of universal is given"),
        (["vision-small", delta], "no card of universal is given"),
        (["image_caption.tiny", delta], "image_caption.tiny is a recipe"),
    ):
        assert main(["eval", *words, "--limit", "2"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_the_base_of_a_deltas_card_cannot_be_compared_where_there_are_no_cards(published):
    network, params = hub.compose(published / "base")
    bare = Predictor(network, params, SentencePiece(), Preprocessing())
    with pytest.raises(CardError, match="this predictor is not made of cards, .*deltas="):
        bare.adapted(published / "delta")


def test_what_a_run_learned_is_published_as_a_delta_or_merged(published, tmp_path, monkeypatch):
    recipe = lora_recipe(published)
    monkeypatch.setattr(recipes, "find", lambda name: recipe)
    own = {"universal_delta": adapted()[1]["universal_delta"]}
    monkeypatch.setattr(
        "mplug2.trained.restore_modules", lambda path, names, **_: (7, {name: own[name] for name in names})
    )
    open_run(tmp_path / "run", recipe)
    lock.of(recipe).write(tmp_path / "run" / lock.FILE)
    words = [str(tmp_path / "run"), "--dtype", "float32", "--family", "mine"]
    publish([*words, "--module", "universal_delta", "--to", str(tmp_path / "delta")])
    network, params = hub.compose(published / "base", tmp_path / "delta")
    same(params["universal_delta"], own["universal_delta"])
    assert "and no other" in (tmp_path / "delta" / "README.md").read_text()
    publish([*words, "--merged", "--module", "universal", "--to", str(tmp_path / "merged")])
    config, merged = hub.load(hub.find(tmp_path / "merged"))
    assert config == OF
    base, come = hub.find(published / "base", "universal"), hub.find(tmp_path / "merged").parents
    assert come == Parents(
        method="lora",
        base=Parent(name=base.name, sha256=base.file.sha256),
        settings={"rank": 4.0, "alpha": 8.0, "dropout": 0.0},
    )
    same(merged, adapt.merge(network, params)[1]["universal"])
