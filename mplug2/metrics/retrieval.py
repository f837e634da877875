"""Recall@k of retrieval in both directions, with a stated rule for ties.

`similarity` is (queries, candidates), higher is better; `positives` says which candidates are right for
each query. A query's rank is that of its best placed right candidate, 1-based; recall@k is the share of
queries with rank <= k.

Ties: `lower_index_first` (the default) puts equal scores in the order of their index, as a stable
descending sort does; `optimistic` puts a right candidate before all wrong ones of the same score,
`pessimistic` after them. A model that gives every candidate the same score is perfect under `optimistic`:
report it only as a bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mplug2.errors import DataError, nearest

Ties = Literal["lower_index_first", "optimistic", "pessimistic"]
_TIES = ("lower_index_first", "optimistic", "pessimistic")


@dataclass(frozen=True)
class Recall:
    """`at[k]`: recall@k in 0..1; `ranks`: int64 (queries,), 1-based; `gallery`: how many candidates there
    were.
    """

    at: dict[int, float]
    ranks: np.ndarray
    gallery: int

    @property
    def median_rank(self) -> float:
        """The mean of the middle two for an even number of queries."""
        return float(np.median(self.ranks))

    @property
    def mean_rank(self) -> float:
        return float(self.ranks.mean())

    def hits(self, k: int) -> np.ndarray:
        """float64 (queries,): 1 where the rank is at most k; what `interval` takes."""
        return (self.ranks <= k).astype(np.float64)


def recall_at_k(
    similarity: np.ndarray,
    positives: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "lower_index_first",
) -> Recall:
    """Recall@k for each of `ks`.

    `positives`: one candidate index per query, or a list of indices per query, or a boolean (queries,
    candidates). A k above the number of candidates is allowed. Raises DataError for empty, unequal,
    out-of-range or NaN input.
    """
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2 or not scores.size:
        raise DataError(
            f"similarity has shape {scores.shape}; a non-empty (queries, candidates) was expected"
        )
    if np.isnan(scores).any():
        raise DataError("similarity holds NaN; retrieval needs numbers that can be ordered")
    if ties not in _TIES:
        raise DataError(f'ties is "{ties}"; expected one of {", ".join(_TIES)}{nearest(ties, _TIES)}')
    if not len(ks) or min(ks) < 1:
        raise DataError(f"ks is {list(ks)}; expected at least one number, each 1 or more")
    ranks = _ranks(scores, _positive_mask(positives, scores.shape), ties)
    return Recall({int(k): float((ranks <= k).mean()) for k in ks}, ranks, scores.shape[1])


def _positive_mask(positives, shape: tuple[int, int]) -> np.ndarray:
    """Boolean (queries, candidates) from any of the accepted forms."""
    queries, candidates = shape
    if len(positives) != queries:
        raise DataError(f"positives are given for {len(positives)} queries; similarity has {queries}")
    if isinstance(positives, np.ndarray) and positives.dtype == bool:
        if positives.shape != shape:
            raise DataError(f"positives have shape {positives.shape}; similarity has {shape}")
        mask = positives
    else:
        mask = np.zeros(shape, dtype=bool)
        for query, right in enumerate(positives):
            indices = np.atleast_1d(np.asarray(right, dtype=np.int64))
            if indices.size and not (0 <= indices.min() and indices.max() < candidates):
                raise DataError(
                    f"query {query} has positives {indices.tolist()}; there are {candidates} candidates"
                )
            mask[query, indices] = True
    if not mask.any(axis=1).all():
        raise DataError(
            f"query {int(np.argmin(mask.any(axis=1)))} has no right candidate; at least one was expected"
        )
    return mask


def _ranks(scores: np.ndarray, right: np.ndarray, ties: Ties) -> np.ndarray:
    """1-based rank of the best placed right candidate of each query."""
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    above = ~right & (scores > best)
    if ties == "optimistic":
        return 1 + above.sum(axis=1)
    equal = ~right & (scores == best)
    if ties == "lower_index_first":
        first = np.argmax(right & (scores == best), axis=1)
        equal &= np.arange(scores.shape[1]) < first[:, None]
    return 1 + above.sum(axis=1) + equal.sum(axis=1)
