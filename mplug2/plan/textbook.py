"""What a training step must keep and send on a mesh, on paper: nothing is compiled, no device is needed.

The amounts are those of the textbook schemes, for any recipe, read off the jaxpr of its loss:

- `fsdp` (ZeRO-3, arXiv:1910.02054): a part's parameters are gathered once forward and once backward, in the
  type that they are multiplied in, and its gradients are summed into their shares, in float32;
- `data`, and `sequence`, which shares tokens: gradients are summed, once a step;
- `tensor` (Megatron-LM, arXiv:1909.08053): the outputs of products over a spread axis are summed forward,
  the gradients of what goes into products onto a spread axis backward;
- `sequence` also gathers the keys and values of attention, and sums their gradients.

Not counted: numbers a device has few of (losses, norms of gradients, the features of contrastive losses).
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from mplug2 import accumulation, sharding
from mplug2.composition import abstract_batch
from mplug2.errors import RecipeError
from mplug2.flops import executed_flops, step_flops
from mplug2.network import Network
from mplug2.recipe import Recipe
from mplug2.step import Trainer, check_mesh

GATHERS = 2
"""How often a step needs a parameter that lies in parts: forward and backward."""

MOMENTS = 2
"""What AdamW keeps beside a parameter."""

Traffic = dict[tuple[str, str], float]
"""Bytes that a device sends, by (kind of collective, mesh axes joined by `+`)."""


@dataclass(frozen=True)
class Product:
    """Bytes that a spread product has summed: of a part of the batch, over all its examples. `axis`: the
    logical axis that is spread; `size`: its length; `forward`: outputs are summed, else inputs' gradients."""

    axis: str
    size: int
    forward: bool
    bytes: float


@dataclass(frozen=True)
class Work:
    """What a recipe's step is, whatever the mesh: FLOPs of the model, and of the step with what `remat`
    computes again; bytes that a part of the batch leaves for the backward pass, `kept` on the devices and
    `hosted` in their hosts' memory; `keys`: bytes of all keys and values that queries of other devices look
    at."""

    model_flops: float
    flops: float
    kept: float
    hosted: float
    products: tuple[Product, ...]
    keys: float

    def times(self, factor: float) -> "Work":
        """That of so many times as large batches."""
        products = tuple(replace(it, bytes=factor * it.bytes) for it in self.products)
        flops, model = factor * self.flops, factor * self.model_flops
        kept, hosted = factor * self.kept, factor * self.hosted
        return Work(model, flops, kept, hosted, products, factor * self.keys)


@dataclass(frozen=True)
class Paper:
    """Bytes of one device by what they are, and what it sends in a step."""

    memory: dict[str, int]
    traffic: Traffic


def batches(recipe: Recipe) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shapes and types of the batches of a step, as the stream gives them: clips are uint8."""
    shapes = {}
    for name, feed in recipe.feeds.items():
        fields = abstract_batch(feed)
        fields.pop("index", None)
        if "clips" in fields:
            fields["clips"] = jax.ShapeDtypeStruct(fields["clips"].shape, jnp.uint8)
        shapes[name] = fields
    return shapes


def abstract(mesh: sharding.Mesh) -> AbstractMesh:
    """The mesh without devices."""
    sizes = asdict(mesh)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def study(recipe: Recipe) -> Work:
    """Traces the recipe's loss, for as long as a few seconds at large sizes."""
    # Of fused attention a jaxpr shows no products: what it computes is the same as ours.
    execution = replace(recipe.execution, attention="written")
    alone = replace(recipe, mesh=sharding.Mesh(), execution=execution)
    trainer = Trainer(alone, Network(alone.parts, alone.execution))
    whole = batches(alone)
    part = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0] // recipe.accumulate, *leaf.shape[1:]), leaf.dtype),
        whole,
    )
    shapes = trainer.network.shapes
    params = {name: shapes[name] for name in trainer.names}
    frozen = {name: tree for name, tree in shapes.items() if name not in params}

    def loss(params: Any, frozen: Any, part: Any) -> Any:
        if recipe.accumulate == 1:
            return trainer.loss(params, frozen, part, None)[0]
        with accumulation.part_of(recipe.accumulate):
            return trainer.loss(params, frozen, part, None)[0]

    axes = [{name: trainer.network.axes[name] for name in tree} for tree in (params, frozen)]
    names = jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    reader = _Reader()
    jaxpr = jax.make_jaxpr(loss)(params, frozen, part).jaxpr
    reader.read(jaxpr, [*names, *[None] * (len(jaxpr.invars) - len(names))], 1)
    kept, hosted = _kept(loss, params, frozen, part)
    return Work(
        model_flops=step_flops(alone, whole),
        flops=executed_flops(alone, whole),
        kept=kept,
        hosted=hosted,
        products=tuple(reader.products.values()),
        keys=reader.keys,
    )


