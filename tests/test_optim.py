import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mplug2 import modules, optim
from mplug2.errors import RecipeError
from mplug2.modules import heads
from mplug2.modules.forms import BitFit, Bottleneck, Lora
from mplug2.modules.prompt import Prompt
from mplug2.network import Network, flat
from mplug2.recipe import AdamW, OfficialAdamW

CONFIGS = {
    name: modules.sizes(name)["tiny"]()
    for name in ("vision", "temporal", "text", "universal", "fusion", "decoder", "connector")
} | {
    "contrastive": heads.ContrastiveConfig(width=32, space=16),
    "matching": heads.ClassifierConfig(width=32, classes=2),
    "unmasker": heads.UnmaskerConfig(width=32, vocabulary=96),
}


@pytest.fixture(scope="module")
def decayed():
    return {module: flat(tree) for module, tree in optim.decayed(Network(CONFIGS).axes).items()}


def test_kernels_and_word_tables_are_decayed_and_nothing_else(decayed):
    for module, parameters in decayed.items():
        for name, decays in parameters.items():
            last = name.split(".")[-1]
            weights = last in ("kernel", "words")
            assert decays == weights, f"{module}.{name}"


def test_what_is_not_decayed_is_exactly_this(decayed):
    kept = {
        f"{module}.{name}"
        for module, names in decayed.items()
        for name, decays in names.items()
        if not decays
    }
    without_layers = {name for name in kept if "bias" not in name and "norm" not in name}
    assert without_layers == {
        "vision.class_token",
        "vision.positions",
        "text.embedding.positions",
        "text.embedding.types",
        "decoder.embedding.positions",
        "decoder.embedding.types",
        "universal.latents",
        "contrastive.learned_temperature",
    }


FORMS = (Lora(), BitFit(), BitFit(targets=("*",)), Bottleneck(), Prompt())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_delta_of_any_form_is_decayed_where_it_is_weights_and_nowhere_else(form):
    """A prompt is tokens; the rest of a delta is named like what it changes, or is a factor of a kernel."""
    for module, config in CONFIGS.items():
        try:
            axes = Network({"delta": form.delta(config)}).axes["delta"]
        except RecipeError:  # it takes no such form
            continue
        for name, decays in flat(optim.decayed(axes)).items():
            assert decays == (name.split(".")[-1] in ("kernel", "words", "A", "B")), f"{module}.{name}"


def test_a_table_of_places_is_not_decayed_whatever_it_is_called():
    axes = {"registers": ("places", "embed"), "experts": ("layers", None, "embed"), "gate": ("layers", "mlp")}
    assert optim.decayed(axes) == {"registers": False, "experts": True, "gate": False}


def test_the_rate_follows_values_computed_by_hand():
    rate = optim.schedule(AdamW(learning_rate=1.0, warmup=4, final=0.1), steps=12)
    # steps 1 to 4 rise by quarters; 4 to 12 fall as half a cosine; step 8 is half way: (1 + 0.1) / 2
    by_hand = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 5: 0.1 + 0.45 * (1 + 0.5**0.5), 7: 0.55, 11: 0.1, 50: 0.1}
    for done, expected in by_hand.items():
        assert float(rate(done)) == pytest.approx(expected, rel=1e-6), done


def test_without_warm_up_the_first_step_has_almost_the_whole_rate():
    assert float(optim.schedule(AdamW(learning_rate=1.0, warmup=0, final=0.0), steps=2)(0)) == pytest.approx(
        0.5
    )


AXES = {"a": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}, "b": {"kernel": ("embed", "mlp")}}


def updated(settings: AdamW, gradients, params, rates=None) -> Any:
    optimizer = optim.optimizer(settings, 10, AXES, rates or {})
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return optax.apply_updates(params, updates)


def like(value: float) -> Any:
    return {
        "a": {"kernel": jnp.full((2, 2), value), "bias": jnp.full((2,), value)},
        "b": {"kernel": jnp.full((1, 2), value)},
    }


def test_a_first_step_is_adamw_computed_by_hand():
    settings = AdamW(learning_rate=0.1, warmup=0, final=1.0, weight_decay=0.5, clip=0.0, epsilon=0.0)
    new = updated(settings, like(3.0), like(2.0))
    # the first normalised update is the gradient's sign; decay takes rate * 0.5 * 2 more, not from the bias
    np.testing.assert_allclose(new["a"]["kernel"], 2 - 0.1 - 0.1, rtol=1e-6)
    np.testing.assert_allclose(new["a"]["bias"], 2 - 0.1, rtol=1e-6)


