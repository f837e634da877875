"""Devices, in one place: the mesh that a recipe states and the table from logical axes to mesh axes.

Imports nothing of ours but roles. Layers name logical axes; only this file knows devices.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mplug2.errors import RecipeError

BATCH = ("data", "fsdp")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,
    "layers": None,
    None: None,
}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices lie along each axis."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def build(self, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
        """The mesh over the first of `devices` (default: those that JAX sees). Raises RecipeError where they
        are too few."""
        sizes = asdict(self)
        if min(sizes.values()) < 1:
            raise RecipeError(f"mesh {sizes}: an axis has at least 1 device")
        devices = jax.devices() if devices is None else devices
        needed, there = math.prod(sizes.values()), len(devices)
        if needed > there:
            raise RecipeError(f"mesh {sizes} needs {needed} devices, there are {there}")
        # A mesh axis may lie along parts of several axes of a pod's torus, which `jax.make_mesh` refuses.
        placed = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices[:needed], allow_split_physical_axes=True
        )
        return jax.sharding.Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def sharding(mesh: jax.sharding.Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Where an array lies: a dimension that its mesh axis does not divide is kept whole on every device."""

    def place(axis: str | None, size: int) -> str | tuple[str, ...] | None:
        rule = RULES[axis]
        names = (rule,) if isinstance(rule, str) else rule or ()
        return rule if size % math.prod(mesh.shape[name] for name in names) == 0 else None

    return NamedSharding(
        mesh, PartitionSpec(*(place(axis, size) for axis, size in zip(axes, shape, strict=True)))
    )


def shardings(mesh: jax.sharding.Mesh, axes: Any, shapes: Any) -> Any:
    """`sharding` over a tree of axis tuples and the equal tree of shapes."""
    return jax.tree.map(lambda leaf, names: sharding(mesh, names, leaf.shape), shapes, axes)


def batch_shares(mesh: jax.sharding.Mesh) -> int:
    """Into how many equal parts a batch is spread."""
    return math.prod(mesh.shape[name] for name in BATCH)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples are spread over data and fsdp alike."""
    return NamedSharding(mesh, PartitionSpec(BATCH))