def on_paper(recipe: Recipe, work: Work, network: Network) -> Paper:
    """The bytes of the recipe's mesh. Raises RecipeError where the mesh does not suit the batch or heads."""
    mesh = abstract(recipe.mesh)
    check_mesh(recipe, mesh)
    shares = sharding.batch_shares(mesh) * mesh.shape["sequence"]
    parameters, frozen = 0, 0
    traffic: Traffic = defaultdict(float)
    for name, shapes in network.shapes.items():
        spread = sharding.shardings(mesh, network.axes[name], shapes)
        for leaf, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(spread), strict=True):
            stored = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            _store(recipe, mesh, leaf, place.spec, stored, recipe.trains(name), traffic)
            if recipe.trains(name):
                parameters += stored
            else:
                frozen += stored
    _share(recipe, work, mesh, shares, traffic)
    memory = {
        "parameters": parameters,
        "optimizer": MOMENTS * parameters,
        "average": parameters if recipe.ema else 0,
        "frozen": frozen,
        "gradients": parameters,
        "activations": round(work.kept / shares),
    }
    return Paper(memory, {key: sent for key, sent in traffic.items() if sent})


def state_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes on a device of what a step is given, by what it is."""
    state = trainer.abstract
    parts = {
        "parameters": state["params"],
        "optimizer": state["moments"],
        "average": state.get("ema", {}),
        "frozen": trainer.abstract_frozen,
        "batch": trainer.abstract_batches(batches(trainer.recipe)),
    }
    return {name: sum(map(_device_bytes, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Of an array, those on one of its devices."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def _store(
    recipe: Recipe,
    mesh: AbstractMesh,
    leaf: jax.ShapeDtypeStruct,
    spec: PartitionSpec,
    stored: int,
    trained: bool,
    traffic: Traffic,
) -> None:
    """Gathers a parameter of which a device has `stored` bytes, and sums its gradient."""
    parts = mesh.shape["fsdp"]
    in_parts = any("fsdp" in ((names,) if isinstance(names, str) else names or ()) for names in spec)
    if in_parts:
        narrow = jnp.dtype(recipe.execution.dtype).itemsize if leaf.ndim > 1 else leaf.dtype.itemsize
        gathered = stored * narrow / leaf.dtype.itemsize * (parts - 1)
        traffic["all-gather", "fsdp"] += recipe.accumulate * GATHERS * gathered
    if trained and in_parts:
        traffic["reduce-scatter", "fsdp"] += recipe.accumulate * stored * (parts - 1)
    if trained:
        axes = ("data", "sequence") if in_parts else ("data", "fsdp", "sequence")
        among = [axis for axis in axes if mesh.shape[axis] > 1]
        devices = math.prod(mesh.shape[axis] for axis in among)
        traffic["all-reduce", "+".join(among)] += 2 * stored * (devices - 1) / devices


def _share(recipe: Recipe, work: Work, mesh: AbstractMesh, shares: int, traffic: Traffic) -> None:
    """Sums of spread products, and keys and values for other devices' queries."""
    again = 2 if recipe.execution.remat == "full" else 1
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    for product in work.products:
        if "tensor" in sharding.RULES[product.axis] and product.size % tensor == 0:
            runs = recipe.accumulate * (again if product.forward else 1)
            traffic["all-reduce", "tensor"] += 2 * runs * product.bytes / shares * (tensor - 1) / tensor
    keys = recipe.accumulate * work.keys / shares / tensor * (sequence - 1)
    traffic["all-gather", "sequence"] += again * keys
    traffic["reduce-scatter", "sequence"] += keys


