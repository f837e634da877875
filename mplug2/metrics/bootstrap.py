"""Percentile bootstrap (Efron, 1979): how far a mean would move with another sample of examples of the same
size.
"""

from collections.abc import Sequence

import numpy as np

from mplug2.errors import DataError

_CHUNK = 1 << 22
"""Draws at a time: bounds memory (32 MB of indices) for large test sets."""


def bootstrap(
    values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000, coverage: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean of per-example `values` (N,): the central `coverage` of the resampled means.

    The same values, seed and number of resamples give the same interval. Raises DataError for empty or NaN
    values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size:
        raise DataError(
            f"values have shape {sample.shape}; a non-empty list with one number per example was expected"
        )
    if np.isnan(sample).any():
        raise DataError("values hold NaN; the interval of a mean needs numbers")
    if resamples < 1 or not 0 < coverage < 1:
        raise DataError(
            f"resamples is {resamples} and coverage {coverage}; expected at least 1, and between 0 and 1"
        )
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // sample.size)
    means = np.concatenate(
        [
            sample[generator.integers(0, sample.size, size=(min(rows, resamples - start), sample.size))].mean(
                axis=1
            )
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - coverage) / 2, (1 + coverage) / 2])
    return float(low), float(high)
