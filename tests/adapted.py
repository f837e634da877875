"""A module with a delta that has been through something, and what it computes."""

from typing import Any

import jax
import numpy as np
from fresh import compiled, fresh

from mplug2.modules import universal
from mplug2.modules.forms import Lora
from mplug2.network import Network
from mplug2.roles import Form

OF = universal.tiny()


def adapted(form: Form = Lora(), seed: int = 1) -> tuple[Network, dict[str, Any]]:  # noqa: B008  frozen
    """A universal with a delta that has been through something: every array is random."""
    network = Network({"universal": OF, "universal_delta": form.delta(OF)})
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), network.shapes["universal_delta"]
    )
    return network, fresh({"universal": OF}) | {"universal_delta": drawn}


TOKENS = np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)


def computed(network: Network, params: Any) -> np.ndarray:
    return np.asarray(compiled(lambda params: network.bind(params)["universal"].vision(TOKENS))(params))
