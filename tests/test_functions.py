"""What is written out by hand equals what XLA derives from the plain formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2.modules.functions import attention, dense

B, K, N, M, D = 2, 3, 5, 7, 4
CAUSAL = np.tril(np.ones((N, M), bool))
PADDED = np.arange(M)[None, None, None] < np.array([M, 3])[:, None, None, None]
NOWHERE = np.stack([np.ones((N, M), bool), np.arange(N)[:, None] * np.ones(M) > 1])[:, None]


def plain(query, keys, values, mask, kept, rate):
    scores = jnp.einsum("bknd,bkmd->bknm", query, keys).astype(jnp.float32) * D**-0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, -1)
    if kept is not None:
        weights = jnp.where(kept, weights / (1 - rate), 0)
    return jnp.einsum("bknm,bkmd->bknd", weights.astype(values.dtype), values)


def differentiated(function: Any, *given: Any) -> Any:
    return jax.vjp(function, *given)


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(B, K, N, D), (B, K, M, D), (B, K, M, D), (B, K, N, D)]
    drawn = [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=False)]
    return drawn, jax.random.bernoulli(keys[4], 0.7, (B, K, N, M))


@pytest.mark.parametrize(
    "mask", [None, CAUSAL, PADDED, NOWHERE], ids=["no mask", "causal", "padded", "nowhere"]
)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_and_its_gradients_are_those_of_the_formula(mask, rate):
    (query, keys, values, gradient), kept = arrays()
    kept = kept if rate else None
    found, back = differentiated(lambda q, k, v: attention(q, k, v, mask, kept, rate), query, keys, values)
    expected, expected_back = differentiated(
        lambda q, k, v: plain(q, k, v, mask, kept, rate), query, keys, values
    )
    np.testing.assert_allclose(found, expected, atol=2e-6)
    for one, other in zip(back(gradient), expected_back(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-6)


def test_attention_in_sixteen_bits_is_near_that_in_thirty_two():
    (query, keys, values, gradient), _ = arrays(jnp.bfloat16)
    exact = [array.astype(jnp.float32) for array in (query, keys, values)]
    found, back = differentiated(lambda q, k, v: attention(q, k, v, CAUSAL, None, 0.0), query, keys, values)
    expected, expected_back = differentiated(lambda q, k, v: plain(q, k, v, CAUSAL, None, 0.0), *exact)
    assert found.dtype == jnp.bfloat16
    pairs = zip(
        (found, *back(gradient)), (expected, *expected_back(gradient.astype(jnp.float32))), strict=True
    )
    for one, other in pairs:
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05)


def test_a_product_and_its_gradients_are_those_of_the_formula():
    x, kernel = jax.random.normal(jax.random.key(1), (B, N, D)), jax.random.normal(jax.random.key(2), (D, M))
    gradient = jax.random.normal(jax.random.key(3), (B, N, M))
    found, back = differentiated(dense, x, kernel)
    expected, expected_back = differentiated(jnp.matmul, x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for one, other in zip(back(gradient), expected_back(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
