"""`mplug2 eval [RUN_OR_RECIPE_OR_CARDS] [field=value ...]`: score a run, the shipped modules, or other
cards, with a delta's beside them."""

import argparse
import signal
from dataclasses import replace
from pathlib import Path

import jax

from mplug2 import adapt, hub, opening, overrides, processes, recipes, sharding
from mplug2.arguments import Parser
from mplug2.console import Console
from mplug2.data.pixels import Preprocessing
from mplug2.data.tokens import Tokenizer
from mplug2.errors import RecipeError
from mplug2.hub import bundle
from mplug2.hub.card_tokenizer import tokenizer_of
from mplug2.kernels import available
from mplug2.network import Network, Parameters, parts_of
from mplug2.opening import BUNDLES, CARDS, Kind
from mplug2.predict import preprocessing_of
from mplug2.recipe import Recipe
from mplug2.recipes import runs
from mplug2.run import read_run
from mplug2.trained import restore

SPLITS = ("test", "validation")
DEFAULT = "pretrain"


def main(argv: list[str] | None = None) -> int:
    asked = _parser().parse_intermixed_args(argv)
    words, changes = [], []
    for word in asked.words:
        (changes if "=" in word and not Path(word).exists() else words).append(word)
    if asked.limit is not None and asked.limit < 1:
        raise RecipeError(f"--limit is {asked.limit}, expected at least 1")
    with processes.joined(asked.coordinator, asked.processes, asked.process, asked.patience):
        if jax.distributed.is_initialized():
            # JAX takes SIGTERM for a question that a training asks after every step; here nobody asks it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _evaluate(asked, words or [DEFAULT], changes)
    return 0


def _evaluate(asked: argparse.Namespace, sources: list[str], changes: list[str]) -> None:
    recipe, network, params, tokenizer = opened(sources, changes, asked.recipe, trusted=asked.trust)

    from mplug2.evaluate import evaluate  # after the arguments are known to be right

    screen = Console(quiet=not processes.first())
    if recipe.mesh.of_process().size < recipe.mesh.size:
        screen.print(f"mesh {recipe.mesh} cannot be had in one process here: each takes one device")
    elif jax.process_count() == 1 and (idle := sharding.idle(recipe.mesh.of_process())):
        screen.print(idle)
    results = evaluate(
        network,
        params,
        recipe,
        tokenizer,
        split=asked.split,
        only=asked.only,
        limit=asked.limit,
        predictions=asked.predictions,
    )
    results.show(screen)
    if asked.out is not None and processes.first():
        results.save(asked.out)
        screen.print(f"results: {asked.out}")
    if asked.predictions is not None:
        screen.print(f"predictions: {asked.predictions}")


def opened(
    sources: list[str], changes: list[str], named: str | None = None, *, trusted: bool = False
) -> tuple[Recipe, Network, Parameters, Tokenizer]:
    """What is evaluated: a run directory's newest weights, a bundle by its own recipe (or the one `named`), a
    recipe with the cards it names and the shelf's, or cards (directories of cards, a family of the shelf, the
    delta of one of them) measured by the pretrain recipe, as far as their modules go.

    Raises Mplug2Error that names the nearest recipe or card, or says that a delta is of another base.
    """
    words = [opening.opened(one, "eval", Kind.RUN, *BUNDLES, Kind.RECIPE, *CARDS) for one in sources]
    if len(words) > 1 and (alone := [word for word in words if word.kind not in CARDS]):
        raise RecipeError(
            f"expected one run, bundle or recipe, or cards to evaluate, got {', '.join(sources)}: "
            f"{alone[0].text} is {alone[0].kind.value}"
        )
    word, source = words[0], sources[0]
    if word.kind in BUNDLES:
        return _of_bundle(bundle.load(word.path, _mesh_of(changes)), changes, named)
    if named is not None:
        raise RecipeError(f"--recipe {named} is for a bundle, which {source} is not")
    if word.kind is Kind.RUN:
        run = read_run(word.path)
        recipe = runs.recipe_of(run, changes, trusted=trusted)
        _, network, params = restore(run, recipe)
        return recipe, network, params, recipe.tokenizer
    if word.kind is Kind.RECIPE:
        return _of_shelf(overrides.apply(recipes.find(source), changes))
    return _of_cards(sources, changes)


