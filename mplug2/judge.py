"""How good a checkpoint is, by what `Recipe.best` names: a loss of the log, or the score of an evaluation on
the validation split, of the running averages where the recipe keeps them."""

from collections.abc import Mapping

from mplug2 import processes
from mplug2.console import Console
from mplug2.errors import RecipeError, nearest
from mplug2.evaluate import evaluate
from mplug2.inference import Compiled
from mplug2.network import Network, Parameters
from mplug2.recipe import Recipe


class Judge:
    """The judge of one session's checkpoints: its evaluation is compiled once."""

    def __init__(self, recipe: Recipe, network: Network):
        self._recipe, self._network = recipe, network
        self._compiled: Compiled | None = None

    def score(self, losses: Mapping[str, float], params: Parameters) -> float:
        """The number that `Recipe.best` names. `losses`: the means since the last line of the log; `params`:
        all modules', wherever they lie. Raises RecipeError if the evaluation gives no such score."""
        recipe, name = self._recipe, self._recipe.best
        if name in losses:
            return float(losses[name])
        network, params = self._network, processes.fetched(params)
        if self._compiled is None:
            self._compiled = Compiled(network, params, recipe.preprocessing, recipe.mesh.of_process())
        else:
            self._compiled = self._compiled.on(network, params)
        results = evaluate(
            network,
            params,
            recipe,
            recipe.tokenizer,
            split="validation",
            only=[name.partition("/")[0]],
            console=Console(quiet=True),
            compiled=self._compiled,
        )
        if name not in results.tasks:
            known = ", ".join(results.tasks)
            raise RecipeError(f"best is {name}, expected one of {known}{nearest(name, results.tasks)}")
        return results.value(name)
