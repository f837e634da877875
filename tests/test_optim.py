from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mplug2 import modules, optim
from mplug2.modules import heads
from mplug2.network import Network, flat
from mplug2.recipe import AdamW

CONFIGS = {
    name: modules.sizes(name)["tiny"]()
    for name in ("vision", "temporal", "text", "universal", "fusion", "decoder", "connector")
} | {
    "contrastive": heads.contrastive(32, 16),
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
            weights = last in ("kernel", "words") or name in ("stem.first", "stem.second")
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


def test_clipping_bounds_the_norm_over_all_modules_together():
    optimizer = optim.optimizer(AdamW(clip=1.0, beta1=0.0, warmup=0), 10, AXES, {})
    _, moments = optimizer.update(like(10.0), optimizer.init(like(0.0)), like(0.0))
    mu = optax.tree.get(moments, "mu")
    assert float(optax.tree.norm(mu)) == pytest.approx(1.0, rel=1e-5)
