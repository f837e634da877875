"""What is written out by hand equals what XLA derives from the plain formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import assert_equal, in_float64, widened

from mplug2.modules.functions import attention, convolve, dense
from mplug2.roles import sum_dtype

B, K, N, M, D = 2, 3, 5, 7, 4
CAUSAL = np.tril(np.ones((N, M), bool))
PADDED = np.arange(M)[None, None, None] < np.array([M, 3])[:, None, None, None]
NOWHERE = np.stack([np.ones((N, M), bool), np.arange(N)[:, None] * np.ones(M) > 1])[:, None]


@pytest.fixture(autouse=True)
def exactly():
    with in_float64():
        yield


def plain(query, keys, values, mask, kept, rate):
    scores = jnp.einsum("bknd,bkmd->bknm", query, keys).astype(sum_dtype(query)) * D**-0.5
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, -1)
    if kept is not None:
        weights = jnp.where(kept, weights / (1 - rate), 0)
    return jnp.einsum("bknm,bkmd->bknd", weights.astype(values.dtype), values)


def differentiated(function: Any, *given: Any) -> Any:
    return jax.vjp(function, *given)


def arrays(dtype=jnp.float64):
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
    assert_equal((found, back(gradient)), (expected, expected_back(gradient)))


def test_attention_in_sixteen_bits_is_near_that_in_sixty_four():
    (query, keys, values, gradient), _ = arrays(jnp.bfloat16)
    exact = [array.astype(jnp.float64) for array in (query, keys, values)]
    found, back = differentiated(lambda q, k, v: attention(q, k, v, CAUSAL, None, 0.0), query, keys, values)
    expected, expected_back = differentiated(lambda q, k, v: plain(q, k, v, CAUSAL, None, 0.0), *exact)
    assert found.dtype == jnp.bfloat16
    # Weights, what is mixed, and gradients of each are rounded: eight times at most, by a part in 512.
    pairs = (found, back(gradient)), (expected, expected_back(gradient.astype(jnp.float64)))
    assert_equal(*widened(pairs), rtol=8 * 2.0**-9)


def test_a_product_and_its_gradients_are_those_of_the_formula():
    x, kernel = jax.random.normal(jax.random.key(1), (B, N, D)), jax.random.normal(jax.random.key(2), (D, M))
    gradient = jax.random.normal(jax.random.key(3), (B, N, M))
    found, back = differentiated(dense, x, kernel)
    expected, expected_back = differentiated(jnp.matmul, x, kernel)
    assert_equal((found, back(gradient)), (expected, expected_back(gradient)))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_are_those_of_the_formula(stride):
    keys = jax.random.split(jax.random.key(4), 3)
    x, kernel = jax.random.normal(keys[0], (B, 6, 4, N)), jax.random.normal(keys[1], (3, 3, N, D))
    gradient = jax.random.normal(keys[2], (B, 6 // stride, 4 // stride, D))

    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=layout)

    found, back = differentiated(lambda x, kernel: convolve(x, kernel, stride), x, kernel)
    expected, expected_back = differentiated(plain, x, kernel)
    np.testing.assert_array_equal(found, expected)
    for one, other in zip(back(gradient), expected_back(gradient), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_of_pixels_no_gradient_is_computed():
    x, kernel = jnp.ones((B, 6, 4, 3)), jnp.ones((3, 3, 3, D))
    program = jax.make_jaxpr(jax.grad(lambda kernel: jnp.sum(convolve(x, kernel, 2))))(kernel)
    assert str(program).count("conv_general_dilated[") == 2  # forward and the kernel's
