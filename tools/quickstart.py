"""`mplug2 quickstart`: what the zoo is, in a few minutes, on real handwriting and without a network.

Composes the shipped modules and scores them on glyphs they never saw; trains the multi-task pretraining
recipe from scratch for a few minutes and scores that too; writes both, with pictures of what was said, to
one page.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from mplug2 import hub, overrides, recipes
from mplug2.arguments import Parser, at_least
from mplug2.console import Console, bold
from mplug2.data.handwriting import Handwriting
from mplug2.evaluate import evaluate
from mplug2.logbook import clock, read_metrics
from mplug2.network import Network, Parameters
from mplug2.predict import Predictor
from mplug2.recipe import Recipe
from mplug2.report import Exhibit, Report, Saying
from mplug2.scores import Results
from mplug2.train import train

RECIPE = "pretrain.quick"
SHIPPED, SCRATCH = "shipped modules", "from scratch, just now"


def main(argv: list[str] | None = None) -> int:
    asked = _parser().parse_args(argv)
    out, console, began = asked.out, Console(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    # Both networks are scored by the same compiled functions: the second time they are read from here.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").resolve()))

    def say(sentence: str) -> None:
        console.print(bold(clock(time.perf_counter() - began)), f" {sentence}", soft_wrap=True)

    recipe = overrides.apply(recipes.find(RECIPE), asked.overrides)
    models: dict[str, tuple[Network, Parameters]] = {}
    scores: dict[str, Results] = {}

    def score(model: str, name: str) -> None:
        network, params = models[model]
        scores[model] = evaluate(
            network, params, recipe, recipe.tokenizer, limit=asked.limit, predictions=out / name
        )
        scores[model].save(out / f"{name}.json")
        scores[model].show(console)

    cards = {module: card for module, card in hub.cards().items() if module in recipe.modules}
    say(f"1 of 4  composing the shipped modules ({', '.join(cards)}) and scoring them on held-out glyphs")
    models[SHIPPED] = hub.compose(*cards.values())
    score(SHIPPED, "shipped")

    say(
        f"2 of 4  training {recipe.name} from scratch: {recipe.steps} steps of {', '.join(recipe.objectives)}"
    )
    outcome = train(recipe, out / "run", source=RECIPE, overrides=asked.overrides)
    if not outcome.finished:
        return 130
    network = Network(recipe.modules, recipe.execution)
    models[SCRATCH] = network, outcome.params | outcome.ema

    say("3 of 4  scoring what was trained")
    score(SCRATCH, "scratch")

    say("4 of 4  drawing the report")
    predictors = {
        model: Predictor(network, params, recipe.tokenizer, recipe.preprocessing)
        for model, (network, params) in models.items()
    }
    report = Report(
        title="mplug2: quickstart",
        about=_about(recipe, scores[SCRATCH], outcome.step, time.perf_counter() - began),
        scores={model: results.as_json()["tasks"] for model, results in scores.items()},
        curves=_curves(out / "run", recipe),
        exhibits=_exhibits(predictors, frames=1, count=18)
        + _exhibits(predictors, frames=recipe.preprocessing.frames),
    )
    report.write(out / "report.html")
    say(f"done. The report is {(out / 'report.html').resolve()}")
    return 0


def _about(recipe: Recipe, results: Results, steps: int, seconds: float) -> list[str]:
    facts = {**results.facts, "commit": results.commit, "steps": steps, "minutes": round(seconds / 60, 1)}
    decoding = facts.pop("decoding", {})
    return [
        "Digits that people wrote, composed into pictures and short videos. Every score is on glyphs of the "
        "test split. The shipped modules were trained longer, by the recipe "
        f"{recipes.find('pretrain').name}.",
        "; ".join(f"{name}: {value}" for name, value in facts.items()),
        "Decoding: " + ", ".join(sorted(set(map(str, decoding.values())))),
    ]


def _curves(run: Path, recipe: Recipe) -> dict[str, list[tuple[int, float]]]:
    lines = read_metrics(run)
    return {name: [(int(line["step"]), line[f"loss/{name}"]) for line in lines] for name in recipe.objectives}


def _exhibits(predictors: Mapping[str, Predictor], *, frames: int, count: int = 10) -> list[Exhibit]:
    """Test scenes with a caption and an answer by every model; half of them are ones that some model gets
    wrong."""
    source = Handwriting("scene", frames).source("test")
    examples = [source[index] for index in range(min(len(source), 8 * count))]
    clips = np.stack([example["clips"] for example in examples])
    said = {}
    for model, predictor in predictors.items():
        captions = predictor.caption(clips)
        answers = predictor.answer(clips, [example["question"] for example in examples])
        said[model] = [
            (Saying("", caption, example["caption"]), Saying(example["question"], answer, example["answer"]))
            for caption, answer, example in zip(captions, answers, examples, strict=True)
        ]
    exhibits = [
        Exhibit(example["clips"], {model: sayings[index] for model, sayings in said.items()})
        for index, example in enumerate(examples)
    ]
    wrong = [one for one in exhibits if not one.right]
    return (wrong[: count // 2] + [one for one in exhibits if one.right])[:count]


def _parser() -> Parser:
    parser = Parser(
        prog="mplug2 quickstart",
        description="Score the shipped modules on unseen handwriting, train the pretraining recipe from "
        "scratch for a few minutes, score that too, and write a page that shows both. "
        "Started again, it continues.",
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value", help=f"fields of the recipe {RECIPE}")
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="where everything goes (default: quickstart)"
    )
    parser.add_argument(
        "--limit", type=at_least(1), default=300, help="test examples of each evaluation (default: 300)"
    )
    return parser
