"""Deltas: what adapts a module that stays as it is. A delta is a module beside its base, a function of the
base's parameters: nested dict -> nested dict of those that the base then computes with.

Every form is `h + s * f(x)` around a part of the base (He et al., arXiv:2110.04366), said of parameters, so
the base's code knows of none, a merged delta costs nothing, and a fresh one changes nothing:

- `Lora` (arXiv:2106.09685): `f(x) = x A B` beside a product, thus `kernel + s A B`
- `BitFit` (arXiv:2106.10199): a constant `f`, thus `bias + d`
- `Bottleneck` (arXiv:1902.00751, parallel as in He et al.): `f(x) = act(x A + a) B` beside an MLP and with
  its activation, thus an MLP with more hidden units

Stacked layers have a delta each: their arrays keep the leading `layers` axis.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mplug2 import roles
from mplug2.errors import RecipeError, nearest
from mplug2.modules.layers import Initializer, normal, parameter, zeros
from mplug2.roles import Array, Execution

Path = tuple[str, ...]
Arrays = Mapping[Path, Array]


class Leaf(NamedTuple):
    """A parameter before it has values."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = zeros


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adds `alpha / rank * A B` to every matrix (word tables too) whose name fits one of `targets`
    (`fnmatch`, the names of files: `layers.layers.attention.query.kernel`). A `I rank` begins like a layer of
    its size, B `rank O` at zero."""

    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = ("*kernel",)

    def __post_init__(self):
        _positive(self, "rank")

    def delta(self, config: roles.Config) -> "Config":
        return Config(of=config, form=self)

    def merged(self, config: Any) -> Any:
        return config

    def begin(self, base: Mapping[Path, Leaf]) -> dict[Path, Leaf]:
        matrices = {path: leaf for path, leaf in base.items() if len(leaf.shape) - _stacked(leaf) == 2}
        begun: dict[Path, Leaf] = {}
        for path in _matching(self, matrices):
            (*stack, inputs, outputs), (*layers, read, written) = matrices[path][:2]
            down = Leaf((*stack, inputs, self.rank), (*layers, read, None), normal(inputs**-0.5))
            begun |= {
                (*path, "A"): down,
                (*path, "B"): Leaf((*stack, self.rank, outputs), (*layers, None, written)),
            }
        return begun

    def adapted(self, params: Arrays, delta: Arrays) -> dict[Path, Array]:
        return {
            path: params[path] + self.alpha / self.rank * _product(delta[*path, "A"], delta[*path, "B"])
            for path in {path[:-1]: None for path in delta}
        }

    @staticmethod
    def sum(parts: Sequence[tuple["Lora", Arrays, float]]) -> tuple["Lora", dict[Path, Array]]:
        """Exactly the sum, as one of the ranks' sum: A side by side, B one above the other."""
        rank = sum(form.rank for form, _, _ in parts)
        targets = tuple(dict.fromkeys(target for form, _, _ in parts for target in form.targets))
        summed: dict[Path, Array] = {}
        for path in {path[:-1]: None for _, delta, _ in parts for path in delta}:
            some = [part for part in parts if (*path, "A") in part[1]]
            down = jnp.concatenate([delta[*path, "A"] for _, delta, _ in some], -1)
            up = [share * form.alpha / form.rank * delta[*path, "B"] for form, delta, share in some]
            lacking = rank - down.shape[-1]  # of deltas that leave this matrix alone
            summed[*path, "A"] = _padded(down, -1, lacking)
            summed[*path, "B"] = _padded(jnp.concatenate(up, -2), -2, lacking)
        return Lora(rank=rank, alpha=float(rank), targets=targets), summed


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Adds a vector to every parameter whose name fits one of `targets`."""

    targets: tuple[str, ...] = ("*bias",)

    def delta(self, config: roles.Config) -> "Config":
        return Config(of=config, form=self)

    def merged(self, config: Any) -> Any:
        return config

    def begin(self, base: Mapping[Path, Leaf]) -> dict[Path, Leaf]:
        return {path: base[path]._replace(init=zeros) for path in _matching(self, base)}

    def adapted(self, params: Arrays, delta: Arrays) -> dict[Path, Array]:
        return {path: params[path] + change for path, change in delta.items()}

    @staticmethod
    def sum(parts: Sequence[tuple["BitFit", Arrays, float]]) -> tuple["BitFit", dict[Path, Array]]:
        summed: dict[Path, Array] = {}
        for _, delta, share in parts:
            for path, change in delta.items():
                summed[path] = summed.get(path, 0.0) + share * change
        targets = dict.fromkeys(target for form, _, _ in parts for target in form.targets)
        return BitFit(targets=tuple(targets)), summed


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """Gives every MLP whose name fits one of `targets` (`layers.layers.mlp`) `width` hidden units more, whose
    outputs count `scale` times."""

    width: int = 8
    scale: float = 1.0
    targets: tuple[str, ...] = ("*mlp",)

    def __post_init__(self):
        _positive(self, "width")

    def delta(self, config: roles.Config) -> "Config":
        return Config(of=config, form=self)

    def merged(self, config: Any) -> Any:
        if not hasattr(config, "hidden"):
            raise RecipeError(
                f"{type(config).__qualname__} has no hidden units to count: it takes no Bottleneck"
            )
        return dataclasses.replace(config, hidden=config.hidden + self.width)

    def begin(self, base: Mapping[Path, Leaf]) -> dict[Path, Leaf]:
        mlps = {path[:-2]: base[path] for path in base if path[-2:] == ("up", "kernel")}
        begun: dict[Path, Leaf] = {}
        for path in _matching(self, mlps):
            (*stack, inputs, _), (*layers, read, hidden) = mlps[path][:2]
            out = base[*path, "down", "kernel"]
            begun[*path, "up", "kernel"] = Leaf(
                (*stack, inputs, self.width), (*layers, read, hidden), normal(inputs**-0.5)
            )
            begun[*path, "up", "bias"] = Leaf((*stack, self.width), (*layers, hidden))
            begun[*path, "down", "kernel"] = Leaf((*stack, self.width, out.shape[-1]), out.axes)
        return begun

    def adapted(self, params: Arrays, delta: Arrays) -> dict[Path, Array]:
        return {
            path: jnp.concatenate([params[path], self._weighed(path, more)], _hidden_axis(path))
            for path, more in delta.items()
        }

    def _weighed(self, path: Path, array: Array) -> Array:
        return self.scale * array if path[-2] == "down" else array

    @staticmethod
    def sum(parts: Sequence[tuple["Bottleneck", Arrays, float]]) -> tuple["Bottleneck", dict[Path, Array]]:
        """Exactly the sum, as one of the widths' sum. Raises RecipeError unless all have the same targets."""
        targets = {form.targets for form, _, _ in parts}
        if len(targets) > 1:
            raise RecipeError(f"bottlenecks of targets {sorted(targets)} cannot be added")

        def shared(path: Path, part: tuple["Bottleneck", Arrays, float]) -> Array:
            form, delta, share = part
            return share * form._weighed(path, delta[path]) if path[-2] == "down" else delta[path]

        summed = {
            path: jnp.concatenate([shared(path, part) for part in parts], _hidden_axis(path))
            for path in parts[0][1]
        }
        return Bottleneck(width=sum(form.width for form, _, _ in parts), targets=targets.pop()), summed


