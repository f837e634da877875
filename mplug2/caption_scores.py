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
from mplug2.metrics import bleu, cider, exact_match, rouge_l, tokenize_all
from mplug2.metrics.meteor import best_alignments, score, summed
from mplug2.scores import Score, corpus_score, mean_score


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
    said: Sequence[str], references: Sequence[Sequence[str]], training: Sequence[str], *, meteor: bool
) -> dict[str, Score]:
    """`/exact`, `/bleu4`, `/meteor` (if asked for), `/rouge_l` and `/cider` of N captions against one or
    several references each, all of them words parted by blanks.

    `blind` is what the most frequent of the `training` captions scores for everything, `chance` what training
    captions drawn at random do.
    """
    constant = [blind.most_frequent(training)] * len(said)
    guessed = blind.random_captions(training, len(said))
    everything = range(len(said))

    def baselines(metric: Callable[[Sequence[str]], float]) -> dict[str, float]:
        return {"blind": metric(constant), "chance": metric(guessed)}

    def mean(label: str, metric: Callable[..., Any]) -> Score:
        each = metric(said, references).per_example
        return mean_score(label, each, **baselines(lambda texts: metric(texts, references).value))

    def bleu4(texts: Sequence[str], indices: Sequence[int]) -> float:
        return bleu([texts[i] for i in indices], [references[i] for i in indices]).value

    bleu_baselines = baselines(lambda texts: bleu4(texts, everything))
    scores = {
        "/exact": mean("exact match", exact_match),
        "/bleu4": corpus_score("BLEU-4", functools.partial(bleu4, said), len(said), **bleu_baselines),
    }
    if meteor:
        aligned = best_alignments(said, references)  # once: the interval adds up parts of them
        scores["/meteor"] = corpus_score(
            "METEOR (exact+stem)",
            lambda indices: score(summed([aligned[i] for i in indices])),
            len(said),
            **baselines(lambda texts: score(summed(best_alignments(texts, references)))),
        )
    return scores | {"/rouge_l": mean("ROUGE-L", rouge_l), "/cider": mean("CIDEr", cider)}
