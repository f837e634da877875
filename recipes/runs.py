"""The recipe of a run, from what the run itself holds: from any folder, whatever became of the file that it
was begun with.

A folder may be a stranger's, so opening it runs no code of its author's: the recipe is read as JSON
(mplug2.recipe_json). Where only its own code can make it, that code is run if this user made the run
(mplug2.trust) or says so for this once (`--trust`). Runs of versions that kept no recipe name it: one of the
zoo is found by its name, a file by its path, which asks for `--trust`.
"""

import argparse
from collections.abc import Iterable
from dataclasses import replace

from mplug2 import overrides, places, recipe_json, recipes, source, trust
from mplug2.errors import CheckpointError, RecipeError
from mplug2.hub import lock
from mplug2.recipe import Recipe
from mplug2.roles import base_of
from mplug2.run import KEPT, Run, kept_file
from mplug2.screen import note
from mplug2.settings import differences, in_words, settings
from mplug2.source import Sources
from mplug2.trained import NETWORK


def add_option(parser: argparse.ArgumentParser) -> None:
    """`--trust`, of every command that opens runs."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run, this once, the Python of a run's recipe that was not made here by you: read it first",
    )


def recipe_of(run: Run, changes: Iterable[str] = (), *, trusted: bool = False) -> Recipe:
    """The recipe that a run was last started with, changed by `field=value`.

    Raises CheckpointError for code that is not to be run, or with the fields in which the changed recipe is
    not the one that was trained; RecipeError, DataError where the recipe cannot be made.
    """
    if run.values is not None:
        recipe = _of_values(run)
    elif run.main:
        recipe = _of_sources(run, trusted)
    elif recipes.is_file(run.recipe):
        recipe = _of_named_file(run, trusted)
    else:
        recipe = _of_zoo(run)
    changed = overrides.apply(recipe, list(changes))
    base = settings(recipe)
    if differing := differences(base, changed):
        told = in_words(differing, base, settings(changed))
        raise CheckpointError(f"{run.path} was trained with other settings than are asked for: {told}")
    return changed


def sources_of(run: Run, *, verify: bool = True) -> Sources | None:
    """The source files that a run keeps; None of one that was not begun with a file. Raises CheckpointError
    where one cannot be read or, with `verify`, is not the one that was kept."""
    if not run.main:
        return None
    names = dict.fromkeys([run.main, *(name for name in run.kept if name.endswith(".py"))])
    code = {name: kept_file(run, name, verify=verify) for name in names}
    return Sources(run.main, code, str(run.path / KEPT))


def _of_values(run: Run) -> Recipe:
    try:
        recipe = recipe_json.decode(run.values)
    except RecipeError as error:
        raise CheckpointError(
            f"{run.path}: its recipe cannot be read by this version: {error}; it was trained by {run.commit}"
        ) from None
    return _with_kept(run, recipe)


def _with_kept(run: Run, recipe: Recipe) -> Recipe:
    """With the files that the run keeps a copy of, and all others where they were."""
    here = {}
    for place, path in run.places.items():
        if place.startswith("tokenizer.") and (name := path.rpartition("/")[2]) in run.kept:
            kept_file(run, name)
            here[place] = str(run.path.absolute() / KEPT / name)
    return places.put(recipe, {**run.places, **here})


def _of_sources(run: Run, trusted: bool) -> Recipe:
    if not trusted and not trust.is_ours(run.marked, run.mark):
        raise _untrusted(run, str(run.path / KEPT / run.main))
    code = sources_of(run, verify=not trusted)
    assert code is not None
    function = run.recipe.rpartition(":")[2] if ":" in run.recipe else ""
    recipe = recipes.of_package(source.from_sources(code), function, str(run.path / KEPT / run.main))
    return _as_trained(run, _with_kept(run, overrides.apply(recipe, run.overrides)))


def _of_named_file(run: Run, trusted: bool) -> Recipe:
    if not trusted:
        raise _untrusted(run, run.recipe.partition(":")[0])
    return _as_trained(run, overrides.apply(recipes.find(run.recipe), run.overrides))


def _untrusted(run: Run, file: str) -> CheckpointError:
    return CheckpointError(
        f"{run.path}: its recipe {run.recipe} is Python that was not made here by this user: read {file}, "
        "then give --trust to run it this once"
    )


def _as_trained(run: Run, recipe: Recipe) -> Recipe:
    """Raises CheckpointError with the fields that differ from what was trained."""
    if differing := differences(run.settings, recipe):
        told = in_words(differing, run.settings, settings(recipe))
        raise CheckpointError(
            f"{run.path}: its recipe {run.recipe} is no longer what was trained: {told}; it was trained by "
            f"{run.commit}"
        )
    return recipe


def _of_zoo(run: Run) -> Recipe:
    """A recipe of the zoo's by its name. Where it has become another since: with the modules and the
    preprocessing that the run's lock states, if the rest decides nothing but training."""
    recipe = overrides.apply(recipes.find(run.recipe), run.overrides)
    differing = differences(run.settings, recipe)
    if not differing or not (run.path / lock.FILE).is_file():
        return _as_trained(run, recipe)
    locked = lock.read(run.path / lock.FILE)
    modules = {name: part.config for name, part in locked.modules.items() if base_of(name) is None}
    recipe = replace(recipe, modules=modules, preprocessing=locked.preprocessing, seed=locked.seed)
    decisive = (*NETWORK, "preprocessing", "tokenizer")
    left = differences(run.settings, recipe)
    if any(name.partition(".")[0] in decisive for name in left):
        return _as_trained(run, recipe)
    told = in_words(differing, run.settings, settings(recipes.find(run.recipe)))
    note(f"warning: recipe {run.recipe} has changed since {run.path}: {told}")
    return recipe
