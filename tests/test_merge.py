"""Merging cards: what fits is merged one tensor at a time into a card that names its parents."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from cards_to_merge import MODULES, drawn, parents, publish, read  # pyright: ignore[reportMissingImports]

from mplug2 import hub
from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError
from mplug2.hub import lock, merge, merge_methods, readme, weights
from mplug2.hub.card import Parent, Parents, Tokens, read_card
from mplug2.hub.merge_methods import Breadcrumbs, Dare, Graft, Soup, TaskArithmetic, Ties
from mplug2.modules import vision
from mplug2.network import Network, flat
from mplug2.roles import Execution
from mplug2.run import Run
from mplug2.tools.main import main
from mplug2.tools.publish import trained_from

SCHEMA = json.loads((Path(__file__).parent.parent / "checkpoints" / "card.schema.json").read_text())


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Directories of cards: `base`, and `a`, `b`, `c`."""
    return parents(tmp_path_factory.mktemp("cards"))


# --- what is written


def test_a_soup_of_files_is_the_mean_of_each_array(places, tmp_path):
    cards = merge.merge(tmp_path, Soup(), [places["a"], places["b"], places["c"]])
    assert set(cards) == set(MODULES)
    parents = [drawn(seed) for seed in (1, 2, 3)]
    for module, card in cards.items():
        for name, array in read(card).items():
            mean = np.mean([parent[module][name].astype(np.float64) for parent in parents], 0)
            np.testing.assert_array_equal(array, mean.astype(np.float32))
        assert hub.load(card)[0] == MODULES[module]


