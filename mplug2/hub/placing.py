"""Arrays of a mapped file onto devices: each device is given its own slice, and each process reads its own
devices' slices only. An accelerator is given the type that is stored and widens it itself: its host holds no
copy.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2.sharding import sharding


def place(arrays: Mapping[str, np.ndarray], shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays by name -> float32 arrays where `shardings` say. On a CPU device, float32 ones that stand at a
    multiple of 64 bytes are the given memory itself. While they are widened, an accelerator holds the narrow
    ones beside them: one program for all is compiled once."""
    placed = {name: _sliced(array, shardings[name]) for name, array in arrays.items()}
    narrow = {name: array for name, array in placed.items() if array.dtype != jnp.float32}
    if not narrow:
        return placed
    wide = jax.jit(_widened, out_shardings={name: shardings[name] for name in narrow})(narrow)
    return placed | wide


def _sliced(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    on_host = lie_on_host(where)

    def own(index: Any) -> np.ndarray:
        # Where the device's memory is the host's, to widen on the way needs no program.
        return array[index].astype(np.float32, copy=False) if on_host else array[index]

    return jax.make_array_from_callback(
        array.shape, where, own, dtype=jnp.float32 if on_host else array.dtype
    )


def lie_on_host(where: jax.sharding.Sharding) -> bool:
    """Whether the memory of those devices is the host's own."""
    return all(device.platform == "cpu" for device in where.device_set)


def _widened(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: array.astype(jnp.float32) for name, array in arrays.items()}


def on_first_device(names: Iterable[str]) -> dict[str, jax.sharding.Sharding]:
    """This process's first device, for each of the names."""
    return dict.fromkeys(names, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def on_mesh(
    mesh: jax.sharding.Mesh, axes: Mapping[str, Any], arrays: Mapping[str, Any]
) -> dict[str, jax.sharding.Sharding]:
    """Where the arrays of a module lie, by their logical axes. A mesh of one device is that device, as in
    training."""
    if mesh.size == 1:
        return dict.fromkeys(arrays, jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
    return {name: sharding(mesh, axes[name], array.shape) for name, array in arrays.items()}
