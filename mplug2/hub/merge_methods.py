"""Merging methods, tensor by tensor: arrays of one shape in, their merge in float64 out. No files, no state.

A tensor is one array of one layer (mplug2.hub.merge splits what is stacked), the unit that the papers call a
layer or a parameter. A *delta* is a parent minus the base that all parents were trained from.

| method          | what it gives                                            | source         |
|-----------------|----------------------------------------------------------|----------------|
| soup            | sum c p / sum c                                          | 2203.05482     |
| slerp           | the parents, weighted as along the arc between them      | Shoemake, 1985 |
| task_arithmetic | base + sum c delta                                       | 2212.04089     |
| ties            | base + scale x mean of the trimmed deltas of one sign    | 2306.01708     |
| dare            | base + sum c delta, dropped at random and rescaled       | 2311.03099     |
| breadcrumbs     | base + sum c delta without its outliers and small values | 2312.06795     |
| graft           | base, with some of one parent's values                   | 2302.06600     |

Numbers are arXiv's; the last rule is also called skill localisation. Where TIES' authors trim a whole model's
delta at once, each tensor is trimmed here, so that one tensor at a time is enough.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Protocol

import numpy as np

from mplug2.errors import CardError, nearest

Arrays = Sequence[np.ndarray]
Key = Sequence[int]
"""What a random draw is for, as numbers: a seed, a tensor, a parent."""


def soup(parents: Arrays, shares: Sequence[float]) -> np.ndarray:
    """The mean, weighted by `shares`, which need not sum to 1."""
    # Shares of the largest one: equal ones are exactly 1, so that the sum of a uniform soup is exact, and its
    # mean the same in any order of parents.
    shares = [share / max(shares) for share in shares]
    return _sum(parents, shares) / math.fsum(shares)


def slerp(one: np.ndarray, other: np.ndarray, share: float) -> np.ndarray:
    """The sum of the two as vectors with the weights of Shoemake's arc, sin((1 - share) a) / sin a and
    sin(share a) / sin a, `a` the angle between them; `share` 0: one, 1: other. Vectors of one length stay on
    their arc. Of others the longer one pulls harder, since neither is made a unit vector first: the length of
    the sum is not interpolated (2 and 4 at right angles give 3.16 halfway, not 3). Vectors without a single
    arc between them (parallel, opposite, zero) are mixed linearly."""
    one, other = _wide(one), _wide(other)
    lengths = math.sqrt(float(np.sum(one * one))), math.sqrt(float(np.sum(other * other)))
    angle = 0.0
    if all(lengths):  # by halves of sum and difference: exact where the cosine is flat
        apart = one / lengths[0] - other / lengths[1]
        along = one / lengths[0] + other / lengths[1]
        angle = 2 * math.atan2(math.sqrt(float(np.sum(apart**2))), math.sqrt(float(np.sum(along**2))))
    if math.sin(angle) < 1e-6:
        return (1 - share) * one + share * other
    parts = math.sin((1 - share) * angle), math.sin(share * angle)
    return (parts[0] * one + parts[1] * other) / math.sin(angle)


def task_arithmetic(base: np.ndarray, parents: Arrays, coefficients: Sequence[float]) -> np.ndarray:
    """base + sum c (p - base), as a weighted sum: exactly a parent where its coefficient is 1 and no other
    counts."""
    return _sum([base, *parents], [1 - math.fsum(coefficients), *coefficients])


def ties(
    base: np.ndarray, parents: Arrays, shares: Sequence[float], *, density: float, scale: float = 1.0
) -> np.ndarray:
    """Trim, elect sign, merge: each delta keeps its `density` largest values; by element the sign with the
    greater (weighted) mass wins, and the (weighted) mean of those that have it is taken, `scale` times.
    Where masses are equal nothing is elected and the base stays."""
    deltas = [share * kept(_wide(parent) - base, density) for parent, share in _with(parents, shares)]
    elected = np.sign(sum(deltas))
    merged, weight = np.zeros(base.shape), np.zeros(base.shape)
    for delta, share in zip(deltas, shares, strict=True):
        agrees = (np.sign(delta) == elected) & (delta != 0)
        merged += np.where(agrees, delta, 0)
        weight += np.where(agrees, share, 0)
    return base + scale * np.divide(merged, weight, out=np.zeros(base.shape), where=weight > 0)


def dare(
    base: np.ndarray, parents: Arrays, coefficients: Sequence[float], *, density: float, keys: Sequence[Key]
) -> np.ndarray:
    """Drop and rescale: each value of a delta stays with probability `density` and is divided by it, drawn
    from the parent's key."""
    total = _wide(base)
    for (parent, coefficient), key in zip(_with(parents, coefficients), keys, strict=True):
        stays = drawn(key, base.shape) < density
        total += np.where(stays, coefficient / density * (_wide(parent) - base), 0)
    return total