def _mesh_of(changes: list[str]) -> jax.sharding.Mesh:
    """The mesh that is asked for, known before there is a recipe, so that weights are loaded onto it."""
    fields = [change for change in changes if change.startswith("mesh.")]
    return overrides.apply(recipes.find(DEFAULT), fields).mesh.of_process()


def _of_bundle(
    opened: bundle.Bundle, changes: list[str], named: str | None
) -> tuple[Recipe, Network, Parameters, Tokenizer]:
    """Raises RecipeError where a bundle names a recipe that is a file: reading it would run its author's
    code, which only the user may ask for."""
    name = named or opened.lock.recipe
    if named is None and recipes.is_file(name):
        raise RecipeError(
            f"the bundle was made of the recipe {name!r}, a file whose code would run: read it, then "
            "evaluate with --recipe FILE.py:FUNCTION"
        )
    recipe = overrides.apply(recipes.find(name), (*opened.lock.overrides, *changes))
    bundle.check_recipe(opened, recipe)
    return recipe, opened.network, opened.params, opened.tokenizer


def _of_shelf(recipe: Recipe) -> tuple[Recipe, Network, Parameters, Tokenizer]:
    recipe = hub.on_shelf(recipe)
    params, _ = hub.loaded(recipe, mesh=recipe.mesh.of_process())
    return recipe, Network(recipe.parts, available(recipe.execution)), params, recipe.tokenizer


def _of_cards(sources: list[str], changes: list[str]) -> tuple[Recipe, Network, Parameters, Tokenizer]:
    source, mesh = " ".join(sources), _mesh_of(changes)
    cards, (network, params) = hub.again(
        lambda: ((found := hub.cards(*sources)), hub.compose(*found.values(), mesh=mesh))
    )
    recipe = recipes.find(DEFAULT)
    tokenizer = recipe.tokenizer
    if any(card.tokenizer for card in cards.values()):
        tokenizer = tokenizer_of(cards.values())
    if any(card.preprocessing for card in cards.values()):
        recipe = replace(recipe, preprocessing=_fitting(source, preprocessing_of(cards.values()), recipe))
    fitting = {
        name: evaluation
        for name, evaluation in recipe.evaluations.items()
        if all(
            part in network.configs
            for outputs in evaluation.outputs
            for part, needed in parts_of(outputs).items()
            if needed
        )
    }
    if not fitting:
        raise RecipeError(
            f"{source} holds {', '.join(network.configs)}: no evaluation of {recipe.name} needs only these; "
            "compose more cards, or evaluate a recipe"
        )
    recipe = replace(
        recipe,
        name=source,
        modules=adapt.without(network, params)[0].configs,
        objectives={},
        evaluations=fitting,
        learning_rates={},
        deltas={},
    )
    return overrides.apply(recipe, changes), network, params, tokenizer


def _fitting(source: str, stated: Preprocessing, recipe: Recipe) -> Preprocessing:
    """The preprocessing that cards state, if it is for clips of the recipe's size."""

    def size(of: Preprocessing) -> tuple[int, int, int]:
        return of.frames, of.height, of.width

    if size(stated) != size(recipe.preprocessing):
        raise RecipeError(
            f"{source} is for clips of frames, height and width {size(stated)}; {recipe.name} measures on "
            f"{size(recipe.preprocessing)}: evaluate a recipe of its size"
        )
    return stated


def _parser() -> Parser:
    parser = Parser(
        prog="mplug2 eval",
        description="Score a run, a recipe on the shipped modules, or cards, with 95% intervals, and blind "
        "baselines beside every score. Never choose anything by the test split (a checkpoint, a length, a "
        "recipe): that is what --split validation is for.",
        epilog="example: mplug2 eval runs/mine --only image_answer evaluations.image_answer.batch=50",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN_OR_RECIPE_OR_CARDS field=value",
        help="what to score (cards may be several, one of them a delta's), then fields of its recipe by "
        f"dotted path (mesh.fsdp=2); a recipe takes its modules from the shelf (default: {DEFAULT})",
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="of a bundle: measure by this recipe instead of the one it names"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="this evaluation; may be repeated"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples of each evaluation")
    parser.add_argument("--split", choices=SPLITS, default="test", help="default: test; tune on validation")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the scores as JSON")
    parser.add_argument(
        "--predictions", type=Path, metavar="DIR", help="write what was said, one JSONL file each"
    )
    runs.add_option(parser)
    processes.add_options(parser)
    return parser
