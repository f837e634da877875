"""BLEU-1 to BLEU-4 (Papineni et al., ACL 2002), with the constants of the COCO caption evaluation.

Counts are clipped by the largest count in any one reference and summed over the corpus before the
precisions are taken. No smoothing: but as in COCO's code each precision is (correct + 1e-15) / (guessed +
1e-9), so that a perfect score is a little under 1 and a caption of fewer than n words has a small score
instead of an undefined one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np

from mplug2.errors import DataError, nearest
from mplug2.metrics.captions import check_captions, ngrams

_TINY, _SMALL = 1e-15, 1e-9
_LENGTHS = ("closest", "shortest", "average")


@dataclass(frozen=True)
class BleuScore:
    """`values`: BLEU-1..4 of the corpus; `per_example`: float64 (N, 4); the two lengths are in words,
    corpus sums.
    """

    values: tuple[float, float, float, float]
    per_example: np.ndarray
    prediction_length: int
    reference_length: float

    @property
    def value(self) -> float:
        """BLEU-4 of the corpus."""
        return self.values[3]


def bleu(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    reference_length: Literal["closest", "shortest", "average"] = "closest",
) -> BleuScore:
    """BLEU of N captions against their references, words parted by blanks; in 0..1.

    `reference_length` is what the brevity penalty compares with when an example has several references;
    ties of `closest` go to the shorter. Raises DataError for empty or unequal input.
    """
    check_captions(predictions, references)
    if reference_length not in _LENGTHS:
        near = nearest(reference_length, _LENGTHS)
        raise DataError(
            f'reference_length is "{reference_length}"; expected one of {", ".join(_LENGTHS)}{near}'
        )
    rows = [
        _counts(one, several, reference_length) for one, several in zip(predictions, references, strict=True)
    ]
    lengths = np.array([row[:2] for row in rows], dtype=np.float64)
    guessed = np.array([row[2] for row in rows], dtype=np.float64)
    correct = np.array([row[3] for row in rows], dtype=np.float64)
    corpus = _score(lengths[:, 0].sum(), lengths[:, 1].sum(), guessed.sum(axis=0), correct.sum(axis=0))
    return BleuScore(
        values=(float(corpus[0]), float(corpus[1]), float(corpus[2]), float(corpus[3])),
        per_example=_score(lengths[:, 0], lengths[:, 1], guessed, correct),
        prediction_length=int(lengths[:, 0].sum()),
        reference_length=float(lengths[:, 1].sum()),
    )


def _counts(
    prediction: str, references: Sequence[str], which: str
) -> tuple[int, float, list[int], list[int]]:
    """Length, effective reference length, and per n the n-grams of the prediction and those found in a
    reference.
    """
    words = prediction.split()
    several = [text.split() for text in references]
    lengths = [len(one) for one in several]
    if which == "closest":
        effective: float = min((abs(length - len(words)), length) for length in lengths)[1]
    elif which == "shortest":
        effective = min(lengths)
    else:
        effective = sum(lengths) / len(lengths)
    allowed = [
        reduce(lambda one, other: one | other, counts) for counts in zip(*map(ngrams, several), strict=True)
    ]
    correct = [
        sum(min(count, most[gram]) for gram, count in counts.items() if gram in most)
        for counts, most in zip(ngrams(words), allowed, strict=True)
    ]
    return len(words), effective, [max(0, len(words) - n) for n in range(4)], correct


def _score(length, reference, guessed: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """BLEU-1..4 along the last axis, from counts (..., 4) and lengths (...)."""
    precision = np.cumprod((correct + _TINY) / (guessed + _SMALL), axis=-1)
    geometric = precision ** (1 / np.arange(1, 5))
    ratio = (np.asarray(length, dtype=np.float64) + _TINY) / (
        np.asarray(reference, dtype=np.float64) + _SMALL
    )
    penalty = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return geometric * penalty[..., None]
