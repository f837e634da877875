"""What a run has learned: its network with the newest parameters, wherever each module of it came from."""

from mplug2.checkpoint import restore_modules
from mplug2.errors import CheckpointError
from mplug2.hub import load_as
from mplug2.kernels import available
from mplug2.network import Network, Parameters
from mplug2.recipe import Recipe
from mplug2.run import Run, fingerprint


def restore(run: Run, recipe: Recipe) -> tuple[int, Network, Parameters]:
    """(steps trained, network, parameters) of a run of `recipe`, by its best checkpoint or, where
    `Recipe.best` does not say what that is, its newest: running averages where the run keeps them, and from
    their cards what it did not train. Raises CheckpointError if the recipe is not the run's or nothing was
    saved."""
    if fingerprint(recipe) != run.fingerprint:
        raise CheckpointError(
            f"{run.path}: recipe {run.recipe} has changed since this run was trained; go back to {run.commit}"
        )
    parts = recipe.parts
    frozen = {name: load_as(recipe, name) for name in parts if not recipe.trains(name)}
    names = [name for name in parts if name not in frozen]
    step, trained = restore_modules(run.path, names, best=recipe.best)
    params = trained | frozen
    return step, Network(parts, available(recipe.execution)), {name: params[name] for name in parts}
