"""Fresh parameters for tests, made once a process: initialising compiles slowly, and modules are shared by
recipes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mplug2.network import Network
from mplug2.roles import Config

# Tiny programs run once or a few times: compiling them dominates, optimising them does not pay.
compiled = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


@functools.cache
def _module(name: str, config: Config, seed: int) -> Any:
    return compiled(Network({name: config}).init)(seed)[name]


def fresh(modules: Mapping[str, Config], seed: int = 0) -> dict[str, Any]:
    """What `Network(modules).init(seed)` gives: a module begins alike whoever else is selected
    (test_network.py)."""
    return {name: _module(name, config, seed) for name, config in modules.items()}


def drawn(modules: Mapping[str, Config], seed: int = 7) -> dict[str, Any]:
    """Parameters drawn by numpy, for tests that compute nothing with them: XLA takes seconds to compile the
    zoo's own initialisation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape.shape).astype(np.float32), Network(modules).shapes
    )