def breadcrumbs(
    base: np.ndarray, parents: Arrays, coefficients: Sequence[float], *, density: float, outliers: float
) -> np.ndarray:
    """Both tails of each delta are masked: the share `outliers` of the largest magnitudes, and the smallest
    ones until `density` remains."""
    total = _wide(base)
    for parent, coefficient in _with(parents, coefficients):
        total += coefficient * kept(_wide(parent) - base, density, outliers)
    return total


def graft(base: np.ndarray, donor: np.ndarray, coefficient: float, *, density: float = 1.0) -> np.ndarray:
    """The donor's values where they differ most from the base (the share `density`), the base elsewhere;
    `coefficient` mixes the two (1: the donor's own)."""
    mask = kept(_wide(donor) - base, density) != 0
    return np.where(mask, task_arithmetic(base, [donor], [coefficient]), base)


# --- Parts


def kept(delta: np.ndarray, density: float, outliers: float = 0.0) -> np.ndarray:
    """`delta` with zeros in place of its share `outliers` of largest magnitudes and of the smallest ones
    after the next share `density`. At least one value is kept; values of equal magnitude share their fate."""
    if not delta.size or (density >= 1 and outliers <= 0):
        return delta
    magnitudes = np.abs(delta).reshape(-1)
    above = min(round(outliers * delta.size), delta.size - 1)
    high = delta.size - 1 - above  # ranks, ascending, both kept
    low = max(high + 1 - max(round(density * delta.size), 1), 0)
    ranked = np.partition(magnitudes, (low, high))
    return np.where((np.abs(delta) >= ranked[low]) & (np.abs(delta) <= ranked[high]), delta, 0)


def drawn(key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1), the same in every version of numpy: raw bits of a generator whose stream is
    fixed."""
    bits = np.random.PCG64(np.random.SeedSequence(list(key))).random_raw(math.prod(shape))
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _with(arrays: Arrays, numbers: Sequence[float]) -> Iterator[tuple[np.ndarray, float]]:
    return zip(arrays, numbers, strict=True)


def _sum(arrays: Arrays, numbers: Sequence[float]) -> np.ndarray:
    total = np.zeros(arrays[0].shape)
    for array, number in _with(arrays, numbers):
        if number != 0:
            total += number * _wide(array)
    return total


# --- As values: what a command line or a caller chooses


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor of all parents, and of the base where the method has one. `name` is "module.array", `keys`
    tell tensor and parent apart, one a parent."""

    name: str
    parents: tuple[np.ndarray, ...]
    coefficients: tuple[float, ...]
    base: np.ndarray | None = None
    keys: tuple[Key, ...] = ()

    @property
    def origin(self) -> np.ndarray:
        assert self.base is not None  # mplug2.hub.merge gives one to every method of which `based` is true
        return self.base


class Method(Protocol):
    """`based`: it needs the base. `shares`: its coefficients are shares, none below 0. `parents`: how many it
    takes, from and to. Its fields are its settings."""

    name: ClassVar[str]
    based: ClassVar[bool]
    shares: ClassVar[bool]
    parents: ClassVar[tuple[int, float]]

    def __call__(self, tensor: Tensor) -> np.ndarray: ...


class _Any:
    """What holds of most methods."""

    based: ClassVar[bool] = True
    shares: ClassVar[bool] = False
    parents: ClassVar[tuple[int, float]] = (1, math.inf)


@dataclass(frozen=True, kw_only=True)
class Soup(_Any):
    name: ClassVar[str] = "soup"
    based: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    parents: ClassVar[tuple[int, float]] = (2, math.inf)

    def __call__(self, tensor: Tensor) -> np.ndarray:
        return soup(tensor.parents, tensor.coefficients)


