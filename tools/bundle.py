"""`mplug2 bundle RECIPE_OR_RUN --out F`: modules, tokenizer, preprocessing and lock in one folder or tar,
which `mplug2 predict` and `mplug2 eval` use on a machine without a network."""

from pathlib import Path

from mplug2 import files, hub, overrides, recipes
from mplug2.arguments import Parser
from mplug2.errors import CardError, RecipeError
from mplug2.hub import bundle, lock
from mplug2.opening import Kind, Word, opened
from mplug2.recipes import runs
from mplug2.run import read_run
from mplug2.tools.publish import trained
from mplug2.trained import restore


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="mplug2 bundle",
        description="Write the network of a run, or of a recipe with the cards it names and the shelf's, as "
        "one folder (or one tar, if F ends with .tar) that predicts and evaluates on any machine, without a "
        "network, bit for bit. Of a bundle's tar: unpack it.",
    )
    parser.add_argument("what", metavar="RECIPE|RUN|TAR", help="what to bundle, or a tar to unpack")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="change the recipe, by dotted path"
    )
    parser.add_argument("--out", type=Path, metavar="F", required=True, help="a folder, or a file F.tar")
    runs.add_option(parser)
    asked = parser.parse_intermixed_args(argv)
    if not files.is_free(asked.out):
        raise CardError(f"{asked.out} is there already: give another place for the bundle")
    word = opened(asked.what, "bundle", Kind.RECIPE, Kind.RUN, Kind.TAR)
    if word.kind is Kind.TAR:
        if asked.overrides:
            raise RecipeError(f"{asked.what} is a bundle, which is what it is; got {asked.overrides}")
        print(f"{asked.out}: {bundle.unpack(word.path, asked.out)} files")
    elif asked.out.suffix == ".tar":
        bundle.pack(lambda folder: write(word, asked.overrides, folder, trusted=asked.trust), asked.out)
        print(f"{asked.out}: {asked.out.stat().st_size / 1e6:.2f} MB")
    else:
        write(word, asked.overrides, asked.out, trusted=asked.trust)
        size = sum(path.stat().st_size for path in asked.out.iterdir())
        print(f"{asked.out}: {size / 1e6:.2f} MB in {len(list(asked.out.iterdir()))} files")
    return 0


def write(word: Word, changes: list[str], folder: Path, *, trusted: bool = False) -> None:
    """The bundle of a run directory or a recipe. Raises Mplug2Error."""
    if word.kind is Kind.RECIPE:
        recipe = hub.on_shelf(overrides.apply(recipes.find(word.text), changes))
        bundle.write(folder, lock.of(recipe, word.text, changes), recipe, {})
        return
    if changes:
        raise RecipeError(f"{word.text} is a run, and its recipe is what it was trained with; got {changes}")
    run = read_run(word.path)
    recipe = runs.recipe_of(run, trusted=trusted)
    step, _, params = restore(run, recipe)
    learned = {name: tree for name, tree in params.items() if recipe.trains(name)}
    locked = lock.of(recipe, run.recipe, run.overrides)
    bundle.write(folder, locked, recipe, learned, facts=trained(run, recipe, step))
