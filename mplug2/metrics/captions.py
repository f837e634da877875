"""What the caption metrics take: predictions (N texts) and references (N lists of texts), words parted by
blanks.

The metrics do not tokenise: pass raw captions through `ptb.tokenize_all` first, as published numbers do;
captions of plain lower-case words may be passed as they are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mplug2.errors import DataError

Ngrams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class Score:
    """One metric: the corpus score, and a float64 array (N,) with the score of each example."""

    value: float
    per_example: np.ndarray


class Metric(Protocol):
    """Predictions (N texts), references (N lists of texts) -> a score."""

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]], /) -> Score: ...


def check_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse, as DataError, what has no score: nothing at all, unequal lengths, an example without a
    reference.
    """
    if isinstance(predictions, str) or isinstance(references, str):
        raise DataError(
            "predictions and references are lists with one entry per example; a single string was given"
        )
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions were given for {len(references)} lists of references; "
            "the numbers must agree"
        )
    if not len(predictions):
        raise DataError("no predictions were given; a metric needs at least one example")
    for index, (prediction, several) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise DataError(f"prediction {index} is {type(prediction).__name__}; a string was expected")
        if isinstance(several, str):
            raise DataError(
                f"the references of example {index} are one string; a list of strings was expected"
            )
        if not len(several):
            raise DataError(f"example {index} has no reference; at least one was expected")
        for text in several:
            if not isinstance(text, str):
                raise DataError(
                    f"a reference of example {index} is {type(text).__name__}; a string was expected"
                )


def ngrams(words: Sequence[str], longest: int = 4) -> list[Ngrams]:
    """How often each n-gram occurs, one Counter for each n from 1 to `longest`."""
    return [Counter(zip(*(words[start:] for start in range(n)), strict=False)) for n in range(1, longest + 1)]
