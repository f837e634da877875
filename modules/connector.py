"""Connector: vision tokens `B N D` -> `B N E`, for modules of different widths. Linear, norm, dropout; the
official code's `visn_fc` and `visn_layer_norm`. Composed only where a recipe asks for it, never inserted
silently."""

from dataclasses import dataclass

from flax import nnx

from mplug2.modules.functions import dropout
from mplug2.modules.layers import Linear, Norm, PostNormLayer
from mplug2.roles import Array, Execution


@dataclass(frozen=True, kw_only=True)
class Config:
    inputs: int
    width: int
    dropout: float = 0.1

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Connector":
        return Connector(self, rngs=rngs)


def tiny() -> Config:
    return Config(inputs=32, width=32)


def small() -> Config:
    return Config(inputs=128, width=128)


def base() -> Config:
    """CLIP ViT-L/14 into a base-size language side."""
    return Config(inputs=1024, width=768)


def large() -> Config:
    """CLIP ViT-B/16 into a large language side."""
    return Config(inputs=768, width=1024)


class Connector(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.linear = Linear(config.inputs, config.width, axes=("embed", "mlp"), rngs=rngs)
        self.norm = Norm(config.width, epsilon=PostNormLayer.EPSILON, rngs=rngs)
        self.config = config

    def __call__(self, tokens: Array, *, key: Array | None = None) -> Array:
        return dropout(self.norm(self.linear(tokens)), self.config.dropout, key)
