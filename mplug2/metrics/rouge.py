"""ROUGE-L (Lin, 2004): F-measure of the longest common subsequence, beta 1.2, as the COCO caption
evaluation takes it.

Over several references the best recall and the best precision are taken separately (Lin's definition), so
they may come from two references.
"""

from collections.abc import Sequence

import numpy as np

from mplug2.metrics.captions import Score, check_captions

_BETA_SQUARED = 1.2**2


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]], coco: bool = False) -> Score:
    """ROUGE-L of N captions, words parted by blanks; in 0..1; the corpus score is the mean.

    `coco` reproduces pycocoevalcap's splitting at every single blank: doubled, leading or trailing blanks
    make empty words, a tab does not part words, and an empty caption scores 1 against an empty reference.
    Otherwise any run of blanks parts two words and an empty caption scores 0. Raises DataError for empty or
    unequal input.
    """
    check_captions(predictions, references)
    separator = " " if coco else None
    per_example = np.array(
        [
            _example(one.split(separator), [text.split(separator) for text in several])
            for one, several in zip(predictions, references, strict=True)
        ],
        dtype=np.float64,
    )
    return Score(float(per_example.mean()), per_example)


def _example(words: list[str], references: list[list[str]]) -> float:
    if not words:
        return 0.0
    common = [longest_common_subsequence(words, reference) for reference in references]
    precision = max(common) / len(words)
    recall = max(
        (length / len(reference) for length, reference in zip(common, references, strict=True) if reference),
        default=0.0,
    )
    if not precision or not recall:
        return 0.0
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, by bit-parallel dynamic programming: one big-integer step per word of `other`."""
    places: dict[str, int] = {}
    for index, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << index
    everything = (1 << len(one)) - 1
    row = everything
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & everything
    return len(one) - row.bit_count()
