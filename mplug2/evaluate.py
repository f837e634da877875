"""Evaluation: a recipe's evaluations on held-out examples -> scores with intervals, and what was said.

Every example is scored exactly once, in any number of processes (mplug2.processes), all of which get the
results. Scores are called `image_answer` and, by type, `image_answer/count`;
what `blind` and `chance` are is told in mplug2.evaluations. Choose nothing by the test split: that is what
`validation` is for.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
from rich.progress import Progress

from mplug2 import files, processes
from mplug2.console import Console
from mplug2.data.tokens import Tokenizer
from mplug2.errors import RecipeError, nearest
from mplug2.evaluations import (
    Answering,
    Captioning,
    Classification,
    Completion,
    Evaluation,
    Matching,
    Retrieval,
    TextClassification,
    ZeroShot,
)
from mplug2.inference import Compiled, Inference
from mplug2.network import Network, Parameters, select
from mplug2.recipe import Recipe
from mplug2.scores import Results, Score

__all__ = [
    "Answering",
    "Captioning",
    "Classification",
    "Completion",
    "Evaluation",
    "Matching",
    "Results",
    "Retrieval",
    "Score",
    "TextClassification",
    "ZeroShot",
    "evaluate",
]


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
    compiled: Compiled | None = None,
) -> Results:
    """Runs the recipe's evaluations, or those named in `only`, on the first `limit` examples of `split`, on
    the recipe's mesh (`sharding.Mesh.of_process`).

    `predictions`: a folder that gets one JSON-lines file per evaluation, one object per example. Progress is
    shown on `console`. `compiled`: the outputs of this network with `params`, where there are any already.
    Raises RecipeError for an unknown name, a recipe that measures nothing, or a module that is missing.
    """
    if not recipe.evaluations:
        raise RecipeError(f"recipe {recipe.name} has no evaluations")
    for name in only:
        if name not in recipe.evaluations:
            known = ", ".join(recipe.evaluations)
            raise RecipeError(
                f'recipe {recipe.name} has no evaluation "{name}"; it has {known}'
                + nearest(name, recipe.evaluations)
            )
    chosen = {name: recipe.evaluations[name] for name in only or recipe.evaluations}
    for evaluation in chosen.values():
        for outputs in evaluation.outputs:
            select(outputs, network.configs)
    if compiled is None:
        compiled = Compiled(network, params, recipe.preprocessing, recipe.mesh.of_process())
    inference = Inference(compiled=compiled, recipe=recipe, tokenizer=tokenizer, split=split, limit=limit)
    scores: dict[str, Score] = {}
    # Refreshed by hand: rich's own thread would import while TFDS, loaded with the data, replaces `import`.
    screen = console or Console(stderr=True, quiet=not processes.first())
    with Progress(console=screen, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("evaluation", total=len(chosen))
        for count, (name, evaluation) in enumerate(chosen.items()):

            def advance(done: int, total: int, name: str = name, count: int = count) -> None:
                progress.update(bar, description=f"{name}, {done} of {total}", completed=count + done / total)
                progress.refresh()

            progress.update(bar, description=name, completed=count, refresh=True)
            measured = evaluation.measure(replace(inference, advance=advance))
            scores |= {name + end: score for end, score in measured.scores.items()}
            if predictions is not None and processes.first():
                predictions.mkdir(parents=True, exist_ok=True)
                lines = [json.dumps(said) + "\n" for said in measured.predictions]
                files.write_text(predictions / f"{name}.jsonl", "".join(lines))
    facts = {
        "split": split,
        "limit": limit,
        "seed": recipe.seed,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "decoding": {name: repr(one.search) for name, one in chosen.items() if hasattr(one, "search")},
    }
    return Results(recipe=recipe.name, tasks=scores, facts=facts)
