"""Deltas: only they are trained and kept, they change what they say and nothing else, and come off again."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from adapted import OF, TOKENS, adapted, computed
from fresh import compiled, fresh
from toy import Numbers, batch, losses, run, same, toy, trainer

from mplug2 import adapt, anatomy
from mplug2.checkpoint import Checkpoints, fingerprint, restore_modules
from mplug2.errors import CheckpointError, DataError, RecipeError
from mplug2.modules import universal
from mplug2.modules.forms import BitFit, Bottleneck, Lora
from mplug2.network import Network, flat
from mplug2.overrides import apply
from mplug2.recipe import Recipe
from mplug2.roles import Config
from mplug2.run import settings
from mplug2.train import train

FORMS = [Lora(rank=3), BitFit(), Bottleneck(width=5, scale=0.5)]


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
    chosen = ["modes.vision=lora", "cards.vision=a card", "delta.rank=5", "delta.dropout=0.1"]
    form = Lora(rank=5, dropout=0.1)
    assert apply(dataclasses.replace(toy(), delta=Lora()), chosen).forms == {"vision": form}
    assert not any("delta" in name for name in settings(dataclasses.replace(toy(), delta=Lora())))
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