Form = Lora | BitFit | Bottleneck


@dataclass(frozen=True, kw_only=True)
class Config:
    """A delta in the given form, of modules of the config `of`."""

    of: roles.Config
    form: Form

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Delta":
        return Delta(self, rngs=rngs, execution=execution)

    @property
    def merged(self) -> roles.Config:
        """The config of the base with the delta merged into it."""
        return self.form.merged(self.of)

    def sum(self, parts: Sequence[tuple["Config", Any, float]]) -> tuple["Config", dict[str, Any]]:
        """One delta that changes what all of `parts`, (config, parameters, coefficient), together do. Raises
        RecipeError unless they are of one base config and one form."""
        for config, _, _ in parts:
            if config.of != self.of or type(config.form) is not type(self.form):
                raise RecipeError(
                    f"deltas {self.form} of {self.of} and {config.form} of {config.of} cannot be added: "
                    "they are of different bases or forms"
                )
        form, summed = type(self.form).sum([(c.form, _flat(tree), share) for c, tree, share in parts])  # type: ignore[arg-type]
        return Config(of=self.of, form=form), _nested(summed)


class _Part(nnx.Module):
    """Names on the way to a parameter."""


class Delta(nnx.Module):
    """Its parameters have the names of those of the base that they change."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        base = nnx.state(nnx.eval_shape(lambda: config.of.build(rngs=nnx.Rngs(0), execution=execution)))
        leaves = {
            tuple(map(str, path)): Leaf(variable.get_value().shape, variable.get_metadata()["axes"])
            for path, variable in nnx.to_flat_state(base)
        }
        for (*parents, name), leaf in config.form.begin(leaves).items():
            node: Any = self
            for parent in parents:
                if not hasattr(node, parent):
                    setattr(node, parent, _Part())
                node = getattr(node, parent)
            setattr(node, name, parameter(leaf.init, leaf.shape, leaf.axes, rngs))
        self.form = config.form

    def __call__(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The base's parameters -> what it computes with; those that are not changed are the very same."""
        own = {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(self))}
        arrays = _flat(params)
        return _nested(arrays | self.form.adapted(arrays, own))


def _flat(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Any]:
    found: dict[Path, Any] = {}
    for name, value in tree.items():
        path = (*prefix, name)
        found |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return found


def _nested(arrays: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for (*parents, leaf), value in arrays.items():
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _matching(form: Form, there: Iterable[Path]) -> list[Path]:
    """The paths that one of the form's targets fits. Raises RecipeError for a target that fits none."""
    names = {".".join(path): path for path in there}
    for target in form.targets:
        if not fnmatch.filter(names, target):
            hint = nearest(target, names)
            raise RecipeError(f'{type(form).__name__}: target "{target}" fits none of {sorted(names)}{hint}')
    return [
        path for name, path in names.items() if any(fnmatch.fnmatchcase(name, one) for one in form.targets)
    ]


def _positive(form: Any, name: str) -> None:
    if getattr(form, name) < 1:
        raise RecipeError(f"{type(form).__name__}: {name} is {getattr(form, name)}, expected at least 1")


def _stacked(leaf: Leaf) -> bool:
    return leaf.axes[:1] == ("layers",)


def _hidden_axis(path: Path) -> int:
    """Where an MLP's array counts hidden units."""
    return -2 if path[-2:] == ("down", "kernel") else -1


def _product(down: Array, up: Array) -> Array:
    # In float32 on accelerators too: what is merged once must be what is applied in every step.
    return jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)


def _padded(array: Array, axis: int, count: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, count)
    return jnp.pad(array, widths)
