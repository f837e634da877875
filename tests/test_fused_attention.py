"""Fused attention is our own, written-out one: values and gradients, with every kind of mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2.modules.functions import attention, fused_attention

MASKS = {
    "none": None,
    "causal": jnp.tril(jnp.ones((6, 6), bool)),
    "padding": (jnp.arange(6) < jnp.array([[4], [6]]))[:, None, None, :],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 4, 3, 6, 8)], ids=["tokens", "frames"])
def test_xlas_attention_and_its_gradients_are_ours(mask, shape):
    if mask is not None and len(shape) == 5:
        mask = mask if mask.ndim == 2 else mask[:, None]
    inputs = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4)]
    *parts, weights = inputs
    written: Any = attention
    by_xla: Any = fused_attention

    def ours(*parts):
        return (written(*parts, mask, None, 0.0) * weights).sum()

    def fused(*parts):
        return (by_xla(*parts, mask, "xla") * weights).sum()

    one = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*parts)
    other = jax.jit(jax.value_and_grad(fused, argnums=(0, 1, 2)))(*parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)