def test_a_soup_of_files_knows_no_order_and_equal_inputs_give_equal_bytes(places, tmp_path):
    orders = [("a", "b", "c"), ("c", "a", "b"), ("a", "b", "c")]
    made = [
        merge.merge(tmp_path / str(i), Soup(), [places[name] for name in order])
        for i, order in enumerate(orders)
    ]
    assert len({cards["vision"].file.sha256 for cards in made}) == 1
    texts = [(tmp_path / str(i) / "vision-soup.json").read_text() for i in (0, 2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("method", [Ties(), Dare(seed=3), Breadcrumbs(), TaskArithmetic()])
def test_equal_inputs_give_equal_bytes_by_every_method(method, places, tmp_path):
    parents = [places["a"], places["b"]]
    one, other = (merge.merge(tmp_path / n, method, parents, base=places["base"]) for n in "xy")
    assert [card.file for card in one.values()] == [card.file for card in other.values()]


def test_a_seed_decides_what_dare_drops_whatever_the_order_of_parents(places, tmp_path):
    def made(name: str, seed: int, *parents: str) -> np.ndarray:
        chosen = [places[parent] for parent in parents]
        cards = merge.merge(tmp_path / name, Dare(seed=seed), chosen, base=places["base"])
        return read(cards["vision"])["class_token"]

    one = made("x", 1, "a", "b")
    np.testing.assert_allclose(one, made("y", 1, "b", "a"), rtol=1e-6)
    assert (one != made("z", 2, "a", "b")).any()


def test_each_layer_of_a_stack_is_a_tensor_of_its_own(places, tmp_path):
    cards = merge.merge(tmp_path, Ties(density=0.25), [places["a"], places["b"]], base=places["base"])
    axes, found = flat(Network(MODULES).axes["vision"]), read(cards["vision"])
    base, *parents = (drawn(seed)["vision"] for seed in (0, 1, 2))
    for name in ("blocks.layers.attention.query.kernel", "class_token"):
        tensors = [base[name], *(parent[name] for parent in parents)]
        stacked = axes[name][0] == "layers"
        layers = list(zip(*tensors, strict=True)) if stacked else [tensors]
        expected = [merge_methods.ties(b, others, (0.5, 0.5), density=0.25) for b, *others in layers]
        np.testing.assert_array_equal(found[name], np.float32(np.stack(expected) if stacked else expected[0]))


def test_coefficients_are_one_a_parent_or_by_module(places, tmp_path):
    parents, by_module = [places["a"], places["b"]], {"vision": (1, 0)}
    cards = merge.merge(
        tmp_path, TaskArithmetic(), parents, base=places["base"], coefficients=by_module, family="x"
    )
    a, b = drawn(1), drawn(2)
    for name, array in read(cards["vision"]).items():
        np.testing.assert_array_equal(array, a["vision"][name])
    for name, array in read(cards["contrastive"]).items():  # unsaid: equal shares
        mean = (a["contrastive"][name].astype(np.float64) + b["contrastive"][name]) / 2
        np.testing.assert_array_equal(array, mean.astype(np.float32))


def test_a_graft_takes_arrays_by_path_from_one_parent(places, tmp_path):
    take = ("vision.blocks.*.query.*", "contrastive.text_*")
    cards = merge.merge(tmp_path, Graft(take=take), [places["a"]], base=places["base"])
    found = {f"{m}.{n}": array for m, card in cards.items() for n, array in read(card).items()}
    base, donor = (
        {f"{m}.{n}": array for m, tree in drawn(seed).items() for n, array in tree.items()} for seed in (0, 1)
    )
    taken = {name for name, array in found.items() if (array == donor[name]).all()}
    assert taken == {name for name in found if ".query." in name or name.startswith("contrastive.text_")}
    assert all((found[name] == base[name]).all() for name in set(found) - taken)
    assert cards["vision"].parents and cards["vision"].parents.take == take


@pytest.mark.parametrize("dtype", list(weights.FLOATS))
def test_the_merge_is_stored_as_asked_rounded_once(dtype, places, tmp_path):
    (card,) = merge.merge(
        tmp_path, Soup(), [places["a"], places["b"]], modules=["contrastive"], dtype=dtype
    ).values()
    assert card.interface.dtype == dtype
    name = "text_projection.kernel"
    mean = (drawn(1)["contrastive"][name].astype(np.float64) + drawn(2)["contrastive"][name]) / 2
    np.testing.assert_array_equal(read(card)[name], mean.astype(np.float32).astype(weights.FLOATS[dtype]))


def test_parents_of_one_stored_type_keep_it_and_others_give_float32(places, tmp_path):
    narrow = publish(tmp_path / "narrow", 2, "n", dtype="bfloat16")
    wide, same = (
        merge.merge(tmp_path / name, Soup(), parents)["vision"].interface.dtype
        for name, parents in (("x", [narrow, places["a"]]), ("y", [narrow, narrow]))
    )
    assert (wide, same) == ("float32", "bfloat16")


def test_one_tensor_at_a_time_is_held(tmp_path):
    """A base and two parents of ten layers, merged by the method that holds most."""
    config = vision.Config(width=128, depth=10, heads=4, image=(32, 32), stem=vision.Patches(patch=8))
    modules = {"vision": config}
    parents = [publish(tmp_path / str(seed), seed, str(seed), modules=modules) for seed in range(3)]
    size = sum(hub.find(place).file.bytes for place in parents)
    layer = 128 * 512 * 8  # bytes of a layer's largest array in float64
    tracemalloc.start()
    merge.merge(tmp_path / "out", Ties(), parents[1:], base=parents[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"parents and base {size / 1e6:.1f} MB, largest tensor {layer / 1e6:.1f} MB, peak {peak / 1e6:.1f}")
    assert peak < 10 * layer < size / 4


# --- greedy soup


def test_a_greedy_soup_keeps_the_parents_that_do_not_lower_the_score(places, tmp_path):
    target = drawn(1)["contrastive"]["text_projection.kernel"]

    def score(cards) -> float:
        """Nearest to parent a, and never changed by parent c: its soups are ties, which are kept."""
        found = read(cards["contrastive"])["text_projection.kernel"]
        return -round(float(np.abs(found - target).mean()), 6)

    nearby = publish(tmp_path / "d", 1, "d")
    parents = [places["b"], places["a"], nearby]
    cards, trials = merge.greedy(tmp_path / "out", parents, score)
    assert [(trial.parent, trial.kept) for trial in trials] == [
        (0, False),
        (1, True),
        (2, False),
        (2, True),  # equal to the best: as good
        (0, False),
    ]
    card = cards["contrastive"]
    assert card.name == "contrastive-greedy" and card.parents
    assert [one.coefficient for one in card.parents.merged] == [0, 0.5, 0.5]
    np.testing.assert_array_equal(read(card)["text_projection.kernel"], target)
    with pytest.raises(CardError, match="a score is nan"):
        merge.greedy(tmp_path / "x", parents, lambda cards: float("nan"))


# --- the card


def test_the_merged_card_names_its_parents_and_comes_back(places, tmp_path):
    method = Ties(density=0.5, scale=1.5)
    cards = merge.merge(
        tmp_path, method, [places["a"], places["b"]], base=places["base"], coefficients=(0.25, 0.75)
    )
    card, path = cards["vision"], tmp_path / "vision-ties.json"
    a, b, base = (hub.find(places[name], "vision") for name in ("a", "b", "base"))
    assert card.parents == Parents(
        method="ties",
        merged=(
            Parent(name="vision-a", sha256=a.file.sha256, coefficient=0.25),
            Parent(name="vision-b", sha256=b.file.sha256, coefficient=0.75),
        ),
        base=Parent(name="vision-base", sha256=base.file.sha256),
        settings={"density": 0.5, "scale": 1.5},
    )
    assert read_card(path) == card
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    text = readme.text([card], "merged")
    assert f"`ties` (density 0.5, scale 1.5) of 0.25 × vision-a (sha256 `{a.file.sha256}`), 0.75 ×" in text
    assert f"| base | vision-base (sha256 `{base.file.sha256}`) |" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "../x"}, "parents.method: is '../x'"),
        ({"methd": "soup"}, 'parents.methd: no such field, .*did you mean "method"'),
        ({"merged": []}, "parents.merged: is .*at least one parent"),
        ({"merged": [{"name": "a", "sha256": "x"}]}, r"parents.merged\[0\].sha256: is 'x'"),
        ({"merged": [{"name": "a\nb", "sha256": "a" * 64}]}, r"parents.merged\[0\].name: is"),
        ({"merged": [{"name": "a", "sha256": "a" * 64, "coefficient": "1"}]}, "coefficient: is '1', exp"),
        ({"settings": {"density": None}}, "parents.settings.density: is None, expected a finite number"),
        ({"base": 3}, "parents.base: is 3, expected an object"),
        ({"take": "x"}, "parents.take: is 'x', expected a list"),
    ],
)
def test_parents_that_are_not_what_a_card_states_are_refused(change, said, places, tmp_path):
    merge.merge(tmp_path, Soup(), [places["a"], places["b"]], modules=["contrastive"])
    path = tmp_path / "contrastive-soup.json"
    value = json.loads(path.read_text())
    value["parents"] |= change
    path.write_text(json.dumps(value))
    with pytest.raises(CardError, match=said):
        read_card(path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**value, "parents": {**value["parents"], "merged": 3}}, SCHEMA)