def test_a_modules_rate_scales_its_whole_update():
    settings = AdamW(learning_rate=0.1, warmup=0, final=1.0, weight_decay=0.5, clip=0.0)
    plain, scaled = (
        updated(settings, like(3.0), like(2.0)),
        updated(settings, like(3.0), like(2.0), {"b": 0.25}),
    )
    jax.tree.map(np.testing.assert_array_equal, plain["a"], scaled["a"])
    np.testing.assert_allclose(2 - scaled["b"]["kernel"], 0.25 * (2 - plain["b"]["kernel"]), rtol=1e-5)


RECORDED = json.loads((Path(__file__).parent / "golden" / "aux" / "aux.json").read_text())["lr"]


@pytest.mark.parametrize("loop", RECORDED, ids=lambda loop: loop["loop"])
def test_official_rates_are_the_recorded_ones(loop):
    """Of the language side (group 0) and of the vision tower (group 2), with the saw-tooth of captions."""
    peak, _, vision, _ = loop["base"]
    iterations = loop["epochs"] * loop["iters_per_epoch"]
    settings = OfficialAdamW(
        learning_rate=peak,
        warmup=loop["warmup"],
        final=loop["min_lr"] / peak,
        sawtooth=loop["iters_per_epoch"] if loop["loop"] == "caption" else 0,
    )
    expected = np.array(loop["lr_group0_group2"])
    for column, factor in enumerate((1.0, vision / peak)):
        rate = jax.vmap(optim.schedule(settings, iterations, factor))(jnp.arange(iterations))
        np.testing.assert_allclose(rate, expected[:, column], rtol=2e-5)


def test_the_released_settings_are_the_official_defaults():
    settings = OfficialAdamW()
    assert settings.learning_rate * settings.final == pytest.approx(1e-6)
    rate = optim.schedule(settings, 10_000, 0.1)
    assert [float(rate(done)) for done in (0, 201, 9_999)] == pytest.approx([1e-6, 2e-6, 1e-6], rel=1e-4)


def test_an_official_update_has_each_modules_own_rate():
    settings = OfficialAdamW(learning_rate=0.1, warmup=2, final=0.2, weight_decay=0.5, epsilon=0.0)
    params: Any = like(2.0)
    optimizer = optim.optimizer(settings, 10, AXES, {"b": 0.4})
    update: Any = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for done in range(4):
        # every normalised update of equal gradients is 1, and decay of the kernels is half of them
        updates, state = update(like(3.0), state, params)
        for module, factor in (("a", 1.0), ("b", 0.4)):
            rate = float(optim.schedule(settings, 10, factor)(done))
            expected = -rate * (1 + 0.5 * params[module]["kernel"])
            np.testing.assert_allclose(updates[module]["kernel"], expected, rtol=1e-4)
        params = jax.tree.map(jnp.add, params, updates)
    first = [float(optim.schedule(settings, 10, factor)(0)) for factor in (1.0, 0.4)]
    assert first == pytest.approx([0.02, 0.02])  # both begin at the floor


def test_ours_and_the_official_rates_meet_at_the_peak_and_at_the_end():
    official = OfficialAdamW(learning_rate=1.0, warmup=4, final=0.1)
    ours = AdamW(learning_rate=1.0, warmup=4, final=0.1)
    late, now = optim.schedule(official, 12), optim.schedule(ours, 12)
    assert float(late(5)) == float(now(3)) == 1.0
    assert float(late(13)) == pytest.approx(float(now(11))) == pytest.approx(0.1)
    unbroken, broken = late, optim.schedule(replace(official, sawtooth=12), 12)
    assert float(broken(1)) == float(unbroken(1)) and float(broken(2)) == float(unbroken(2))


def test_clipping_bounds_the_norm_over_all_modules_together():
    optimizer = optim.optimizer(AdamW(clip=1.0, beta1=0.0, warmup=0), 10, AXES, {})
    _, moments = optimizer.update(like(10.0), optimizer.init(like(0.0)), like(0.0))
    mu = optax.tree.get(moments, "mu")
    assert float(optax.tree.norm(mu)) == pytest.approx(1.0, rel=1e-5)
