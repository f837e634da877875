"""`mplug2 lock RECIPE [field=value ...]`: write what a recipe is composed of, file by file, or check a
lock."""

import sys
from pathlib import Path

from mplug2 import hub, overrides, recipes
from mplug2.arguments import Parser
from mplug2.errors import RecipeError
from mplug2.hub import lock
from mplug2.hub.lock import Lock
from mplug2.opening import Kind, opened
from mplug2.recipes import runs
from mplug2.run import Run, read_run


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="mplug2 lock",
        description="Write every module's source, config and sha256, the tokenizer and the preprocessing of "
        "a recipe; the same lock composes the same network, bit for bit. Of a lock file: check that all it "
        "names is still what was locked, every file read by its sha256 (and fetched, where it is not here). "
        "Of a run: its own lock.",
        epilog="example: mplug2 lock video_qa modes.vision=frozen cards.vision=vision-small --out my.json",
    )
    parser.add_argument("what", metavar="RECIPE|RUN|LOCK", help="a recipe, a run, or a lock file (.json)")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="change the recipe, by dotted path"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to (default: the standard output)")
    runs.add_option(parser)
    asked = parser.parse_intermixed_args(argv)
    word = opened(asked.what, "lock", Kind.RECIPE, Kind.RUN, Kind.LOCK)
    if word.kind is Kind.LOCK:
        if asked.overrides or asked.out:
            raise RecipeError(
                f"{asked.what} is a lock, which is checked: field=value and --out are for recipes"
            )
        locked = lock.read(asked.what)
        cards = lock.check(locked)
        for card in cards.values():
            hub.stored(card)  # refuses a file that is no longer what its card says
        begun = len(locked.modules) - len(cards)
        said = f"{len(cards)} modules are what was locked, {begun} begin by seed {locked.seed}"
        print(f"{asked.what}: holds: {said}")
        return 0
    if word.kind is Kind.RUN:
        if asked.overrides:
            raise RecipeError(f"{asked.what} is a run, whose recipe is what it was; got {asked.overrides}")
        made = _of_run(read_run(asked.what), asked.trust)
    else:
        recipe = overrides.apply(recipes.find(asked.what), asked.overrides)
        made = lock.of(recipe, asked.what, asked.overrides)
    if asked.out is None:
        sys.stdout.write(made.text())
    else:
        made.write(asked.out)
        print(f"{asked.out}: {len(made.modules)} modules of {made.recipe}")
    return 0


def _of_run(run: Run, trusted: bool) -> Lock:
    """What a run was composed of: as it says itself, else as its recipe is composed now."""
    if (run.path / lock.FILE).is_file():
        return lock.read(run.path / lock.FILE)
    return lock.of(runs.recipe_of(run, trusted=trusted), run.recipe, run.overrides)
