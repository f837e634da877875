"""Scores with intervals and baselines, and the results of an evaluation as a table and as JSON.

Shares are in 0..1, CIDEr in 0..10. `low` and `high` bound 95% (mplug2.metrics.intervals).
"""

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mplug2 import files
from mplug2.console import Console
from mplug2.errors import RecipeError
from mplug2.metrics import interval, jackknife
from mplug2.run import commit

Groups = Sequence[Hashable]
"""For each example what was seen with it: questions about one video or picture are resampled together."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """`value` is None where there is no score, `low` and `high` where there is no interval; `why` then says
    why. `blind`: what a text-only baseline measured on the training data reaches; `chance`: a guess, by
    construction (both None where no data set says it); `n`: scored examples, for retrieval also the size of
    the gallery."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    blind: float | None
    chance: float | None
    n: int
    why: str = ""


def mean_score(
    metric: str,
    values: Sequence[float] | np.ndarray,
    *,
    blind: float | None,
    chance: float | None,
    groups: Groups | None = None,
    most: float = 1.0,
) -> Score:
    """The score of per-example values, each from 0 to `most`."""
    return _score(
        metric,
        float(np.mean(values)),
        interval(values, groups, most=most),
        blind=blind,
        chance=chance,
        n=len(values),
    )


def corpus_score(
    metric: str,
    measure: Callable[[Sequence[int]], float],
    count: int,
    *,
    blind: float | None,
    chance: float | None,
    groups: Groups | None = None,
) -> Score:
    """The score in 0..1 of a corpus, of which `measure` gives that of the examples at some of the indices
    0..count-1."""
    value = measure(range(count))
    return _score(metric, value, jackknife(measure, count, groups), blind=blind, chance=chance, n=count)


def no_score(metric: str, why: str, n: int) -> Score:
    """Of `n` examples that have none."""
    return Score(metric=metric, value=None, low=None, high=None, blind=None, chance=None, n=n, why=why)


def _score(metric: str, value: float, bounds: Sequence[float] | None, **told: Any) -> Score:
    if bounds is None:
        why = "no interval: nothing shows how far the score would move with other examples"
        return Score(metric=metric, value=value, low=None, high=None, why=why, **told)
    return Score(metric=metric, value=value, low=bounds[0], high=bounds[1], **told)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Scores by name, `image_answer/count`; `facts`: split, decoding, machine and so on, to the top level of
    the JSON."""

    recipe: str
    tasks: Mapping[str, Score]
    commit: str = field(default_factory=commit)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """The number that a score has. Raises RecipeError where it has none, LookupError where there is no
        such score."""
        score = self.tasks[name]
        if score.value is None:
            raise RecipeError(f"there is no score {name}: {score.why}")
        return score.value

    def as_json(self) -> dict[str, Any]:
        tasks = {
            name: {key: value for key, value in asdict(score).items() if key != "why" or value}
            for name, score in self.tasks.items()
        }
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
        table = Table(
            title=f"{self.recipe}, {self.facts.get('split', 'test')} split",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("task", no_wrap=True)
        table.add_column("metric", no_wrap=True)
        for column in ("score", "95% interval", "blind", "chance", "n"):
            table.add_column(column, justify="right")
        for name, score in self.tasks.items():
            low, high, value, blind, chance = (
                said(score.metric, number)
                for number in (score.low, score.high, score.value, score.blind, score.chance)
            )
            bounds = f"{low} to {high}" if low else ""
            table.add_row(name, score.metric, value or "no score", bounds, blind, chance, str(score.n))
        table.caption = "\n".join(f"{name}: {score.why}" for name, score in self.tasks.items() if score.why)
        return table


def said(metric: str, value: float | None) -> str:
    """A value for people: shares in percent, CIDEr, which is none, as it is; nothing for None."""
    if value is None:
        return ""
    return f"{value:.2f}" if "CIDEr" in metric else f"{100 * value:.1f}%"
