"""What captions score: the forms in which they are compared with references, one dataclass a form.

`PlainWords` is the zoo's own. `CocoWords` is that of published numbers: words as the COCO caption evaluation
parts them (Chen et al. 2015, arXiv:1504.00325), and METEOR beside the others. A form turns texts into words
parted by blanks; the metrics are the same.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mplug2 import blind
from mplug2.metrics import bleu, cider, document_frequencies, exact_match, rouge_l, tokenize_all
from mplug2.metrics.meteor import best_alignments, score, summed
from mplug2.scores import Groups, Score, corpus_score, mean_score, no_score

_LABELS = {
    "/exact": "exact match",
    "/bleu4": "BLEU-4",
    "/meteor": "METEOR (exact+stem)",
    "/rouge_l": "ROUGE-L",
    "/cider": "CIDEr",
}


class Form(Protocol):
    """How texts become words, and whether METEOR, the slowest metric, is asked for."""

    @property
    def meteor(self) -> bool: ...

    def words(self, texts: Sequence[str]) -> list[str]: ...


@dataclass(frozen=True)
class PlainWords:
    """Lower case, parted by blanks: for captions without marks, as handwriting's are."""

    meteor: bool = False

    def words(self, texts: Sequence[str]) -> list[str]:
        return [" ".join(text.lower().split()) for text in texts]


@dataclass(frozen=True)
class CocoWords:
    """Penn Treebank words in lower case, marks dropped."""

    meteor: bool = True

    def words(self, texts: Sequence[str]) -> list[str]:
        return tokenize_all(texts)


def in_words(form: Form, references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lists of raw references, worded in one go."""
    worded = iter(form.words([text for several in references for text in several]))
    return [[next(worded) for _ in several] for several in references]


def caption_scores(
    said: Sequence[str],
    references: Sequence[Sequence[str]],
    training: Sequence[str],
    *,
    meteor: bool,
    groups: Groups | None = None,
) -> dict[str, Score]:
    """`/exact`, `/bleu4`, `/meteor` (if asked for), `/rouge_l` and `/cider` of N captions against one or
    several references each, all of them words parted by blanks. A metric that not even the references
    themselves could score by has no score.

    `blind` is what the most frequent of the `training` captions scores for everything, `chance` what training
    captions drawn at random do. `groups` says which captions are of one video or picture.
    """
    constant = [blind.most_frequent(training) or ""] * len(said)
    guessed = blind.random_captions(training, len(said)) if training else constant
    everything = range(len(said))

    def baselines(metric: Callable[[Sequence[str]], float]) -> dict[str, float | None]:
        if not training:
            return {"blind": None, "chance": None}
        return {"blind": metric(constant), "chance": metric(guessed)}

    def mean(label: str, metric: Callable[..., Any], most: float = 1.0) -> Score:
        each = metric(said, references).per_example
        told = baselines(lambda texts: metric(texts, references).value)
        return mean_score(label, each, groups=groups, most=most, **told)

    def corpus(label: str, measure: Callable[[Sequence[int]], float], **told: float | None) -> Score:
        return corpus_score(label, measure, len(said), groups=groups, **told)

    def bleu4(texts: Sequence[str], indices: Sequence[int]) -> float:
        return bleu([texts[i] for i in indices], [references[i] for i in indices]).value

    def aligned() -> Score:
        pairs = best_alignments(said, references)  # once: the interval adds up parts of them
        return corpus(
            _LABELS["/meteor"],
            lambda indices: score(summed([pairs[i] for i in indices])),
            **baselines(lambda texts: score(summed(best_alignments(texts, references)))),
        )

    words = [text.split() for several in references for text in several]
    if not any(words):
        why = "no reference holds a word"
        scores = {name: no_score(label, why, len(said)) for name, label in _LABELS.items()}
        return scores if meteor else {name: one for name, one in scores.items() if name != "/meteor"}
    scores = {"/exact": mean(_LABELS["/exact"], exact_match)}
    if max(map(len, words)) < 4:
        scores["/bleu4"] = no_score(_LABELS["/bleu4"], "no reference has four words", len(said))
    else:
        told = baselines(lambda texts: bleu4(texts, everything))
        scores["/bleu4"] = corpus(_LABELS["/bleu4"], functools.partial(bleu4, said), **told)
    if meteor:
        scores["/meteor"] = aligned()
    scores["/rouge_l"] = mean(_LABELS["/rouge_l"], rouge_l)
    if document_frequencies(references).weigh:
        scores["/cider"] = mean(_LABELS["/cider"], cider, most=10.0)
    else:
        why = "words weigh by how few examples hold them, and here every example holds them all"
        scores["/cider"] = no_score(_LABELS["/cider"], why, len(said))
    return scores
