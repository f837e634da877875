"""Baselines that see no pixels, counted in training data: what the words alone are worth. No model is
involved.

Answers: the most frequent training answer to the very same question text, else to its type, else of all.
Captions: the most frequent training caption for every picture; and, as chance, a training caption drawn at
random. Classes: the most frequent training class.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mplug2.data import grammar
from mplug2.data.handwriting import Handwriting

SAMPLE = 10_000
"""Training examples that are counted, spread evenly over the train split."""


def training_examples(data: Any) -> Iterator[Mapping[str, Any]]:
    """Examples of the train split; without pixels, which then need not be there, where the data can tell its
    texts alone."""
    source = data.written("train") if hasattr(data, "written") else data.source("train")
    look = getattr(source, "texts", source.__getitem__)
    return (look(index) for index in range(0, len(source), max(1, -(-len(source) // SAMPLE))))


def most_frequent(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


@dataclass(frozen=True)
class BlindAnswers:
    """Answers by question text, by type, and for everything else."""

    by_question: Mapping[str, str]
    by_type: Mapping[str, str]
    otherwise: str

    def __call__(self, question: str, type: str) -> str:
        return self.by_question.get(question) or self.by_type.get(type) or self.otherwise


def blind_answers(seen: Iterable[tuple[str, str, str]]) -> BlindAnswers:
    """Counted over training examples: (question, type, answer)."""
    questions: dict[str, Counter[str]] = defaultdict(Counter)
    types: dict[str, Counter[str]] = defaultdict(Counter)
    for question, type, answer in seen:
        questions[question][answer] += 1
        types[type][answer] += 1

    def best(counts: Mapping[str, Counter[str]]) -> dict[str, str]:
        return {name: counter.most_common(1)[0][0] for name, counter in counts.items()}

    return BlindAnswers(best(questions), best(types), sum(types.values(), Counter()).most_common(1)[0][0])


def random_captions(captions: Sequence[str], count: int) -> list[str]:
    """`count` training captions, drawn with replacement, always the same ones."""
    return random.Random(0).choices(captions, k=count)


def answer_chance(data: Any, type: str) -> float | None:
    """The exact share that a reader of the words alone gets right, where the data's grammar is known."""
    return grammar.chance(type, data.frames) if isinstance(data, Handwriting) else None
