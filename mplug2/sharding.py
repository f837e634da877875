"""Devices, in one place: the mesh that a recipe states and the table from logical axes to mesh axes.

Layers name logical axes; only this file knows devices. Parameters, and what is kept beside them (moments,
averages), lie by `sharding`: a dimension that its mesh axes do not divide is whole on every device, but a
vocabulary, whose table then lies by columns. Activations follow `constrain`, within a step that was entered
by `on`; the compiler pads what is of another length (4097 tokens, 30522 words). Off a mesh both are nothing.
"""

import contextlib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mplug2.errors import RecipeError, nearest

BATCH = ("data", "fsdp")

Axes = tuple[str | None, ...]

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": BATCH,
    "frames": ("sequence",),
    "tokens": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "layers": (),
    "places": (),
    None: (),
}
"""Of two dimensions that follow one mesh axis (frames and their tokens), the first that divides has it.
`places`: the rows of a table of learned tokens or places (positions, latents, prompts), which no product
sums over."""

PADDED = frozenset({"batch", "tokens", "vocab"})
"""Dimensions of activations that the compiler pads to what the devices can share."""

AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices lie along each axis. `data`: examples; `fsdp`: examples, and the parameters' storage;
    `sequence`: frames and tokens of an example; `tensor`: heads, hidden units and words. Neighbours are
    `tensor`, which talk the most."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """The devices that it needs."""
        return math.prod(asdict(self).values())

    def __str__(self) -> str:
        """`fsdp=64,tensor=4`."""
        return ",".join(f"{axis}={size}" for axis, size in asdict(self).items() if size != 1) or "data=1"

    def build(self, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
        """Of `devices` (default: all that there are). Raises RecipeError where they are too few."""
        sizes = asdict(self)
        if min(sizes.values()) < 1:
            raise RecipeError(f"mesh {self}: an axis has at least 1 device")
        devices = jax.devices() if devices is None else devices
        if self.size > len(devices):
            raise RecipeError(
                f"mesh {self} needs {self.size} devices, there are {len(devices)}: make it smaller, or start "
                "more processes (on a CPU JAX_NUM_CPU_DEVICES says for how many devices it stands)"
            )
        # A mesh axis may lie along parts of several axes of a pod's torus, which `jax.make_mesh` refuses.
        placed = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices[: self.size], allow_split_physical_axes=True
        )
        return jax.sharding.Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    def of_process(self) -> jax.sharding.Mesh:
        """For what each process computes by itself: of the devices that are its own, or of its first one
        where they are too few, or CPUs of several processes (in whose loops XLA orders no collectives:
        mplug2.step)."""
        devices = jax.local_devices()
        unordered = jax.process_count() > 1 and devices[0].platform == "cpu"
        return (self if self.size <= len(devices) and not unordered else Mesh()).build(devices)


def mesh_of(text: str) -> Mesh:
    """`fsdp=64,tensor=4` -> the mesh. Raises RecipeError for what is no axis or no count,
    and for an axis that is given twice."""
    sizes: dict[str, int] = {}
    axes = [field.name for field in fields(Mesh)]
    for word in text.split(","):
        axis, _, count = word.strip().partition("=")
        if axis not in axes:
            raise RecipeError(
                f'mesh "{text}": there is no axis "{axis}"; known are {", ".join(axes)}{nearest(axis, axes)}'
            )
        if not re.fullmatch(r"[1-9]\d*", count):
            raise RecipeError(f'mesh "{text}": {axis} is "{count}", expected a number of devices')
        if axis in sizes:
            raise RecipeError(f'mesh "{text}": {axis} is given twice, {sizes[axis]} and {count}')
        sizes[axis] = int(count)
    return Mesh(**sizes)


def idle(mesh: AnyMesh) -> str:
    """The sentence that says which devices a mesh leaves idle; empty where it leaves none."""
    there = jax.device_count()
    if mesh.size >= there:
        return ""
    said = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size != 1) or "data=1"
    idle = there - mesh.size
    return f"mesh {said} uses {mesh.size} of the {there} devices here, {idle} are idle (mesh.data=N)"


# ------------------------------------------------------------------------------------------------------------
# Where arrays lie between steps


def sharding(mesh: AnyMesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of those logical axes lies."""
    return NamedSharding(mesh, _stored(mesh, axes, shape))


