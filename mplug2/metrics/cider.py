"""CIDEr (Vedantam et al., CVPR 2015): tf-idf weighted n-gram similarity to the references, times 10.

Three names, because public code uses one name for two formulas:
- `cider_plain`: the paper's CIDEr: cosine similarity, no clipping, no length penalty.
- `cider_d`: CIDEr-D: counts clipped by the reference's, and a Gaussian penalty of the difference in length
  (sigma 6).
- `cider`: what papers report as CIDEr, from pycocoevalcap: that is CIDEr-D.

Raw counts as term frequency; the document frequency of an n-gram is the number of examples (not sentences)
with a reference that holds it; idf = ln(N / max(1, df)). With one example every idf, and so every score, is
0, and a caption of fewer than four words cannot reach 10: pass the `document_frequencies` of a larger set
to compare small samples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mplug2.errors import DataError
from mplug2.metrics.captions import Ngrams, Score, check_captions, ngrams

_SIGMA = 6.0


@dataclass(frozen=True)
class DocumentFrequencies:
    """`counts`: in how many of `examples` examples some reference holds the n-gram."""

    counts: Ngrams
    examples: int

    @property
    def weigh(self) -> bool:
        """Whether any n-gram weighs anything: not where every example holds all of them, such as a single
        one."""
        return any(count < self.examples for count in self.counts.values())


@dataclass(frozen=True)
class _Vector:
    """tf-idf weights of one caption per n, their norms, and its length in bigrams."""

    weights: list[dict[tuple[str, ...], float]]
    norms: list[float]
    length: int


def document_frequencies(references: Sequence[Sequence[str]]) -> DocumentFrequencies:
    """The document frequencies of a corpus of references, one list per example, words parted by blanks."""
    if not len(references):
        raise DataError("no references were given; document frequencies need at least one example")
    counts: Ngrams = Counter()
    for several in references:
        if isinstance(several, str):
            raise DataError("the references of an example are one string; a list of strings was expected")
        counts.update({gram for text in several for one in ngrams(text.split()) for gram in one})
    return DocumentFrequencies(counts, len(references))


def cider(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> Score:
    """CIDEr as papers report it (pycocoevalcap's, the same as `cider_d`)."""
    return cider_d(predictions, references, frequencies)


def cider_d(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> Score:
    """CIDEr-D of N captions, in 0..10; the corpus score is the mean.

    `frequencies` default to those of `references`. Raises DataError for empty or unequal input, and where all
    references are empty.
    """
    return _mean_similarity(predictions, references, frequencies, _clipped_similarity)


def cider_plain(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    frequencies: DocumentFrequencies | None = None,
) -> Score:
    """The paper's CIDEr, without clipping and length penalty, in 0..10; arguments and errors as `cider_d`."""
    return _mean_similarity(predictions, references, frequencies, _cosine_similarity)


def _mean_similarity(predictions, references, frequencies: DocumentFrequencies | None, similarity) -> Score:
    check_captions(predictions, references)
    if frequencies is None:
        frequencies = document_frequencies(references)
        if not frequencies.counts:
            raise DataError("all references are empty; CIDEr needs words to weigh")
    per_example = np.zeros(len(predictions))
    for index, (prediction, several) in enumerate(zip(predictions, references, strict=True)):
        vector = _vector(prediction, frequencies)
        total = math.fsum(similarity(vector, _vector(text, frequencies)) for text in several)
        per_example[index] = 10 * total / len(several)
    return Score(float(per_example.mean()), per_example)


def _vector(text: str, frequencies: DocumentFrequencies) -> _Vector:
    words = text.split()
    log_examples = math.log(frequencies.examples)
    counts = frequencies.counts
    weights = [
        {gram: count * (log_examples - math.log(max(1, counts[gram]))) for gram, count in one.items()}
        for one in ngrams(words)
    ]
    norms = [math.sqrt(math.fsum(weight * weight for weight in one.values())) for one in weights]
    return _Vector(weights, norms, max(0, len(words) - 1))


def _clipped_similarity(prediction: _Vector, reference: _Vector) -> float:
    penalty = math.exp(-((prediction.length - reference.length) ** 2) / (2 * _SIGMA**2))
    return _similarity(prediction, reference, lambda ours, theirs: min(ours, theirs) * theirs) * penalty


def _cosine_similarity(prediction: _Vector, reference: _Vector) -> float:
    return _similarity(prediction, reference, lambda ours, theirs: ours * theirs)


def _similarity(prediction: _Vector, reference: _Vector, product) -> float:
    """Mean over n = 1..4 of the summed products of shared weights, divided by both norms."""
    total = 0.0
    for ours, theirs, our_norm, their_norm in zip(
        prediction.weights, reference.weights, prediction.norms, reference.norms, strict=True
    ):
        if our_norm and their_norm:
            shared = math.fsum(
                product(weight, theirs[gram]) for gram, weight in ours.items() if gram in theirs
            )
            total += shared / (our_norm * their_norm)
    return total / 4