@dataclass(frozen=True, kw_only=True)
class GreedySoup(Soup):
    """A soup of those parents that a score keeps (mplug2.hub.merge.greedy)."""

    name: ClassVar[str] = "greedy"


@dataclass(frozen=True, kw_only=True)
class Slerp(_Any):
    name: ClassVar[str] = "slerp"
    based: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    parents: ClassVar[tuple[int, float]] = (2, 2)

    def __call__(self, tensor: Tensor) -> np.ndarray:
        one, other = tensor.parents
        return slerp(one, other, tensor.coefficients[1] / math.fsum(tensor.coefficients))


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(_Any):
    name: ClassVar[str] = "task_arithmetic"

    def __call__(self, tensor: Tensor) -> np.ndarray:
        return task_arithmetic(tensor.origin, tensor.parents, tensor.coefficients)


@dataclass(frozen=True, kw_only=True)
class Ties(_Any):
    name: ClassVar[str] = "ties"
    shares: ClassVar[bool] = True
    density: float = 0.2
    scale: float = 1.0

    def __post_init__(self):
        _share("density", self.density)
        if not math.isfinite(self.scale):
            raise CardError(f"scale is {self.scale}, expected a finite number")

    def __call__(self, tensor: Tensor) -> np.ndarray:
        return ties(
            tensor.origin, tensor.parents, tensor.coefficients, density=self.density, scale=self.scale
        )


@dataclass(frozen=True, kw_only=True)
class Dare(_Any):
    name: ClassVar[str] = "dare"
    density: float = 0.5
    seed: int = 0

    def __post_init__(self):
        _share("density", self.density)
        if not 0 <= self.seed < 2**31:
            raise CardError(f"seed is {self.seed}, expected a number of 31 bits")

    def __call__(self, tensor: Tensor) -> np.ndarray:
        keys = [(self.seed, *key) for key in tensor.keys]
        return dare(tensor.origin, tensor.parents, tensor.coefficients, density=self.density, keys=keys)


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(_Any):
    name: ClassVar[str] = "breadcrumbs"
    density: float = 0.9
    outliers: float = 0.01

    def __post_init__(self):
        _share("density", self.density)
        if not 0 <= self.outliers or self.density + self.outliers > 1 + 1e-9:
            raise CardError(
                f"density {self.density} and outliers {self.outliers} are shares of a delta, "
                "expected to sum to at most 1"
            )

    def __call__(self, tensor: Tensor) -> np.ndarray:
        return breadcrumbs(
            tensor.origin,
            tensor.parents,
            tensor.coefficients,
            density=self.density,
            outliers=self.outliers,
        )


@dataclass(frozen=True, kw_only=True)
class Graft(_Any):
    """`take`: patterns (fnmatch) of "module.array", the arrays in which the mask may lie; empty: all."""

    name: ClassVar[str] = "graft"
    parents: ClassVar[tuple[int, float]] = (1, 1)
    density: float = 1.0
    take: tuple[str, ...] = ()

    def __post_init__(self):
        _share("density", self.density)

    def __call__(self, tensor: Tensor) -> np.ndarray:
        if self.take and not any(fnmatchcase(tensor.name, pattern) for pattern in self.take):
            return tensor.origin
        (donor,), (coefficient,) = tensor.parents, tensor.coefficients
        return graft(tensor.origin, donor, coefficient, density=self.density)


METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (Soup, GreedySoup, Slerp, TaskArithmetic, Ties, Dare, Breadcrumbs, Graft)
}


def method(name: str, settings: Mapping[str, object]) -> Method:
    """A method by its name, with those settings that are said (not None). Raises CardError for a name or a
    setting that it has not."""
    if name not in METHODS:
        raise CardError(f'no method "{name}": known are {", ".join(METHODS)}{nearest(name, METHODS)}')
    kind = METHODS[name]
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]  # each is a dataclass
    said = {key: value for key, value in settings.items() if value is not None}
    for key in said:
        if key not in known:
            raise CardError(f"{name} has no {key}, its settings are {', '.join(known) or 'none'}")
    return kind(**said)


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise CardError(f"{name} is {value}, expected a share above 0 and up to 1")
