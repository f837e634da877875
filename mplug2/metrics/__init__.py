"""Scores of captions, answers and retrieval, in Python and numpy; equal to the public reference
implementations.

Caption metrics take `predictions` (N texts) and `references` (N lists of texts) whose words are parted by
blanks: raw captions go through `tokenize_all` first. Each returns the corpus score and the score of every
example, which `interval` takes.
"""

from mplug2.metrics.answers import equal_strings, exact_match, normalise_answer, vqa_accuracy
from mplug2.metrics.bleu import BleuScore, bleu
from mplug2.metrics.captions import Metric, Score
from mplug2.metrics.cider import DocumentFrequencies, cider, cider_d, cider_plain, document_frequencies
from mplug2.metrics.intervals import Interval, bootstrap, interval, jackknife, wilson
from mplug2.metrics.meteor import meteor
from mplug2.metrics.ptb import tokenize, tokenize_all
from mplug2.metrics.retrieval import Recall, recall_at_k
from mplug2.metrics.rouge import rouge_l

__all__ = [
    "BleuScore",
    "DocumentFrequencies",
    "Interval",
    "Metric",
    "Recall",
    "Score",
    "bleu",
    "bootstrap",
    "cider",
    "cider_d",
    "cider_plain",
    "document_frequencies",
    "equal_strings",
    "exact_match",
    "interval",
    "jackknife",
    "meteor",
    "normalise_answer",
    "recall_at_k",
    "rouge_l",
    "tokenize",
    "tokenize_all",
    "vqa_accuracy",
    "wilson",
]
