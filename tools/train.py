"""`mplug2 train RECIPE [field=value ...]`: train a recipe, or continue its run; `mplug2 train RUN` continues
a run by what it holds."""

from pathlib import Path

from mplug2 import composition, overrides, places, processes, recipes
from mplug2.arguments import Parser
from mplug2.data.stream import check_data
from mplug2.errors import RecipeError
from mplug2.recipe import Recipe
from mplug2.recipes import runs
from mplug2.run import default_folder, is_run, read_run
from mplug2.source import Sources


def main(argv: list[str] | None = None) -> int:
    asked = _parser().parse_intermixed_args(argv)
    words, changes = [], []
    for word in asked.words:
        (changes if "=" in word and not Path(word).exists() else words).append(word)
    words = words or ([asked.run_dir] if asked.run_dir else [])
    if len(words) != 1:
        raise RecipeError(f"expected one recipe, or one run to continue, got {', '.join(words) or 'none'}")
    changes += [] if asked.steps is None else [f"steps={asked.steps}"]
    with processes.joined(asked.coordinator, asked.processes, asked.process, asked.patience):
        recipe, word, given, sources = _opened(words[0], changes, asked.trust)

        composition.check(recipe)
        check_data(recipe.feeds)

        from mplug2.train import train  # after the recipe is known to be right: it takes seconds to import

        folder = asked.run_dir or (words[0] if is_run(words[0]) else default_folder(recipe))
        train(recipe, folder, source=word, overrides=given, sources=sources, changed_data=asked.changed_data)
    return 0


def _opened(word: str, changes: list[str], trusted: bool) -> tuple[Recipe, str, list[str], Sources | None]:
    """(recipe, the words that name it and its overrides, the sources of its file)."""
    if not is_run(word):
        recipe, sources = recipes.found(word)
        return places.at_home(overrides.apply(recipe, changes)), word, changes, sources
    run = read_run(word)
    recipe = runs.recipe_of(run, changes, trusted=trusted)
    return recipe, run.recipe, [*run.overrides, *changes], runs.sources_of(run, verify=not trusted)


def _parser() -> Parser:
    parser = Parser(
        prog="mplug2 train",
        description="Train a recipe. The same command again continues where the run stopped, exactly; so "
        "does the run's directory alone, from any folder, whatever became of the recipe's file.",
        epilog="example: mplug2 train image_caption.tiny steps=200 optimizer.learning_rate=3e-4",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE_OR_RUN field=value",
        help="a name such as pretrain.small (mplug2 recipes lists them), file.py:function, or a run's "
        "directory, then fields of the recipe by dotted path",
    )
    parser.add_argument("--run-dir", help="where the run is kept (default: runs/RECIPE-FINGERPRINT)")
    parser.add_argument("--steps", type=int, help="short for steps=N")
    parser.add_argument(
        "--changed-data", action="store_true", help="continue a run though its training data has changed"
    )
    runs.add_option(parser)
    processes.add_options(parser)
    return parser