def test_what_parents_state_alike_is_stated_again_and_the_tokenizer_comes_along(places, tmp_path):
    (tmp_path / "p").mkdir()
    facts = {
        "preprocessing": Preprocessing(),
        "tokenizer": Tokens(file="x.model", sha256="c" * 64, ids={"pad": 0}),
    }
    places = [
        publish(tmp_path / name, seed, name, paper="arXiv:1", **facts) for seed, name in ((1, "p"), (2, "q"))
    ]
    (tmp_path / "p" / "x.model").write_bytes(b"words")
    card = merge.merge(tmp_path / "out", Soup(), places)["vision"]
    assert {name: getattr(card, name) for name in facts} == facts
    assert (tmp_path / "out" / "x.model").read_bytes() == b"words"


def test_a_published_module_states_what_its_run_began_from(places, tmp_path):
    card = hub.find(places["a"], "vision")
    tokenizer = Tokens(file="x.model", sha256="c" * 64, ids={"pad": 0})
    modules = {
        "vision": lock.Part(config=card.config, mode="full", source="there", card=card.name, file=card.file),
        "contrastive": lock.Part(config=MODULES["contrastive"], mode="init"),
    }
    locked = lock.Lock(
        recipe="r",
        overrides=(),
        seed=0,
        execution=Execution(),
        preprocessing=Preprocessing(),
        tokenizer=tokenizer,
        modules=modules,
    )
    run = Run(path=tmp_path, recipe="r", overrides=(), settings={}, fingerprint="", sessions=())
    assert trained_from(run, "vision") is None  # a run without a lock states nothing
    locked.write(tmp_path / lock.FILE)
    base = Parent(name="vision-a", sha256=card.file.sha256)
    assert trained_from(run, "vision") == Parents(method="train", base=base)
    assert trained_from(run, "contrastive") is None
    assert "| base | vision-a" in readme.text([replace(card, parents=trained_from(run, "vision"))], "x")


# --- the command


def test_the_command_writes_cards_that_compose_and_a_page(places, tmp_path, capsys):
    words = ["breadcrumbs", str(places["a"]), str(places["b"]), "--base", str(places["base"])]
    words += ["--coefficient", "0.5", "-0.25", "--outliers", "0.05", "--out", str(tmp_path / "out")]
    assert main(["merge", *words]) == 0
    said = capsys.readouterr().out
    assert "vision-breadcrumbs.safetensors" in said and "4 of 4 parents do not state" in said
    network, params = hub.compose(tmp_path / "out")
    assert set(network.configs) == set(params) == set(MODULES)
    parents = hub.find(tmp_path / "out", "vision").parents
    assert parents and parents.settings == {"density": 0.9, "outliers": 0.05}
    assert [one.coefficient for one in parents.merged] == [0.5, -0.25]
    assert "-0.25 × vision-b" in (tmp_path / "out" / "README.md").read_text()
    assert main(["merge", *words]) == 2
    assert "is there already" in capsys.readouterr().err
