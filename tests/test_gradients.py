"""In bfloat16, what parameters get from many tokens or examples is summed in float32: by value, and read off
the programs of one device and of a mesh."""

import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fresh import compiled

from mplug2 import tasks
from mplug2.modules import heads, temporal, universal, vision
from mplug2.modules.functions import add, repeated, scale
from mplug2.modules.layers import Linear, Norm
from mplug2.modules.prompt import Prompt
from mplug2.network import Network, flat
from mplug2.recipe import Objective, Recipe
from mplug2.recipes import world
from mplug2.roles import Array, Execution
from mplug2.sharding import Mesh
from mplug2.step import Trainer

# -----------------------------------------------------------------------------------------------------------
# What they get from 32,896 tokens

VIDEOS, FRAMES, PLACES, WIDTH = 16, 8, 257, 4


def drawn(*shape: int) -> np.ndarray:
    """Numbers that lean to one side, as gradients do: it is beside a large sum that bfloat16 loses what comes
    to it."""
    return np.random.default_rng(0).normal(0.3, 1, shape).astype(jnp.bfloat16)


SPREAD: dict[str, tuple[tuple[int, ...], Callable[[Array, Array], Array]]] = {
    "a bias": ((WIDTH,), lambda parameter, x: add(x, parameter)),
    "positions": ((PLACES, WIDTH), lambda parameter, x: add(x, parameter)),
    "a class token": ((WIDTH,), lambda parameter, x: repeated(parameter, x.shape, x.dtype)),
    "latents": ((1, WIDTH), lambda parameter, x: repeated(parameter, x.shape, x.dtype)),
    "a depthwise kernel": ((WIDTH,), lambda parameter, x: scale(x, parameter)),
}


@pytest.mark.parametrize("shape, apply", SPREAD.values(), ids=SPREAD.keys())
def test_what_is_spread_over_tokens_gets_their_exact_sum(shape, apply):
    x, weights = 2 + drawn(VIDEOS, FRAMES, PLACES, WIDTH), drawn(VIDEOS, FRAMES, PLACES, WIDTH)
    _, back = jax.vjp(lambda parameter: apply(parameter, jnp.asarray(x)), jnp.ones(shape))
    each = weights.astype(np.float64) * (
        x.astype(np.float64) if apply is SPREAD["a depthwise kernel"][1] else 1
    )
    lead = each.reshape(-1, *(shape if math.prod(shape) > WIDTH else (WIDTH,)))
    (found,) = back(jnp.asarray(weights))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, lead.sum(0).reshape(shape), rtol=1e-4)


LAYERS: dict[str, tuple[Callable[[nnx.Rngs], Any], tuple[int, ...]]] = {
    "linear": (
        lambda rngs: Linear(WIDTH, WIDTH, axes=("embed", "mlp"), rngs=rngs),
        (VIDEOS, FRAMES * PLACES, WIDTH),
    ),
    "norm": (lambda rngs: Norm(WIDTH, epsilon=1e-5, rngs=rngs), (VIDEOS, FRAMES * PLACES, WIDTH)),
    "temporal": (
        lambda rngs: temporal.LocalTemporal(WIDTH, rngs=rngs),
        (VIDEOS, FRAMES, PLACES, WIDTH),
    ),
    "convolution": (lambda rngs: vision.Convolution(3, WIDTH, stride=2, rngs=rngs), (32, 64, 64, 3)),
}


@pytest.mark.parametrize("build, shape", LAYERS.values(), ids=LAYERS.keys())
def test_gradients_of_32896_tokens_are_within_2_percent_of_float32(build, shape):
    random = np.random.default_rng(0)
    graph, state = nnx.split(build(nnx.Rngs(0)))
    state = jax.tree.map(lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape, np.float32), state)
    x, weights = jnp.asarray(drawn(*shape)), jnp.asarray(drawn(WIDTH))

    def total(state: Any, x: Array) -> Array:
        out = nnx.merge(graph, state)(x).astype(jnp.float32)
        return (jnp.square(out) * weights).sum()

    step = compiled(jax.grad(total))
    rough, exact = (flat(nnx.to_pure_dict(step(state, x.astype(dtype)))) for dtype in ("bfloat16", "float32"))
    for name, gradient in exact.items():
        assert np.linalg.norm(rough[name] - gradient) < 0.02 * np.linalg.norm(gradient), name