def shardings(mesh: AnyMesh, axes: Any, shapes: Any) -> Any:
    """`sharding` over a tree of axis tuples and the equal tree of shapes."""
    return jax.tree.map(lambda leaf, names: sharding(mesh, names, leaf.shape), shapes, axes)


def _stored(mesh: AnyMesh, axes: Axes, shape: tuple[int, ...]) -> PartitionSpec:
    rules = [RULES[axis] for axis in axes]
    for place, axis in enumerate(axes):
        if axis == "vocab" and "embed" in axes and shape[place] % _count(mesh, rules[place]):
            columns = axes.index("embed")
            both = rules[columns] + rules[place]
            if shape[columns] % _count(mesh, both) == 0:
                rules[columns] = both
    return _spec(
        mesh, rules, [size % _count(mesh, rule) == 0 for rule, size in zip(rules, shape, strict=True)]
    )


def batch_shares(mesh: AnyMesh) -> int:
    """Into how many equal parts a batch is spread."""
    return _count(mesh, BATCH)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Examples are spread over data and fsdp alike."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_heads(mesh: AnyMesh, configs: Mapping[str, Any]) -> None:
    """Raises RecipeError for a module whose heads the tensor axis does not divide: no head is cut."""
    tensor = mesh.shape["tensor"]
    for name, config in configs.items():
        heads = getattr(config, "heads", tensor)
        if heads % tensor:
            fitting = [count for count in range(1, heads + 1) if heads % count == 0]
            below, above = heads // tensor * tensor, (heads // tensor + 1) * tensor
            raise RecipeError(
                f"mesh tensor={tensor}: the {heads} heads of {name} do not divide among {tensor} devices;"
                f" tensor may be {', '.join(map(str, fitting))}, or {name}.heads"
                f" {f'{below} or {above}' if below else above}"
            )


# ------------------------------------------------------------------------------------------------------------
# Where activations lie within a step


def on(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[Any]:
    """While a step is traced within it, `constrain` and `gathered` mean this mesh; one device is none."""
    if mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def here() -> jax.sharding.AbstractMesh | None:
    """The mesh that a step is traced on (`on`, or `jax.set_mesh`), if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, of which each dimension is spread as its logical axis says."""
    mesh = here()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _activation(mesh, axes, x.shape, PADDED))


def even(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """How `constrain` spreads an array whose parts are to be of one size: nothing is padded."""
    mesh = here()
    return PartitionSpec() if mesh is None else _activation(mesh, axes, shape, frozenset())


def shares(axis: str | None) -> int:
    """Among how many devices a dimension of that logical axis may be spread here; 1 off a mesh."""
    mesh = here()
    return 1 if mesh is None else _count(mesh, RULES[axis])


def _activation(mesh: AnyMesh, axes: Axes, shape: tuple[int, ...], padded: frozenset[str]) -> PartitionSpec:
    rules, fits, taken = [RULES[axis] for axis in axes], [], set()
    for axis, rule, size in zip(axes, rules, shape, strict=True):
        count = _count(mesh, rule)
        fit = (size >= count if axis in padded else size % count == 0) and taken.isdisjoint(rule)
        taken.update(rule if fit else ())
        fits.append(fit)
    return _spec(mesh, rules, fits)


def gathered(parameter: jax.Array, axes: Axes) -> jax.Array:
    """A parameter ready for use: whole over `fsdp`, where it lies in parts, and still spread over `tensor`.
    Its gradient is summed into the parts again."""
    return parameter if here() is None else _gathered(parameter, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(parameter: jax.Array, axes: Axes) -> jax.Array:
    used = (None if "fsdp" in RULES[axis] else axis for axis in axes)
    return constrain(parameter, *used)


def _gathered_forward(parameter: jax.Array, axes: Axes) -> tuple[jax.Array, None]:
    return _gathered(parameter, axes), None


def _gathered_backward(axes: Axes, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    mesh = here()
    assert mesh is not None
    return (jax.lax.with_sharding_constraint(gradient, _stored(mesh, axes, gradient.shape)),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _count(mesh: AnyMesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _spec(mesh: AnyMesh, rules: Sequence[tuple[str, ...]], fits: Sequence[bool]) -> PartitionSpec:
    names = [rule if fit else () for rule, fit in zip(rules, fits, strict=True)]
    return PartitionSpec(*(rule[0] if len(rule) == 1 else rule or None for rule in names))
