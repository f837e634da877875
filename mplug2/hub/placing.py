"""Arrays of a mapped file onto devices: each device is given its own slice, in the type that is stored, and
widened there. The host holds no copy, and of a sharded array each process reads its own devices' slices only.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2.sharding import sharding


def place(arrays: Mapping[str, np.ndarray], shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays by name -> float32 arrays where `shardings` say. On a CPU device, float32 ones that stand at a
    multiple of 64 bytes are the mapped file itself."""
    return {name: _place(array, shardings[name]) for name, array in arrays.items()}


def _place(array: np.ndarray, where: Any) -> jax.Array:
    placed = jax.make_array_from_callback(array.shape, where, lambda index: array[index])
    if placed.dtype == jnp.float32:
        return placed
    return jax.jit(lambda narrow: narrow.astype(jnp.float32), out_shardings=where)(placed)


def on_mesh(
    mesh: jax.sharding.Mesh, axes: Mapping[str, Any], shapes: Mapping[str, Any]
) -> dict[str, jax.sharding.NamedSharding]:
    """Where the arrays of a module lie, from their logical axes and shapes by name."""
    return {name: sharding(mesh, axes[name], shape.shape) for name, shape in shapes.items()}
