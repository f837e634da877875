"""METEOR 1.5 (Denkowski and Lavie, WMT 2014) for English, in its exact + stem form: no synonyms, no
paraphrases.

The full form needs WordNet and METEOR's paraphrase table, which are not shipped; a score is therefore a
little lower than the published METEOR of the same captions. Say "METEOR (exact+stem)" beside it. It follows
the reference program run with `-l en -norm -m "exact stem"`.

One difference is known: where a prediction and a reference both repeat many words in another order, the beam
search may keep other alignments than that program, and the number of chunks may differ by one or two (in 2 of
892 examples of the oracle corpora, by 0.004).

Words of the prediction are aligned with words of the reference, equal words (weight 1) or equal stems
(weight 0.6), so that as many as possible are matched, in as few contiguous chunks as possible, at the least
distance. Precision and recall weigh content words 0.75 and function words 0.25.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from mplug2.errors import DataError, nearest
from mplug2.metrics.captions import Score, check_captions
from mplug2.metrics.meteor_words import FUNCTION_WORDS, meteor_words
from mplug2.metrics.stemmer import stem

_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_TENTHS = (10, 6)
_WEIGHTS = np.array(_TENTHS) / 10
_BEAM = 40
_FORMS = ("exact+stem", "exact")


@dataclass(frozen=True)
class Alignment:
    """Counts of one comparison, prediction first: words, function words, and matches by module (exact,
    stem).
    """

    words: tuple[int, int]
    function_words: tuple[int, int]
    content_matches: np.ndarray
    """float64 (2 sides, 2 modules)"""
    function_matches: np.ndarray
    chunks: int


def meteor(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    form: Literal["exact+stem", "exact"] = "exact+stem",
) -> Score:
    """METEOR of N captions in 0..1; `form` "exact" leaves stems out as well.

    Of several references the best scoring one counts, the first among equals. The corpus score is not the
    mean: as in the reference program the counts of all examples are summed first. Raises DataError for
    empty or unequal input.
    """
    check_captions(predictions, references)
    if form not in _FORMS:
        raise DataError(f'form is "{form}"; expected one of {", ".join(_FORMS)}{nearest(form, _FORMS)}')
    chosen = best_alignments(predictions, references, form)
    return Score(score(summed(chosen)), np.array([score(one) for one in chosen]))


def best_alignments(
    predictions: Sequence[str], references: Sequence[Sequence[str]], form: str = "exact+stem"
) -> list[Alignment]:
    """Of each prediction, its alignment with the reference that it scores best with: what `meteor` counts.
    `summed` adds up those of some examples."""
    chosen = []
    for prediction, several in zip(predictions, references, strict=True):
        words = _words(prediction)
        chosen.append(max((align(words, _words(text), form) for text in several), key=score))
    return chosen


@lru_cache(maxsize=65536)
def _words(text: str) -> tuple[str, ...]:
    return tuple(meteor_words(text.replace("|||", "")))  # the separator of METEOR's own input format


def score(alignment: Alignment) -> float:
    """The METEOR score of an alignment, or of the sum of several."""
    sides = []
    for side in range(2):
        words, function = alignment.words[side], alignment.function_words[side]
        total = _DELTA * (words - function) + (1 - _DELTA) * function
        content = _DELTA * alignment.content_matches[side] + (1 - _DELTA) * alignment.function_matches[side]
        sides.append(float(_WEIGHTS @ content) / total if total else 0.0)
    precision, recall = sides
    if not precision or not recall:
        return 0.0
    matched = (alignment.content_matches + alignment.function_matches).sum(axis=1)
    fragmentation = alignment.chunks / float(matched.mean())
    if _one_chunk(alignment):
        fragmentation = 0.0
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    return mean * (1 - _GAMMA * fragmentation**_BETA)


def _one_chunk(alignment: Alignment) -> bool:
    """Whether every word of both sides is matched, in one piece: nothing is fragmented then."""
    matched = (alignment.content_matches + alignment.function_matches).sum(axis=1)
    return alignment.chunks == 1 and tuple(matched) == alignment.words


def summed(alignments: Sequence[Alignment]) -> Alignment:
    """Added counts; the chunks of a perfect example count as none."""
    return Alignment(
        words=(sum(one.words[0] for one in alignments), sum(one.words[1] for one in alignments)),
        function_words=(
            sum(one.function_words[0] for one in alignments),
            sum(one.function_words[1] for one in alignments),
        ),
        content_matches=np.sum([one.content_matches for one in alignments], axis=0),
        function_matches=np.sum([one.function_matches for one in alignments], axis=0),
        chunks=sum(0 if _one_chunk(one) else one.chunks for one in alignments),
    )


class _Path(NamedTuple):
    """A partial alignment, walked along the reference; `pairs` is a linked list, its last pair first."""

    tenths: int
    """sum of the weights of the matches, in tenths"""
    chunks: int
    distance: int
    expected: int
    """the prediction word that would continue the open chunk; -1 when none is open"""
    used: int
    """prediction words taken, as bits"""
    pairs: tuple | None

    def rank(self) -> tuple[int, int, int]:
        """Smaller is better: weight of the matches (whole numbers, as the reference program has it),
        chunks, distance.
        """
        return -(self.tenths // 10), self.chunks, self.distance


def align(prediction: Sequence[str], reference: Sequence[str], form: str = "exact+stem") -> Alignment:
    """The best alignment of two lists of words."""
    pairs, chunks = _search(_matches(prediction, reference, form), len(prediction))
    content, function = np.zeros((2, 2)), np.zeros((2, 2))
    for ours, theirs, module in pairs:
        for side, word in enumerate((prediction[ours], reference[theirs])):
            (function if word in FUNCTION_WORDS else content)[side, module] += 1
    return Alignment(
        words=(len(prediction), len(reference)),
        function_words=(
            sum(word in FUNCTION_WORDS for word in prediction),
            sum(word in FUNCTION_WORDS for word in reference),
        ),
        content_matches=content,
        function_matches=function,
        chunks=chunks,
    )


def _matches(prediction: Sequence[str], reference: Sequence[str], form: str) -> list[list[tuple[int, int]]]:
    """For each reference word, the prediction words it may be matched with, and by which module."""
    exact_only = form == "exact" or list(prediction) == list(reference)
    places: dict[str, list[int]] = {}
    stems: dict[str, list[int]] = {}
    for index, word in enumerate(prediction):
        places.setdefault(word, []).append(index)
        if not exact_only:
            stems.setdefault(stem(word), []).append(index)
    result = []
    for word in reference:
        found = [(index, 0) for index in places.get(word, [])]
        if not exact_only:
            found += [(index, 1) for index in stems.get(stem(word), []) if prediction[index] != word]
        result.append(found)
    return result


def _search(matches: list[list[tuple[int, int]]], length: int) -> tuple[list[tuple[int, int, int]], int]:
    """Beam search from the first reference word to the last: (prediction word, reference word, module), and
    chunks.
    """
    coverage = [0] * length
    for found in matches:
        for ours, _ in found:
            coverage[ours] += 1
    certain = {
        theirs: found[0]
        for theirs, found in enumerate(matches)
        if len(found) == 1 and coverage[found[0][0]] == 1
    }
    paths = [_Path(0, 0, 0, -1, sum(1 << ours for ours, _ in certain.values()), None)]
    for theirs, found in enumerate(matches):
        if theirs in certain:
            paths = [_extend(path, *certain[theirs], theirs) for path in paths[:_BEAM]]
        else:
            following: list[_Path] = []
            for path in paths[:_BEAM]:
                following += [
                    _extend(path, ours, module, theirs) for ours, module in found if not path.used >> ours & 1
                ]
                following.append(_close(path))
            paths = following
        if len(paths) > 1:
            paths.sort(key=_Path.rank)
    best = min(map(_close, paths), key=_Path.rank)
    pairs, link = [], best.pairs
    while link is not None:
        pairs.append(link[0])
        link = link[1]
    return pairs, best.chunks


def _extend(path: _Path, ours: int, module: int, theirs: int) -> _Path:
    return _Path(
        path.tenths + _TENTHS[module],
        path.chunks + (path.expected not in (-1, ours)),
        path.distance + abs(ours - theirs),
        ours + 1,
        path.used | 1 << ours,
        ((ours, theirs, module), path.pairs),
    )


def _close(path: _Path) -> _Path:
    """The path after a reference word without a match: an open chunk has ended."""
    if path.expected == -1:
        return path
    return _Path(path.tenths, path.chunks + 1, path.distance, -1, path.used, path.pairs)
