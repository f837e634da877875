"""Adapting: deltas put beside the modules that they are of, added, averaged, merged and taken off again.

A delta is a module of its own, `universal_delta` beside `universal`, in recipes (mode `lora`), networks,
checkpoints and cards; `Network.bind` applies it. So unmerging is exact and takes no arithmetic, which could
not be: the base is never written to, and a delta's card names it by sha256. Take the delta off (`without`),
and every array of the base is the very same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mplug2.errors import RecipeError, nearest
from mplug2.hub.fit import differences
from mplug2.network import Network, Parameters
from mplug2.roles import DELTA, Config, base_of

Deltas = Mapping[str, tuple[Config, Parameters]]
"""By the name of the module that is adapted: the delta's config and its parameters."""


def beside(network: Network, params: Parameters, deltas: Deltas) -> tuple[Network, Parameters]:
    """The network's modules with these deltas and no others. Raises RecipeError for a module that is not
    there, or is another one than the delta is of."""
    network, params = without(network, params)
    for module, (config, _) in deltas.items():
        if module not in network.configs:
            raise RecipeError(
                f"a delta of {module}: the network has {sorted(network.configs)}"
                + nearest(module, network.configs)
            )
        if differing := differences(network.configs[module], getattr(config, "of", None)):
            raise RecipeError(f"the delta is of another {module}: {', '.join(differing)}")
    configs = {**network.configs, **{module + DELTA: config for module, (config, _) in deltas.items()}}
    beside = {**params, **{module + DELTA: own for module, (_, own) in deltas.items()}}
    return Network(configs, network.execution), beside


def without(network: Network, params: Parameters) -> tuple[Network, Parameters]:
    """The network as it was before it was adapted; its arrays are the very same."""
    bases = {name: config for name, config in network.configs.items() if base_of(name) is None}
    return Network(bases, network.execution), {name: params[name] for name in bases if name in params}


def merge(network: Network, params: Parameters) -> tuple[Network, Parameters]:
    """The network that computes the same without deltas. Raises RecipeError where no config says what comes
    out."""
    configs = {name: config for name, config in network.configs.items() if base_of(name) is None}
    for name, config in network.configs.items():
        if base := base_of(name):
            configs[base] = getattr(config, "merged", config)
    merged = Network(configs, network.execution)
    result = network.adapted(params)
    for module, shapes in merged.shapes.items():
        there = jax.tree.map(lambda leaf: leaf.shape, result[module])
        if there != jax.tree.map(lambda leaf: leaf.shape, shapes):
            raise RecipeError(f"{module} merged with its delta is none that {configs[module]} can build")
    return merged, result


def add(parts: Sequence[tuple[Config, Parameters, float]]) -> tuple[Config, Parameters]:
    """One delta for several of one base, (config, parameters, coefficient): it changes what they change in
    sum, exactly. Raises RecipeError where they are of different bases or forms."""
    if not parts:
        raise RecipeError("no deltas to add")
    config: Any = parts[0][0]
    return config.sum(parts)


def average(parts: Sequence[tuple[Config, Parameters]]) -> tuple[Config, Parameters]:
    """One delta that changes what several of one base change on average. Raises RecipeError as `add`."""
    return add([(config, params, 1 / len(parts)) for config, params in parts])
