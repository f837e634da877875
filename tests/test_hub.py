"""The hub: what is published is found, verified and loaded whole; every array of a network is accounted
for."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from fresh import drawn

from mplug2 import hub, recipes
from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError
from mplug2.hub import publishing, weights
from mplug2.hub.card import Tokens, read_card
from mplug2.modules import connector, decoder, heads, temporal, vision
from mplug2.network import Network, flat
from mplug2.recipe import Recipe
from mplug2.tools.publish import data_sha256

MODULES = {
    "vision": vision.tiny(),
    "decoder": decoder.tiny(),
    "contrastive": heads.ContrastiveConfig(width=32, space=16),
}


@pytest.fixture(scope="module")
def params():
    return drawn(MODULES)


@pytest.fixture
def published(params, tmp_path):
    """A folder with the cards `vision-a`, `decoder-a` and `contrastive-a`."""
    for module, config in MODULES.items():
        publishing.publish(tmp_path, f"{module}-a", module, config, params[module])
    return tmp_path


def recipe(folder: Path, modes: dict, **more) -> Recipe:
    loaded = [module for module, mode in modes.items() if mode != "init"]
    fields = {"modules": MODULES, "objectives": {}, "modes": modes, "cards": {m: str(folder) for m in loaded}}
    return Recipe(name="test", **fields | more)


def same(one, other) -> None:
    one, other = flat(one), flat(other)
    assert set(one) == set(other)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
        assert array.dtype == other[name].dtype == np.float32


# --- the shelf


def test_every_card_of_the_shelf_is_found_and_loads():
    for name in hub.shelf():
        card = hub.find(name)
        assert card.name == name
        assert flat(hub.load(card)[1])


def test_the_schema_is_no_card():
    assert not [name for name in hub.shelf() if "schema" in name]


def test_every_card_of_the_shelf_states_the_data_that_it_learned_from():
    said = {card.trained and card.trained.data_sha256 for card in map(hub.find, hub.shelf())}
    assert len(said) == 1 and None not in said  # one recipe trained them all


@pytest.mark.slow
def test_the_data_that_the_shelf_learned_from_is_still_the_same():
    trained = hub.find("vision-small").trained
    assert trained and trained.data_sha256 == data_sha256(recipes.find(trained.recipe))


def test_the_shelf_is_the_packages_own_wherever_one_stands(tmp_path):
    code = "from mplug2 import hub; print(hub.shelf())"
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.stdout == f"{hub.shelf()}\n", done.stderr


def test_the_shelf_is_what_the_package_carries(published, monkeypatch):
    monkeypatch.setattr(hub.resources, "files", lambda package: published)
    assert hub.shelf() == ["contrastive-a", "decoder-a", "vision-a"]
    assert hub.find("vision-a").module == "vision"
    assert set(hub.cards("a")) == set(MODULES)
    with pytest.raises(CardError, match='no card "visoin-a": the shelf holds .*did you mean "vision-a"'):
        hub.find("visoin-a")


# --- find


def test_a_card_is_found_by_path_and_in_a_directory(published):
    card = hub.find(published / "vision-a.json")
    assert card == hub.find(published, "vision") and card.folder == published
    assert set(hub.cards(published)) == set(MODULES)


def test_what_is_not_there_is_refused_with_what_is(published, tmp_path_factory):
    with pytest.raises(
        CardError, match="expected one card of 'text', it holds .'contrastive-a', 'decoder-a', 'vision-a'."
    ):
        hub.find(published, "text")
    with pytest.raises(CardError, match="expected one card, it holds"):
        hub.find(published)
    with pytest.raises(CardError, match="no card .*none.json: there is no such file"):
        hub.find(published / "none.json")
    with pytest.raises(CardError, match="this directory holds no card"):
        hub.cards(tmp_path_factory.mktemp("empty"))


def test_two_cards_of_one_module_are_refused_by_name(published, params):
    publishing.publish(published, "vision-b", "vision", vision.tiny(), params["vision"])
    with pytest.raises(CardError, match="two cards of module 'vision': vision-a and vision-b"):
        hub.cards(published)
    with pytest.raises(CardError, match="two cards of module 'vision'"):
        hub.compose(published / "vision-a.json", published / "vision-b.json")


# --- publish and load


def test_what_is_published_is_what_is_loaded(published, params):
    for module, config in MODULES.items():
        found, loaded = hub.load(hub.find(published, module))
        assert found == config
        same(loaded, params[module])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_come_back_as_float32_and_rounded_once(dtype, params, tmp_path):
    card = publishing.publish(tmp_path, "v", "vision", vision.tiny(), params["vision"], dtype=dtype)
    assert card.interface.dtype == dtype
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    same(
        hub.load(card)[1], jax.tree.map(lambda array: array.astype(kind).astype(np.float32), params["vision"])
    )


def test_publishing_states_the_facts(params, tmp_path):
    tokens = Tokens(file="x.model", sha256="c" * 64, ids={"pad": 0})
    facts = {
        "licence": "MIT",
        "paper": "arXiv:2302.00402",
        "preprocessing": Preprocessing(),
        "tokenizer": tokens,
    }
    card = publishing.publish(tmp_path, "d", "decoder", decoder.tiny(), params["decoder"], **facts)
    assert card == read_card(tmp_path / "d.json")
    assert (card.interface.reads, card.interface.vocabulary) == (("ids", "vision", "text"), 128)
    assert card.file.bytes == card.weights.stat().st_size
    assert {name: getattr(card, name) for name in facts} == facts


def test_parameters_that_are_not_the_configs_are_not_published(params, tmp_path):
    with pytest.raises(
        CardError, match="card v: the config has .* arrays.*only in the config.*only in the file"
    ):
        publishing.publish(tmp_path, "v", "vision", vision.tiny(), params["decoder"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e6, "float16")])
def test_numbers_that_are_not_finite_are_not_published(value, dtype, params, tmp_path):
    broken = {**params["vision"], "class_token": np.full(32, value, np.float32)}
    with pytest.raises(CardError, match=f"not finite as {dtype}: class_token"):
        publishing.publish(tmp_path, "v", "vision", vision.tiny(), broken, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype_is_refused_with_the_nearest(params, tmp_path):
    with pytest.raises(CardError, match='dtype "float61"|did you mean "float16"'):
        publishing.publish(tmp_path, "v", "vision", vision.tiny(), params["vision"], dtype="float61")


@pytest.mark.parametrize("at", [0, 9, 300, -1])
def test_a_file_with_one_changed_byte_is_refused(at, published):
    card = hub.find(published, "vision")
    content = bytearray(card.weights.read_bytes())
    content[at] ^= 1
    card.weights.write_bytes(content)
    with pytest.raises(CardError, match="sha256 is .*, the card says"):
        hub.load(card)


def test_a_shortened_and_a_missing_file_are_refused(published):
    card = hub.find(published, "vision")
    card.weights.write_bytes(card.weights.read_bytes()[:-1])
    with pytest.raises(CardError, match="has [0-9]+ bytes, card vision-a says [0-9]+"):
        hub.load(card)
    card.weights.unlink()
    with pytest.raises(CardError, match="card vision-a: its weights are not at"):
        hub.load(card)


def test_a_config_that_lies_about_its_file_is_refused_with_both_sides(published):
    path = published / "vision-a.json"
    value = json.loads(path.read_text())
    value["config"]["depth"] = 3
    path.write_text(json.dumps(value))
    with pytest.raises(CardError, match=r"of another shape: blocks.*\(config \(3, .*file \(2, "):
        hub.load(read_card(path))


def test_a_config_that_cannot_be_built_is_our_error(published):
    path = published / "vision-a.json"
    value = json.loads(path.read_text())
    value["config"]["depth"] = -1
    path.write_text(json.dumps(value))
    with pytest.raises(
        CardError, match="card vision-a: its config cannot be built|only in the|another shape"
    ):
        hub.load(read_card(path))


# --- assemble


def test_modes_decide_what_is_loaded_and_what_is_begun_anew(published, params):
    chosen = recipe(published, {"vision": "frozen", "decoder": "full"}, seed=3)
    network, assembled, report = hub.assemble(chosen)
    fresh = jax.jit(Network({"contrastive": MODULES["contrastive"]}).init)(3)
    assert network.configs == MODULES and list(assembled) == list(MODULES)
    same(assembled["vision"], params["vision"])
    same(assembled["decoder"], params["decoder"])
    same(assembled["contrastive"], fresh["contrastive"])
    for kind, modules in (
        ("loaded", ("vision", "decoder")),
        ("initialised", ("contrastive",)),
        ("skipped", ()),
    ):
        arrays = [array for module in modules for array in flat(params[module]).values()]
        assert (report.total(kind).arrays, report.total(kind).bytes) == (
            len(arrays),
            sum(a.nbytes for a in arrays),
        )


def test_the_report_reads_as_a_table_and_as_json(published):
    _, report = hub.loaded(recipe(published, {"vision": "frozen"}))
    lines = report.table().splitlines()
    assert lines[0].split() == ["module", "mode", "loaded", "initialised", "skipped", "card"]
    assert [line.split()[0] for line in lines[1:]] == ["vision", "decoder", "contrastive", "all"]
    value = json.loads(json.dumps(report.json()))
    assert (
        value["modules"]["vision"]["card"] == "vision-a" and len(value["modules"]["vision"]["sha256"]) == 64
    )
    assert value["modules"]["contrastive"]["loaded"] == {"arrays": 0, "bytes": 0}
    assert value["total"]["loaded"] == value["modules"]["vision"]["loaded"]


def test_a_card_of_another_config_is_refused_with_the_fields_that_differ(published):
    stem = dataclasses.replace(vision.tiny().stem, patch=16)
    modules = MODULES | {"vision": dataclasses.replace(vision.tiny(), depth=5, stem=stem)}
    said = r"another vision than the recipe: stem.patch \(card 8, recipe 16\), depth \(card 2, recipe 5\)"
    with pytest.raises(CardError, match=said):
        hub.loaded(recipe(published, {"vision": "full"}, modules=modules))
    with pytest.raises(CardError, match="stem .card Convolutions, recipe Patches."):
        modules = MODULES | {"vision": dataclasses.replace(vision.tiny(), stem=vision.Patches(patch=8))}
        hub.loaded(recipe(published, {"vision": "full"}, modules=modules))


def test_a_card_of_another_module_is_refused(published):
    cards = {"vision": str(published / "decoder-a.json")}
    with pytest.raises(CardError, match="module 'vision' is loaded from card decoder-a, one of 'decoder'"):
        hub.loaded(recipe(published, {"vision": "full"}, cards=cards))


def rewrite(published: Path, module: str, change) -> None:
    """Publishes a file whose arrays `change` has changed, with a card that is right about everything but
    them."""
    card = hub.find(published, module)
    arrays = {name: np.array(array) for name, array in weights.read(card.weights).items()}
    change(arrays)
    sha256, size = weights.write(card.weights, arrays)
    dataclasses.replace(card, file=dataclasses.replace(card.file, sha256=sha256, bytes=size)).write()


def test_an_array_too_few_or_too_many_is_refused_with_both_sides(published):
    def change(arrays):
        arrays["strange.kernel"] = arrays.pop("class_token")

    rewrite(published, "vision", change)
    with pytest.raises(CardError, match="only in the config: class_token; only in the file: strange.kernel"):
        hub.loaded(recipe(published, {"vision": "full"}))


def test_rules_excuse_arrays_and_are_in_the_account(published, params):
    def change(arrays):
        arrays["strange.kernel"] = arrays.pop("text_projection.bias")

    rewrite(published, "contrastive", change)
    chosen = recipe(
        published, {"contrastive": "full"}, modules={"contrastive": MODULES["contrastive"]}, seed=3
    )
    rules = {"initialise": {"contrastive": ["text_*.bias"]}, "skip": {"contrastive": ["strange.*"]}}
    network, assembled, report = hub.assemble(chosen, **rules)
    begun = jax.jit(network.init)(3)["contrastive"]
    old, new = flat(params["contrastive"]), flat(assembled["contrastive"])
    assert {name for name in old if not np.array_equal(old[name], new[name])} == {"text_projection.bias"}
    np.testing.assert_array_equal(new["text_projection.bias"], begun["text_projection"]["bias"])
    (line,) = report.lines
    assert (line.initialised.arrays, line.skipped.arrays, line.loaded.arrays) == (1, 1, len(old) - 1)


def test_a_rule_that_excuses_nothing_is_refused(published):
    chosen = recipe(published, {"vision": "full"})
    with pytest.raises(CardError, match='rule skip "strange.*" matches no array of the file'):
        hub.loaded(chosen, skip={"vision": ["strange.*"]})
    with pytest.raises(
        CardError, match="rule initialise: module 'visoin' is not loaded, .'vision'. are .did you mean"
    ):
        hub.loaded(chosen, initialise={"visoin": ["*"]})


def test_an_array_that_a_rule_skips_cannot_be_missed_silently(published):
    with pytest.raises(CardError, match="only in the config: class_token"):
        hub.loaded(recipe(published, {"vision": "full"}), skip={"vision": ["class_token"]})


# --- compose


def test_composed_cards_are_one_network_with_what_was_published(published, params):
    chosen = [
        published / "vision-a.json",
        str(published / "decoder-a.json"),
        hub.find(published, "contrastive"),
    ]
    for network, composed in (hub.compose(*chosen), hub.compose(published)):
        assert network.configs == MODULES
        for module in MODULES:
            same(composed[module], params[module])


def published_of(folder: Path, module: str, config) -> Path:
    card = publishing.publish(folder, f"{module}-b", module, config, drawn({module: config})[module])
    return folder / f"{card.name}.json"


def test_cards_of_unequal_width_are_refused_with_both_sides_until_a_connector_stands_between(
    published, tmp_path
):
    wide = published_of(tmp_path / "b", "vision", dataclasses.replace(vision.tiny(), width=64))
    others = [published / "contrastive-a.json", published / "decoder-a.json"]
    with pytest.raises(
        CardError,
        match="vision-b and contrastive-a .*: vision-b has width 64, contrastive-a has width 32; a c",
    ):
        hub.compose(wide, *others)
    between = published_of(tmp_path / "b", "connector", connector.Config(inputs=64, width=32))
    network, _ = hub.compose(wide, *others, between)
    assert set(network.configs) == {*MODULES, "connector"}
    wrong = published_of(tmp_path / "c", "connector", connector.Config(inputs=48, width=32))
    with pytest.raises(CardError, match="vision-b has vision width 64, connector-b has vision width 48"):
        hub.compose(wide, *others, wrong)


@pytest.mark.parametrize(
    ("module", "config", "said"),
    [
        (
            "temporal",
            dataclasses.replace(temporal.tiny(), depth=5),
            "vision-a has vision depth 2, temporal-b has vision depth 5",
        ),
        (
            "unmasker",
            heads.UnmaskerConfig(width=32, vocabulary=96),
            "decoder-a has vocabulary 128, unmasker-b has vocabulary 96",
        ),
    ],
)
def test_cards_of_unequal_depth_or_vocabulary_are_refused(module, config, said, published, tmp_path):
    with pytest.raises(CardError, match=said):
        hub.compose(
            published / "vision-a.json",
            published / "decoder-a.json",
            published_of(tmp_path / "b", module, config),
        )