def scaled(recipe: Recipe, chips: int) -> Recipe:
    """The recipe on `chips` devices, with as many examples a device: `tensor` and `sequence` stay, `fsdp` is
    as large as it was where there are so many, `data` takes the rest. Raises RecipeError where they do not
    divide."""
    mesh, before = recipe.mesh, math.prod(asdict(recipe.mesh).values())
    rest, over = divmod(chips, mesh.tensor * mesh.sequence)
    fsdp = min(mesh.fsdp, rest)
    if over or rest % max(fsdp, 1):
        raise RecipeError(f"{chips} devices do not divide by the mesh's {asdict(mesh)}")
    grown = replace(mesh, data=rest // fsdp, fsdp=fsdp)
    return replace(with_batches(recipe, chips / before), mesh=grown)


def with_batches(recipe: Recipe, times: float) -> Recipe:
    """The recipe with every objective's batch so many times as large. Raises RecipeError where that is not
    whole."""
    grown = {}
    for name, objective in recipe.objectives.items():
        batch = objective.batch * times
        if batch != int(batch) or batch < 1:
            raise RecipeError(f"objective {name}: {times:g} times a batch of {objective.batch} is not whole")
        grown[name] = replace(objective, batch=int(batch))
    return replace(recipe, objectives=grown)


# ------------------------------------------------------------------------------------------------------------
# Read off the jaxpr


def _kept(loss: Any, *given: Any) -> tuple[float, float]:
    """Bytes that the forward pass leaves for the backward pass, beside what it was given: (on devices, in
    their hosts' memory)."""

    def residuals(params: Any, *others: Any) -> Any:
        return jax.tree.leaves(jax.vjp(lambda params: loss(params, *others), params)[1])

    jaxpr = jax.make_jaxpr(residuals)(*given).jaxpr
    inputs, sizes = set(jaxpr.invars), {True: 0.0, False: 0.0}
    for out in set(it for it in jaxpr.outvars if not isinstance(it, Literal)) - inputs:
        sizes[out.aval.memory_space == jax.memory.Space.Host] += out.aval.size * out.aval.dtype.itemsize
    return sizes[False], sizes[True]


@dataclass(frozen=True)
class _Known:
    """Of a variable: `token` is the same for an array and its casts; `axes`: logical ones, of a parameter."""

    token: object
    axes: tuple[str | None, ...] | None = None


_SAME = frozenset(
    "convert_element_type copy sharding_constraint slice dynamic_slice split stop_gradient".split()
)
"""What leaves an array's axes as they are."""


class _Reader:
    """Follows parameters through a forward pass to the products that they are factors of."""

    def __init__(self):
        self.products: dict[object, Product] = {}
        self.keys = 0.0

    def read(self, jaxpr: Any, given: list[Any], times: int) -> list[_Known]:
        """`given`: what is known of the inputs, or the axes of a parameter, or None -> of the outputs."""
        known: dict[Any, _Known] = {}
        for variable, it in zip(jaxpr.invars, given, strict=True):
            known[variable] = it if isinstance(it, _Known) else _Known(object(), it)

        def of(variable: Any) -> _Known:
            if isinstance(variable, Literal):
                return _Known(object())
            return known.setdefault(variable, _Known(object()))

        for equation in jaxpr.eqns:
            inputs = [of(variable) for variable in equation.invars]
            for variable, it in zip(equation.outvars, self._outputs(equation, inputs, times), strict=True):
                known[variable] = it
        return [of(variable) for variable in jaxpr.outvars]

    def _outputs(self, equation: Any, inputs: list[_Known], times: int) -> list[_Known]:
        kind, params = equation.primitive.name, equation.params
        fresh = [_Known(object()) for _ in equation.outvars]
        if kind == "scan":
            body = params["jaxpr"].jaxpr
            # What a loop goes over has an axis less inside. (How a scan names its parts is JAX's own affair.)
            inner = [
                _Known(object(), it.axes and it.axes[1:]) if own.aval.ndim < whole.aval.ndim else it
                for it, whole, own in zip(inputs, equation.invars, body.invars, strict=True)
            ]
            self.read(body, inner, times * params["length"])
            return fresh
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if name in params and len(inner := getattr(params[name], "jaxpr", params[name]).invars) == len(
                inputs
            ):
                return self.read(getattr(params[name], "jaxpr", params[name]), inputs, times)
        if kind == "dot_general":
            self._product(equation, inputs, times)
        elif kind == "gather" and (inputs[0].axes or (None,))[0] == "vocab":
            self._note(
                object(), "vocab", equation.invars[0].aval.shape[0], equation.outvars[0].aval, True, times
            )
        elif kind in _SAME or (kind == "reshape" and _rank(equation.invars[0]) == _rank(equation.outvars[0])):
            return [inputs[0]] * len(fresh)
        elif kind in ("transpose", "squeeze") and inputs[0].axes:
            axes = inputs[0].axes
            left = [axis for place, axis in enumerate(axes) if place not in params.get("dimensions", ())]
            return [
                _Known(
                    object(),
                    tuple(axes[i] for i in params["permutation"]) if kind == "transpose" else tuple(left),
                )
            ]
        return fresh

    def _product(self, equation: Any, inputs: list[_Known], times: int) -> None:
        (left, right), (heads, _) = equation.params["dimension_numbers"]
        x, factor = (variable.aval for variable in equation.invars)
        axes, out = inputs[1].axes, equation.outvars[0].aval
        if axes is not None and len(axes) == 2 and len(right) == 1:
            inner, outer = right[0], 1 - right[0]
            summed = jax.ShapeDtypeStruct(out.shape, x.dtype)
            self._note(object(), axes[inner], factor.shape[inner], summed, True, times)
            self._note((inputs[0].token, axes[outer]), axes[outer], factor.shape[outer], x, False, times)
        elif len(heads) == 2 and left == right == (3,) and x.shape[2] >= factor.shape[2]:
            self.keys += times * 2 * factor.size * factor.dtype.itemsize

    def _note(
        self, token: object, axis: str | None, size: int, summed: Any, forward: bool, times: int
    ) -> None:
        total = float(times * summed.size * summed.dtype.itemsize)
        self.products[token] = Product(axis or "norm", size, forward, total)


def _rank(variable: Any) -> int:
    return variable.aval.ndim
