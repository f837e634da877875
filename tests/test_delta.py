"""Deltas: only they are trained and kept, they change what they say and nothing else, and come off again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest
from fresh import compiled, fresh
from toy import Numbers, batch, losses, run, same, toy, trainer

from mplug2 import adapt, anatomy, hub, lock, publishing, recipes
from mplug2.card import Parent, Parents, read_card
from mplug2.checkpoint import Checkpoints, fingerprint, restore_modules
from mplug2.data.pixels import Preprocessing
from mplug2.data.tokens import SentencePiece
from mplug2.errors import CardError, CheckpointError, DataError, RecipeError
from mplug2.modules import decoder, universal, vision
from mplug2.modules.forms import BitFit, Bottleneck, Lora
from mplug2.network import Network, flat
from mplug2.overrides import apply
from mplug2.predict import Predictor
from mplug2.recipe import Recipe
from mplug2.roles import Config, Form
from mplug2.run import open_run
from mplug2.tools.publish import main as publish
from mplug2.train import train

OF = universal.tiny()
FORMS = [Lora(rank=3), BitFit(), Bottleneck(width=5, scale=0.5)]
SCHEMA = json.loads((Path(__file__).parent.parent / "checkpoints" / "card.schema.json").read_text())


def adapted(form: Form = Lora(), seed: int = 1) -> tuple[Network, dict[str, Any]]:  # noqa: B008  frozen
    """A universal with a delta that has been through something: every array is random."""
    network = Network({"universal": OF, "universal_delta": form.delta(OF)})
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), network.shapes["universal_delta"]
    )
    return network, fresh({"universal": OF}) | {"universal_delta": drawn}


TOKENS = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)


def computed(network: Network, params: Any) -> np.ndarray:
    return np.asarray(compiled(lambda params: network.bind(params)["universal"].vision(TOKENS))(params))


def adapting(**changes: Any) -> Recipe:
    """The toy with `vision` adapted and `head` frozen."""
    return toy(
        modes={"vision": "lora", "head": "frozen"},
        deltas={"vision": Lora(rank=2)},
        cards={"vision": "a card", "head": "a card"},
        **changes,
    )


# --- what a delta does


@pytest.mark.parametrize("form", FORMS)
def test_a_fresh_delta_changes_nothing(form):
    network = Network({"universal": OF, "universal_delta": form.delta(OF)})
    params = compiled(network.init)(0)
    np.testing.assert_array_equal(computed(network, params), computed(*adapt.without(network, params)))


@pytest.mark.parametrize("form", FORMS)
def test_merged_equals_applied(form):
    network, params = adapted(form)
    merged, flat_params = adapt.merge(network, params)
    assert list(merged.configs) == ["universal"]
    applied = computed(network, params)
    np.testing.assert_allclose(computed(merged, flat_params), applied, atol=1e-6)
    assert np.abs(applied - computed(*adapt.without(network, params))).max() > 0.01


def test_a_product_and_its_lora_by_hand():
    network, params = adapted(Lora(rank=3, alpha=6.0, targets=("*attention.query.kernel",)))
    name = "layers.layers.attention.query.kernel"
    base, delta = flat(params["universal"]), flat(params["universal_delta"])
    got = flat(network.adapted(params)["universal"])
    for layer in range(OF.depth):
        by_hand = base[name][layer] + 2.0 * delta[f"{name}.A"][layer] @ delta[f"{name}.B"][layer]
        np.testing.assert_allclose(got[name][layer], by_hand, atol=1e-6)
    assert {name for name in got if got[name] is not base[name]} == {name}
    assert set(delta) == {f"{name}.A", f"{name}.B"}


def test_dropout_leaves_out_whole_inputs_of_a_delta_and_nothing_without_a_key():
    form = Lora(rank=3, alpha=3.0, dropout=0.5, targets=("*attention.query.kernel",))
    network, params = adapted(form)
    params["universal"] = jax.tree.map(np.zeros_like, params["universal"])  # what is left is the delta
    name = "layers.layers.attention.query.kernel"
    whole, one, other = (
        np.asarray(flat(network.adapted(params, key)["universal"])[name])
        for key in (None, jax.random.key(1), jax.random.key(2))
    )
    kept = np.abs(one).max(-1) > 0
    np.testing.assert_allclose(one, np.where(kept[..., None], 2 * whole, 0), atol=1e-6)
    assert 0.2 < kept.mean() < 0.8 and (np.abs(other).max(-1) > 0).tolist() != kept.tolist()
    with pytest.raises(RecipeError, match="dropout is 1.0, expected from 0 to below 1"):
        Lora(dropout=1.0)


def test_a_bottleneck_is_a_parallel_adapter_with_the_activation_of_its_mlp():
    network, params = adapted(Bottleneck(width=5, scale=0.5))
    delta = flat(params["universal_delta"])
    wide, base = (
        net.bind(tree)["universal"].layers[0].mlp
        for net, tree in ((network, params), adapt.without(network, params))
    )
    up, bias, down = (
        delta[f"layers.layers.mlp.{name}"][0] for name in ("up.kernel", "up.bias", "down.kernel")
    )
    by_hand = base(TOKENS) + 0.5 * jax.nn.gelu(TOKENS @ up + bias, approximate=False) @ down
    np.testing.assert_allclose(wide(TOKENS), by_hand, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_merging_and_taking_off_leaves_the_base_bit_for_bit(form):
    network, params = adapted(form)
    before = fingerprint(params["universal"])
    _, merged = adapt.merge(network, params)
    assert fingerprint(merged["universal"]) != before
    bare, kept = adapt.without(network, params)
    assert fingerprint(kept["universal"]) == before and list(kept) == ["universal"]
    own = params["universal_delta"]
    again = adapt.merge(*adapt.beside(bare, kept, {"universal": (form.delta(OF), own)}))[1]
    assert fingerprint(again["universal"]) == fingerprint(merged["universal"])


@pytest.mark.parametrize("form", FORMS)
def test_sums_and_averages_of_deltas_change_what_each_changes_in_sum(form):
    one, other = adapted(form, seed=1)[1], adapted(form, seed=2)[1]
    config = form.delta(OF)

    def change(config: Config, own: Any) -> dict[str, np.ndarray]:
        """What a delta does to a base of zeros; for hidden units, to the map without its activation."""
        nothing = jax.tree.map(np.zeros_like, one["universal"])
        network = Network({"universal": OF, "universal_delta": config})
        arrays = flat(network.adapted({"universal": nothing, "universal_delta": own})["universal"])
        up, down = arrays.pop("layers.layers.mlp.up.kernel"), arrays.pop("layers.layers.mlp.down.kernel")
        del arrays["layers.layers.mlp.up.bias"]
        return arrays if not isinstance(form, Bottleneck) else {"mlp": np.asarray(up @ down)}

    for shares, summed in (
        (
            (1.0, -0.5),
            adapt.add([(config, one["universal_delta"], 1.0), (config, other["universal_delta"], -0.5)]),
        ),
        ((0.5, 0.5), adapt.average([(config, one["universal_delta"]), (config, other["universal_delta"])])),
    ):
        first, second = (change(config, params["universal_delta"]) for params in (one, other))
        for name, value in change(*summed).items():
            np.testing.assert_allclose(value, shares[0] * first[name] + shares[1] * second[name], atol=1e-6)


def test_deltas_of_different_ranks_and_targets_add_up():
    forms = (
        Lora(rank=2, targets=("*query.kernel",)),
        Lora(rank=3, targets=("*query.kernel", "*mlp.up.kernel")),
    )
    parts = [
        (form.delta(OF), adapted(form, seed)[1]["universal_delta"], 1.0) for seed, form in enumerate(forms)
    ]
    config, own = adapt.add(parts)
    assert jax.tree.map(np.shape, own) == jax.tree.map(
        lambda leaf: leaf.shape, Network({"universal_delta": config}).shapes["universal_delta"]
    )
    params: Any = fresh({"universal": OF})
    one_by_one = params
    for config_, own_, _ in parts:
        one_by_one = adapt.merge(
            *adapt.beside(Network({"universal": OF}), one_by_one, {"universal": (config_, own_)})
        )[1]
    together = adapt.merge(*adapt.beside(Network({"universal": OF}), params, {"universal": (config, own)}))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, one_by_one)


def test_what_does_not_belong_together_is_refused_with_both_sides():
    one, other = Lora().delta(OF), BitFit().delta(OF)
    with pytest.raises(RecipeError, match="Lora.*and BitFit.*cannot be added"):
        adapt.add([(one, {}, 1.0), (other, {}, 1.0)])
    with pytest.raises(RecipeError, match=r'target "\*qurey" fits none of'):
        Network({"universal_delta": Lora(targets=("*qurey",)).delta(OF)})
    with pytest.raises(RecipeError, match="rank is 0, expected at least 1"):
        Lora(rank=0)
    network, params = adapted()
    wider = Lora().delta(dataclasses.replace(OF, width=64))
    with pytest.raises(RecipeError, match="another universal: width .*32.*64"):
        adapt.beside(network, params, {"universal": (wider, {})})
    with pytest.raises(RecipeError, match='did you mean "universal"'):
        adapt.beside(network, params, {"univesral": (one, {})})


# --- recipes


def test_a_recipe_says_what_is_adapted_and_how():
    recipe = adapting()
    assert list(recipe.parts) == ["vision", "head", "vision_delta"]
    assert [name for name in recipe.parts if recipe.trains(name)] == ["vision_delta"]
    assert apply(recipe, ["deltas.vision.rank=5"]).deltas["vision"] == Lora(rank=5)
    with pytest.raises(RecipeError, match=r"needs the form of its delta \(delta, or deltas.vision\)"):
        toy(modes={"vision": "lora"}, cards={"vision": "a card"})
    with pytest.raises(RecipeError, match="mode lora of vision needs a card"):
        toy(modes={"vision": "lora"}, deltas={"vision": Lora()})
    with pytest.raises(RecipeError, match='names module .vision_detla.*did you mean "vision_delta"'):
        dataclasses.replace(recipe, learning_rates={"vision_detla": 2.0})
    with pytest.raises(RecipeError, match="vision_delta is the name of a delta: give vision the mode lora"):
        toy(modules=dict(toy().modules) | {"vision_delta": Lora().delta(toy().modules["vision"])})


# --- training


def test_the_gradient_flows_into_the_delta_alone():
    recipe = adapting(dropout=False)
    made, state = trainer(recipe)
    assert list(state["params"]) == ["vision_delta"]
    base = Network(recipe.modules).init(recipe.seed)
    _, gradients = made.gradients(state["params"], base, batch(recipe), None)
    assert list(gradients) == ["vision_delta"]
    norms = {name: float(np.abs(leaf).max()) for name, leaf in flat(gradients).items()}
    assert norms["vision_delta.kernel.B"] > 0 and norms["vision_delta.kernel.A"] == 0  # B begins at zero
    after, _ = made.step(state, made.place_frozen(base), batch(recipe))
    assert float(np.abs(after["params"]["vision_delta"]["kernel"]["B"]).max()) > 0


def test_a_resumed_run_equals_an_uninterrupted_one_and_keeps_the_delta_alone(tmp_path):
    recipe = adapting(ema=0.9)
    whole = run(recipe, tmp_path / "whole")
    with pytest.raises(DataError, match="has ended"):
        run(recipe, tmp_path / "stopped", end=11)
    resumed = run(recipe, tmp_path / "stopped")
    same(resumed.params, whole.params)
    same(resumed.ema, whole.ema)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    before = Network(recipe.modules).init(recipe.seed)
    same({name: whole.params[name] for name in before}, before)
    path = Checkpoints(tmp_path / "whole").path(12)
    items = {item.name for item in path.iterdir() if item.is_dir()}
    assert items == {"vision_delta", "ema.vision_delta", "optimizer", "window", "iterator", "metadata"}
    shapes = {leaf.shape for leaf in jax.tree.leaves(trainer(recipe)[1]["moments"])}
    assert shapes == {(), (12, 2), (2, 8)}
    told = json.loads((path / "metadata" / "data.json").read_text())
    assert told["frozen"] == {name: fingerprint(tree) for name, tree in before.items()}
    assert list(restore_modules(tmp_path / "whole")[1]) == ["vision_delta"]
    network = Network(recipe.parts)
    with pytest.raises(CheckpointError, match="frozen module .* is not the one"):
        train(recipe, tmp_path / "whole", batches=Numbers(recipe), composed=(network, network.init(5)))


def test_a_delta_is_a_small_share_of_what_full_training_trains():
    sizes = anatomy.parameters(
        Network({"universal": universal.base(), "universal_delta": Lora(rank=4).delta(universal.base())})
    )
    assert sizes["universal_delta"] / sizes["universal"] < 0.02
    rank, (width, hidden, depth) = 4, (768, 3072, 2)
    assert sizes["universal_delta"] == depth * rank * (8 * 2 * width + 2 * (width + hidden))


# --- publishing

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


def test_requests_choose_their_delta_and_nothing_is_compiled_again(published):
    clips = np.random.default_rng(1).integers(0, 256, (2, 1, 32, 32, 3), np.uint8)
    cards = hub.cards(published / "base")
    bare = Predictor(*hub.compose(*cards.values()), SentencePiece(), Preprocessing())
    bare.cards = cards
    before = bare.caption(clips)
    mine = bare.adapted(published / "delta")
    both = Predictor(*hub.compose(*cards.values(), published / "delta"), SentencePiece(), Preprocessing())
    assert mine.caption(clips) == both.caption(clips)
    assert len(mine._compiled) == 1 and mine._compiled._known is bare._compiled._known
    ((compute, _),) = [(known._cache_size(), name) for name, known in mine._compiled._known.items()]
    assert compute == 1
    assert bare.caption(clips) == before == mine.adapted().caption(clips)
    same(bare.params, mine.adapted().params)
    delta = hub.find(published / "delta")
    with pytest.raises(CardError, match=f"delta of the universal of sha256 {'0' * 64}, card universal-a has"):
        bare.adapted(dataclasses.replace(delta, base="0" * 64))


def test_what_a_run_learned_is_published_as_a_delta_or_merged(published, tmp_path, monkeypatch):
    recipe = lora_recipe(published)
    monkeypatch.setattr(recipes, "find", lambda name: recipe)
    own = {"universal_delta": adapted()[1]["universal_delta"]}
    monkeypatch.setattr(
        "mplug2.trained.restore_modules", lambda path, names: (7, {name: own[name] for name in names})
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
