"""What a recipe is made of, without running it: routes through its modules, their parameters and FLOPs.

All of it is read off the jaxpr of each objective's forward pass, traced with abstract arrays: an operation
belongs to the module under whose `jax.named_scope` it was traced (mplug2.composition puts the scopes on), and
what flows between operations of different modules is the route. FLOPs count matrix products and convolutions,
two a multiply-add.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.extend.core import Literal

from mplug2.composition import abstract_batch, abstract_network, watched
from mplug2.network import Network, parts_of
from mplug2.recipe import Objective, Recipe

LOSS = "loss"
TASK = "(task)"


@dataclass(frozen=True)
class Anatomy:
    """Of one objective: `flops` of a forward pass per example, by module (`(task)`: the task's own); `edges`
    of its route, from a `[field]` of the batch or a call to a call or the loss; `lends`: (module, call) where
    a call borrows parameters."""

    flops: dict[str, float]
    edges: tuple[tuple[str, str], ...]
    lends: tuple[tuple[str, str], ...]


def parameters(network: Network) -> dict[str, int]:
    """The number of parameters of every module."""
    return {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
        for name, shapes in network.shapes.items()
    }


def dissect(recipe: Recipe) -> dict[str, Anatomy]:
    """The anatomy of every objective; the recipe must have passed `composition.check_modules`."""
    network = abstract_network(recipe)
    return {name: _dissect(network, objective) for name, objective in recipe.objectives.items()}


def _dissect(network: Network, objective: Objective) -> Anatomy:
    batch = abstract_batch(objective)
    traced = _trace(network, objective, batch)
    flops = dict(traced.flops)
    for part, required in parts_of(objective.task).items():
        # A lent module (temporal) works inside another's call: it costs what that call costs more with it.
        if not required and part in network.configs and not flops.get(part):
            rest = {name: config for name, config in network.configs.items() if name != part}
            without = _trace(Network(rest, network.execution), objective, batch).flops
            flops[part] = sum(traced.flops.values()) - sum(without.values())
            for name, count in without.items():
                flops[name] = count
    flops = {name: count / objective.batch for name, count in flops.items() if count}
    return replace(traced, flops=flops)


def _trace(network: Network, objective: Objective, batch: Any) -> Anatomy:
    forward, _ = watched(network, objective)
    closed = jax.make_jaxpr(forward)(network.shapes, batch)
    names = [
        (True, module) for module, shapes in sorted(network.shapes.items()) for _ in jax.tree.leaves(shapes)
    ]
    names += [(False, f"[{field}]") for field in sorted(batch)]
    return _read(closed.jaxpr, names, set(network.configs))


def _read(jaxpr: Any, names: list[tuple[bool, str]], modules: set[str]) -> Anatomy:
    """`names` tells of each input whether it is a parameter, and of which module, or which field of the batch
    it is."""
    flops: dict[str, float] = defaultdict(float)
    edges: dict[tuple[str, str], None] = {}
    lends: dict[tuple[str, str], None] = {}
    sources: dict[Any, frozenset[tuple[bool, str]]] = defaultdict(frozenset)
    sources.update({variable: frozenset([name]) for variable, name in zip(jaxpr.invars, names, strict=True)})

    def inputs(variables: list[Any]) -> frozenset[tuple[bool, str]]:
        known = [sources[v] for v in variables if not isinstance(v, Literal)]
        return frozenset().union(*known)

    for equation in jaxpr.eqns:
        call = str(equation.source_info.name_stack).split("/")[0]
        module = call.split(".")[0]
        flows = inputs(equation.invars)
        if module in modules:
            for parameter, source in sorted(flows):
                if parameter and source != module:
                    lends[source, call] = None
                elif not parameter and source != call:
                    edges[source, call] = None
            flows = frozenset([(False, call)])
        flops[module if module in modules else TASK] += flops_of(equation)
        for variable in equation.outvars:
            # Masks say where tokens stand; they are not what flows.
            sources[variable] = frozenset() if variable.aval.dtype == bool else flows
    for parameter, source in sorted(inputs(jaxpr.outvars)):
        if not parameter:
            edges[source, LOSS] = None
    return Anatomy(dict(flops), tuple(edges), tuple(lends))


def flops_of(equation: Any) -> float:
    """Multiplications and additions of one equation, inner ones included, as often as they run."""
    kind, params = equation.primitive.name, equation.params
    if kind == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if kind == "conv_general_dilated":
        kernel, outputs = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return 2.0 * equation.outvars[0].aval.size * kernel.size / kernel.shape[outputs]
    times = params["length"] if kind == "scan" else 1
    return times * sum(
        flops_of(inner) for value in params.values() for jaxpr in _jaxprs(value) for inner in jaxpr.eqns
    )


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr


def diagram(anatomy: Anatomy) -> str:
    """The route as lines of text: `[field] → call → ... → loss`; a line ends at a place that another one has
    drawn, and a place that several read from starts a line for each further reader. `(+ module)`: parameters
    that a call borrows."""
    following: dict[str, list[str]] = defaultdict(list)
    borrowed: dict[str, list[str]] = defaultdict(list)
    for start, end in anatomy.edges:
        following[start].append(end)
    for module, call in anatomy.lends:
        borrowed[call].append(module)

    lines, drawn = [], set()
    starts = [start for start in following if start.startswith("[")]
    for start in starts:  # grows by the forks that are met
        for end in following[start]:
            chain, place = [start], end
            while place not in drawn and following[place]:
                drawn.add(place)
                chain.append(f"{place} (+ {', '.join(borrowed[place])})" if place in borrowed else place)
                if len(following[place]) > 1:
                    starts.append(place)
                place = following[place].pop(0)
            lines.append(" → ".join([*chain, place]))
    return "\n".join(lines)
