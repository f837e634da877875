"""Evaluation: a recipe's evaluations on held-out examples -> scores with intervals, and what was said.

Each evaluation (mplug2.evaluations) runs one compiled function on batches of a fixed size, the last one filled
up; every example is scored exactly once. Scores are called `image_answer` and, by type, `image_answer/count`.
Choose nothing by the test split: that is what `validation` is for.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from mplug2.data.stream import Mixture, collate
from mplug2.data.tokens import Tokenizer
from mplug2.errors import DataError, RecipeError, nearest
from mplug2.generate import Search, decode
from mplug2.network import Network, Parameters, select
from mplug2.recipe import Recipe
from mplug2.roles import Array, Decoder
from mplug2.scores import Results, Score

Example = Mapping[str, Any]
Batch = Mapping[str, Array]


class Measured(NamedTuple):
    """Scores by the end of their name ("" or "/count"), and for each example what was said: JSON-able, `index` first."""

    scores: dict[str, Score]
    predictions: list[dict[str, Any]]


class Evaluation(Protocol):
    def measure(self, bench: "Bench") -> Measured: ...


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What an evaluation works with. `advance` is told how many examples more are done, of how many."""

    network: Network
    params: Parameters
    recipe: Recipe
    tokenizer: Tokenizer
    split: str
    limit: int | None
    advance: Callable[[int, int], None]

    def run(
        self,
        forward: Callable[..., Any],
        data: Any,
        lengths: Mapping[str, int],
        batch: int,
        prepare: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict,
    ) -> tuple[list[Example], Any]:
        """Every example of the split (without pixels), and what `forward(batch, **modules)` gives for it: arrays whose
        first axis is that of the examples. `prepare` changes a batch before it is computed."""
        compute = self.compile(forward)
        sources = [part.source(self.split) for part in (data.parts if isinstance(data, Mixture) else [data])]
        places = [(source, index) for source in sources for index in range(len(source))][: self.limit]
        if not places:
            raise DataError(f"the {self.split} split of {data} holds no example")
        examples, outputs = [], []
        for start in range(0, len(places), batch):
            rows = [source[index] for source, index in places[start : start + batch]]
            full = collate(rows + rows[:1] * (batch - len(rows)), lengths, self.tokenizer, seed=0)
            computed = jax.device_get(compute(prepare(full)))
            outputs.append(jax.tree.map(lambda values: values[: len(rows)], computed))
            examples += [{name: value for name, value in row.items() if name != "clips"} for row in rows]
            self.advance(len(examples), len(places))
        return examples, jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)

    def compile(self, forward: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
        """`forward(batch, **modules)` on normalised clips, with the modules that it names, as a function of a batch."""
        params = select(forward, self.params)

        @jax.jit
        def compute(params: Parameters, batch: dict[str, Array]) -> Any:
            if "clips" in batch:
                batch = batch | {"clips": self.recipe.preprocessing.to_float(batch["clips"])}
            return forward(batch, **self.network.bind(params))

        return functools.partial(compute, params)

    def write(
        self, decoder: Decoder, memory: Array, mask: Array | None, search: Search, batch: Batch
    ) -> Array:
        """The best text for each memory: ids `B 1+length`."""
        special = self.tokenizer.table()
        key = jax.random.fold_in(jax.random.key(self.recipe.seed), batch["index"][0])
        found = decode(decoder, memory, mask, search, begin=special["begin"], end=special["end"], key=key)
        return found.ids[:, 0]

    def texts(self, ids: np.ndarray) -> list[str]:
        return [self.tokenizer.decode(row) for row in ids]


def evaluate(
    network: Network,
    params: Parameters,
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    split: str = "test",
    only: Sequence[str] = (),
    limit: int | None = None,
    predictions: Path | None = None,
    console: Console | None = None,
) -> Results:
    """Runs the recipe's evaluations, or those named in `only`, on the first `limit` examples of `split`.

    `predictions`: a folder that gets one JSON-lines file per evaluation, one object per example. Progress is shown on
    `console`. Raises RecipeError for an unknown name, a recipe that measures nothing, or a module that is missing.
    """
    if not recipe.evaluations:
        raise RecipeError(f"recipe {recipe.name} has no evaluations")
    for name in only:
        if name not in recipe.evaluations:
            known = ", ".join(recipe.evaluations)
            raise RecipeError(
                f'recipe {recipe.name} has no evaluation "{name}"; it has {known}{nearest(name, recipe.evaluations)}'
            )
    chosen = {name: recipe.evaluations[name] for name in only or recipe.evaluations}
    scores: dict[str, Score] = {}
    with Progress(console=console or Console(stderr=True), transient=True) as progress:
        whole = progress.add_task("evaluation", total=len(chosen))
        for done, (name, evaluation) in enumerate(chosen.items()):

            def advance(examples: int, total: int, name: str = name, done: int = done) -> None:
                progress.update(
                    whole, description=f"{name}, {examples} of {total}", completed=done + examples / total
                )

            bench = Bench(
                network=network,
                params=params,
                recipe=recipe,
                tokenizer=tokenizer,
                split=split,
                limit=limit,
                advance=advance,
            )
            measured = evaluation.measure(bench)
            scores |= {name + end: score for end, score in measured.scores.items()}
            if predictions is not None:
                predictions.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(said) + "\n" for said in measured.predictions]
                (predictions / f"{name}.jsonl").write_text("".join(lines))
    facts = {
        "split": split,
        "limit": limit,
        "seed": recipe.seed,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "decoding": {name: repr(one.search) for name, one in chosen.items() if hasattr(one, "search")},
    }
    return Results(recipe=recipe.name, tasks=scores, facts=facts)
