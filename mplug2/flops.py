"""How much a training step computes: FLOPs of its products and convolutions, two a multiply-add, forward and
backward, over all devices together. Read off the jaxpr of its gradient; no array is needed."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax

from mplug2.anatomy import flops_of
from mplug2.network import Network
from mplug2.recipe import Recipe
from mplug2.sharding import Mesh
from mplug2.step import Trainer


def step_flops(recipe: Recipe, batches: Any) -> float:
    """What a step on such batches must compute: what `remat`, or a batch in parts, computes again is not
    counted."""
    once = replace(recipe, accumulate=1, execution=replace(recipe.execution, remat="none", scan=True))
    return executed_flops(once, batches)


def executed_flops(recipe: Recipe, batches: Any) -> float:
    """What it does compute."""
    # Of fused attention a jaxpr shows no products: what it computes is the same as ours.
    execution = replace(recipe.execution, attention="written")
    network = Network(recipe.parts, execution)
    trainer = Trainer(replace(recipe, mesh=Mesh(), execution=execution), network)
    params = {name: network.shapes[name] for name in trainer.names}
    frozen = {name: network.shapes[name] for name in network.configs if name not in trainer.names}
    closed = jax.make_jaxpr(partial(trainer.gradients, key=None))(params, frozen, batches)
    return sum(flops_of(equation) for equation in closed.jaxpr.eqns)
