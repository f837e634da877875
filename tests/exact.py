"""Equality of mathematics is tested in float64, where another order of sums changes the last of 16 digits and
a fault the first ones: inside `in_float64()`, with a network run by FLOAT64 on what `widened` gives."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2.roles import Execution

RTOL = 1e-10
"""Of a loss or a gradient, relative to the largest of its array: thousands of sums of float64's 1.1e-16, with
room for those that cancel."""

IN_FLOAT32 = 100 * 2.0**-24
"""The same where a library computes a part in float32: a hundred of its roundings, half of the last bit each,
of sums over tens of numbers, that may all go one way."""

_DTYPE: Any = "float64"  # not one of a recipe's: a run is float32 or bfloat16
FLOAT64 = Execution(dtype=_DTYPE)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """In which JAX has float64, in every thread."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def widened(tree: Any) -> Any:
    """Arrays, or shapes and types, with every float in float64."""

    def wide(leaf: Any) -> Any:
        dtype = np.dtype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding)
        return np.asarray(leaf, dtype)

    return jax.tree.map(wide, tree)


def assert_equal(found: Any, expected: Any, rtol: float = RTOL) -> None:
    """Arrays of equal trees, each within `rtol` of its largest number. One that is 0 by the maths (the
    gradient of a key's bias) is rounding: within `rtol` of a thousandth of the largest of all."""
    named, others = jax.tree.leaves_with_path(expected), jax.tree.leaves(found)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    largest = max(np.abs(leaf).max() for _, leaf in named)
    for (path, leaf), other in zip(named, others, strict=True):
        bound = rtol * max(np.abs(leaf).max(), 1e-3 * largest)
        np.testing.assert_allclose(other, leaf, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))
