"""Scores with intervals and baselines, and the results of an evaluation as a table and as JSON.

Shares are in 0..1, CIDEr in 0..10. `low` and `high` bound 95%: bootstrap over examples (a mean's),
delete-a-group jackknife (of what is not a mean, corpus BLEU).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mplug2 import files
from mplug2.console import Console
from mplug2.metrics import bootstrap
from mplug2.run import commit


@dataclass(frozen=True, kw_only=True)
class Score:
    """`blind`: what a text-only baseline measured on the training data reaches; `chance`: a guess, by
    construction (None where no data set says it); `n`: scored examples, for retrieval also the size of the
    gallery."""

    metric: str
    value: float
    low: float
    high: float
    blind: float
    chance: float | None
    n: int


def mean_score(
    metric: str, values: Sequence[float] | np.ndarray, *, blind: float, chance: float | None
) -> Score:
    """The score of per-example values."""
    low, high = bootstrap(values)
    return Score(
        metric=metric,
        value=float(np.mean(values)),
        low=low,
        high=high,
        blind=blind,
        chance=chance,
        n=len(values),
    )


def corpus_score(
    metric: str, measure: Callable[[Sequence[int]], float], count: int, *, blind: float, chance: float | None
) -> Score:
    """The score in 0..1 of a corpus, of which `measure` gives that of the examples at some of the indices
    0..count-1."""
    everything, groups = range(count), min(10, count)
    value = measure(everything)
    left_out = (
        [measure([i for i in everything if i % groups != group]) for group in range(groups)]
        if groups > 1
        else []
    )
    # The groups are disjoint: leaving one out moves the score by 1/groups of what a new sample would.
    deviation = math.sqrt((groups - 1) * float(np.var(left_out))) if left_out else 0.0
    low, high = max(0.0, value - 1.96 * deviation), min(1.0, value + 1.96 * deviation)
    return Score(metric=metric, value=value, low=low, high=high, blind=blind, chance=chance, n=count)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Scores by name, `image_answer/count`; `facts`: split, decoding, machine and so on, to the top level of
    the JSON."""

    recipe: str
    tasks: Mapping[str, Score]
    commit: str = field(default_factory=commit)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        tasks = {name: asdict(score) for name, score in self.tasks.items()}
        return {"recipe": self.recipe, "commit": self.commit, **self.facts, "tasks": tasks}

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        files.write_text(path, json.dumps(self.as_json(), indent=2) + "\n")

    def show(self, console: Console) -> None:
        """Prints the table, never cut: a narrow or piped screen gets long lines."""
        table = self.table()
        needed = console.measure(table, options=console.options.update(width=1000)).maximum
        before, console.width = console.width, max(console.width, needed)  # `print` takes less, never more
        console.print(table)
        console.width = before

    def table(self) -> Table:
        """A table for the screen."""
        table = Table(title=f"{self.recipe}, {self.facts.get('split', 'test')} split", title_justify="left")
        table.add_column("task", no_wrap=True)
        table.add_column("metric", no_wrap=True)
        for column in ("score", "95% interval", "blind", "chance", "n"):
            table.add_column(column, justify="right")
        for name, score in self.tasks.items():
            low, high, value, blind = (
                said(score.metric, number) for number in (score.low, score.high, score.value, score.blind)
            )
            chance = "" if score.chance is None else said(score.metric, score.chance)
            table.add_row(name, score.metric, value, f"{low} to {high}", blind, chance, str(score.n))
        return table


def said(metric: str, value: float) -> str:
    """A value for people: shares in percent, CIDEr, which is none, as it is."""
    return f"{value:.2f}" if "CIDEr" in metric else f"{100 * value:.1f}%"
