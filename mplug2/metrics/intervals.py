"""Intervals: how far a score would move with another sample of the same size.

What was seen together counts together: answers about one video or picture are one draw, a *group*. A share of
hits (0 or 1 each) gets Wilson's interval (1927), which is never empty and never leaves 0..1; where groups
hold several, it is that of the number of independent answers that would vary as much (the design effect:
Kish, 1965; Korn and Graubard, 1998). Other means get a bootstrap over groups (Efron, 1979), its percentiles
widened as Student's t is wider than the normal distribution (Hesterberg, 2015, arXiv:1411.5279). What is no
mean, such as corpus BLEU, gets the variance of a jackknife that leaves out tenths of the groups, and Wilson's
form. What is nearly 0 or nearly perfect gets Wilson's interval of the groups: a spread of almost nothing is
no certainty.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from mplug2.errors import DataError

_CHUNK = 1 << 22
"""Draws at a time: bounds memory (32 MB of indices) for large test sets."""

_TENTHS = 10

_ROUNDING = 1e-9
"""Values that differ by less of the largest possible one are the same: a perfect CIDEr may be 10 + 2e-15."""

_NEARLY = 1e-3
"""A mean within this of 0 or of the most, such as one answer of half a point among a thousand, says as little
of its spread as one that is at it: BLEU, which adds 1e-9 to its counts, is never quite 0 or 1."""


class Interval(NamedTuple):
    low: float
    high: float


def interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    most: float = 1.0,
    coverage: float = 0.95,
) -> Interval | None:
    """Of the mean of per-example `values` (N,), each from 0 to `most`; example i belongs to `groups[i]`
    (default: each to its own). None where nothing tells it: one group, or values that are all alike and
    near neither 0 nor `most`.

    Raises DataError for values that are empty or not finite, and for groups of another number or that are no
    names.
    """
    sample = _sample(values, coverage)
    sums, sizes = _by_group(sample, groups)
    share = min(max(float(sample.mean()) / most, 0.0), 1.0)
    if (np.minimum(np.abs(sample), np.abs(sample - most)) <= _ROUNDING * most).all() or _at_end(share):
        found = wilson(share, _independent(share, sums / most, sizes, coverage), coverage)
        return Interval(most * found.low, most * found.high)
    if len(sizes) == 1 or np.ptp(sample) <= _ROUNDING * most:
        return None
    return bootstrap(sample, groups, coverage=coverage)


def wilson(share: float, count: float, coverage: float = 0.95) -> Interval:
    """Wilson's score interval of a `share` of `count` independent answers; `count` need not be whole."""
    z = _normal(coverage)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    # At the ends of 0..1 the interval ends there; rounding must not take the share itself out.
    return Interval(max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share)))


def bootstrap(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 2000,
    coverage: float = 0.95,
) -> Interval:
    """Of the mean of `values`, by means of groups drawn with replacement; of one group that of the mean
    alone.

    The same values, groups, seed and number of resamples give the same interval. Raises DataError as
    `interval`.
    """
    sample = _sample(values, coverage)
    if resamples < 1:
        raise DataError(f"resamples is {resamples}, expected at least 1")
    sums, sizes = _by_group(sample, groups)
    count = len(sums)
    generator = np.random.default_rng(seed)
    rows, means = max(1, _CHUNK // count), []
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, count, size=(min(rows, resamples - start), count))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    # A bootstrap of n groups has a variance of (n - 1) / n of the mean's, and normal tails.
    wide = _student(coverage, count - 1) * math.sqrt(count / (count - 1)) if count > 1 else _normal(coverage)
    low, high = np.quantile(np.concatenate(means), [ndtr(-wide), ndtr(wide)])
    return Interval(float(low), float(high))


def jackknife(
    measure: Callable[[Sequence[int]], float],
    count: int,
    groups: Sequence[Hashable] | None = None,
    *,
    coverage: float = 0.95,
) -> Interval | None:
    """Of a score in 0..1 that `measure` computes of the examples at some of the indices 0..count-1: the
    variance of what leaving out each tenth of the groups (or each group, of fewer) changes. None for one
    group."""
    together, place = _numbered(count, groups)
    parts = min(_TENTHS, together)
    if parts < 2:
        return None
    value = measure(range(count))
    left_out = [measure(np.flatnonzero(place % parts != part).tolist()) for part in range(parts)]
    # The parts are disjoint: leaving one out moves the score by 1/parts of what a new sample would.
    variance = (parts - 1) * float(np.var(left_out))
    if np.ptp(left_out) <= _ROUNDING or _at_end(value):
        return wilson(value, together, coverage)
    narrow = (_normal(coverage) / _student(coverage, parts - 1)) ** 2
    return wilson(value, max(value * (1 - value) / variance * narrow, 1.0), coverage)


def _independent(share: float, sums: np.ndarray, sizes: np.ndarray, coverage: float) -> float:
    """How many independent answers tell as much about a share as these groups do: hits and numbers of answers
    by group."""
    groups, answers = len(sizes), float(sizes.sum())
    if groups == answers:
        return answers
    if groups == 1 or not 0 < share < 1:
        return groups  # nothing shows how alike the answers of a group are: as alike as can be
    variance = groups / (groups - 1) * float(np.square(sums - share * sizes).sum()) / answers**2
    alike = min(share * (1 - share) / variance, answers) if variance else answers
    return max(alike * (_normal(coverage) / _student(coverage, groups - 1)) ** 2, 1.0)


def _sample(values: Sequence[float] | np.ndarray, coverage: float) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size:
        raise DataError(
            f"values have shape {sample.shape}; a non-empty list with one number per example was expected"
        )
    if not np.isfinite(sample).all():
        raise DataError("values hold NaN or infinity; the interval of a mean needs numbers")
    if not 0 < coverage < 1:
        raise DataError(f"coverage is {coverage}, expected a number between 0 and 1")
    return sample


def _by_group(sample: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """(sum, number) of the values of each group."""
    count, place = _numbered(len(sample), groups)
    return np.bincount(place, sample, count), np.bincount(place, minlength=count).astype(float)


def _numbered(count: int, groups: Sequence[Hashable] | None) -> tuple[int, np.ndarray]:
    """(how many groups, the group of each example by number, in the order of their first examples)."""
    if groups is None:
        return count, np.arange(count)
    if len(groups) != count:
        raise DataError(f"groups are given for {len(groups)} examples; there are {count} values")
    numbers: dict[Hashable, int] = {}
    try:
        place = np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)
    except TypeError as error:
        raise DataError(f"groups are given by names, of which one is no name: {error}") from None
    return len(numbers), place


def _at_end(share: float) -> bool:
    return not _NEARLY <= share <= 1 - _NEARLY


def _normal(coverage: float) -> float:
    return float(ndtri((1 + coverage) / 2))


def _student(coverage: float, freedom: int) -> float:
    return float(stdtrit(freedom, (1 + coverage) / 2))
