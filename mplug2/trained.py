"""What a run has learned: its network with the newest parameters, wherever each module of it came from."""

from mplug2.checkpoint import restore_modules
from mplug2.errors import CheckpointError
from mplug2.hub import load_as
from mplug2.kernels import available
from mplug2.network import Network, Parameters
from mplug2.recipe import Recipe
from mplug2.run import Run
from mplug2.settings import differences, in_words, settings
from mplug2.sharding import shardings

NETWORK = ("modules", "modes", "delta", "deltas")
"""The settings that say of what arrays a network is made."""


def restore(run: Run, recipe: Recipe) -> tuple[int, Network, Parameters]:
    """(steps trained, network, parameters) of a run of `recipe`, by its best checkpoint or, where
    `Recipe.best` does not say what that is, its newest: running averages where the run keeps them, and from
    their cards what it did not train. Raises CheckpointError if the recipe is not the run's or nothing was
    saved. All lie on the recipe's mesh (`sharding.Mesh.of_process`)."""
    differing = [name for name in differences(run.settings, recipe) if name.partition(".")[0] in NETWORK]
    if differing:
        told = in_words(differing, run.settings, settings(recipe))
        raise CheckpointError(f"{run.path}: the run has another network than the recipe: {told}")
    parts = recipe.parts
    network, mesh = Network(parts, available(recipe.execution)), recipe.mesh.of_process()
    places = shardings(mesh, network.axes, network.shapes) if mesh.size > 1 else None
    frozen = {name: load_as(recipe, name, mesh) for name in parts if not recipe.trains(name)}
    names = [name for name in parts if name not in frozen]
    step, trained = restore_modules(run.path, names, best=recipe.best, shardings=places)
    params = trained | frozen
    return step, network, {name: params[name] for name in parts}
