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
from mplug2.data.stream import Mixture

SAMPLE = 10_000
"""Training examples that are counted, drawn from the whole train split, always the same ones."""

SEEN = 1_000
"""The same where pixels have to be read for them."""


def training_examples(data: Any, *fields: str) -> Iterator[Mapping[str, Any]]:
    """Examples of the train split that hold `fields`; without pixels, which then need not be there, where the
    data can tell its texts alone."""
    for part in data.parts if isinstance(data, Mixture) else [data]:
        source = part.written("train") if hasattr(part, "written") else part.source("train")
        look, most = source.__getitem__, SEEN
        if hasattr(source, "texts") and len(source) and set(fields) <= set(source.texts(0)):
            look, most = source.texts, SAMPLE
        # Drawn, not every so many: a split may be in an order that repeats.
        drawn = random.Random(0).sample(range(len(source)), min(most, len(source)))
        yield from map(look, sorted(drawn))


def most_frequent(values: Iterable[Any]) -> Any:
    """None of nothing."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


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

    return BlindAnswers(
        best(questions), best(types), most_frequent(sum(types.values(), Counter()).elements()) or ""
    )


def random_captions(captions: Sequence[str], count: int) -> list[str]:
    """`count` training captions, drawn with replacement, always the same ones."""
    return random.Random(0).choices(captions, k=count)


def answer_chance(data: Any, type: str) -> float | None:
    """The exact share that a reader of the words alone gets right, where the data's grammar is known."""
    return grammar.chance(type, data.frames) if isinstance(data, Handwriting) else None
