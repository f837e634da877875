"""Forms of deltas that are said of the base's parameters, each as `h + s * f(x)` around a part of it (He et
al., arXiv:2110.04366). So the base's code knows of none, a merged delta costs nothing, and a fresh one
changes nothing:

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
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from mplug2 import roles
from mplug2.errors import RecipeError, nearest
from mplug2.modules.layers import Initializer, normal, zeros
from mplug2.roles import Array

Path = tuple[str, ...]
Arrays = Mapping[Path, Array]


class Leaf(NamedTuple):
    """A parameter before it has values."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer = zeros


class Form:
    """What holds of every form."""

    merges: ClassVar[bool] = True

    def delta(self, config: roles.Config) -> Any:
        """The config of a delta of this form. Raises RecipeError for a module that takes none."""
        from mplug2.modules.delta import Config  # here: it knows all forms, because cards name them

        return Config(of=config, form=self)  # pyright: ignore[reportArgumentType]

    def check(self, config: roles.Config) -> None:
        """Raises RecipeError for the config of a module that takes no such delta."""

    def merged(self, config: Any) -> Any:
        """The config of the base with a delta merged into it."""
        return config

    def around(self, module: Any, delta: Arrays) -> Any:
        """The base as an object -> one that is called like it and is given what a delta adds."""
        return module


@dataclass(frozen=True, kw_only=True)
class Lora(Form):
    """Adds `alpha / rank * A B` to every matrix (word tables too) whose name fits one of `targets`
    (`fnmatch`, the names of files: `layers.layers.attention.query.kernel`). A `I rank` begins like a layer of
    its size, B `rank O` at zero.

    `dropout`: the share of A's rows, its inputs, that are left out in a training step, where the recipe has
    dropout (arXiv:2404.09610): drawn once for all tokens of the step, because a delta is a function of
    parameters and sees no token."""

    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = ("*kernel",)
    dropout: float = 0.0

    def __post_init__(self):
        positive(self, "rank")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"Lora: dropout is {self.dropout}, expected from 0 to below 1")

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

    def adapted(self, params: Arrays, delta: Arrays, key: Array | None = None) -> dict[Path, Array]:
        adapted: dict[Path, Array] = {}
        for at, path in enumerate({path[:-1]: None for path in delta}):
            down = delta[*path, "A"]
            if key is not None and self.dropout:
                kept = jax.random.bernoulli(jax.random.fold_in(key, at), 1 - self.dropout, down.shape[:-1])
                down = down * kept[..., None] / (1 - self.dropout)
            adapted[path] = params[path] + self.alpha / self.rank * _product(down, delta[*path, "B"])
        return adapted

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
class BitFit(Form):
    """Adds a vector to every parameter whose name fits one of `targets`."""

    targets: tuple[str, ...] = ("*bias",)

    def begin(self, base: Mapping[Path, Leaf]) -> dict[Path, Leaf]:
        return {path: base[path]._replace(init=zeros) for path in _matching(self, base)}

    def adapted(self, params: Arrays, delta: Arrays, key: Array | None = None) -> dict[Path, Array]:
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
class Bottleneck(Form):
    """Gives every MLP whose name fits one of `targets` (`layers.layers.mlp`) `width` hidden units more, whose
    outputs count `scale` times."""

    width: int = 8
    scale: float = 1.0
    targets: tuple[str, ...] = ("*mlp",)

    def __post_init__(self):
        positive(self, "width")

    def merged(self, config: Any) -> Any:
        if not hasattr(config, "hidden"):
            raise RecipeError(
                f"{named(config)} does not say how many hidden units it has: a Bottleneck cannot be merged "
                "into it, publish the delta beside its base"
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

    def adapted(self, params: Arrays, delta: Arrays, key: Array | None = None) -> dict[Path, Array]:
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


def _matching(form: Any, there: Iterable[Path]) -> list[Path]:
    """The paths that one of the form's targets fits. Raises RecipeError for a target that fits none."""
    names = {".".join(path): path for path in there}
    for target in form.targets:
        if not fnmatch.filter(names, target):
            hint = nearest(target, names)
            raise RecipeError(f'{type(form).__name__}: target "{target}" fits none of {sorted(names)}{hint}')
    return [
        path for name, path in names.items() if any(fnmatch.fnmatchcase(name, one) for one in form.targets)
    ]


def named(config: Any) -> str:
    """A config in a refusal: `heads.ClassifierConfig`."""
    return f"{type(config).__module__.rpartition('.')[2]}.{type(config).__qualname__}"


def positive(form: Any, name: str) -> None:
    """Raises RecipeError unless the form's number of that name is at least 1."""
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
