"""Local temporal branches: what only videos have. Patches `B T N D` -> what to add to them, `B T N D`.

Two branches a vision block, one before attention and one before the MLP; each mixes three neighbouring
frames at one place. They end in a projection initialised to zero, so a fresh video network equals the image
network frame by frame. mPLUG-2 section 3.1, figure 2b; the official code's `lmhra1` and `lmhra2`.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mplug2.modules.functions import add, quick_gelu, scale
from mplug2.modules.layers import Linear, Norm, Stack, normal, parameter, zeros
from mplug2.roles import Array, Execution

FRAMES = 3


@dataclass(frozen=True, kw_only=True)
class Config:
    """`width` and `depth` are those of the vision module it belongs to."""

    width: int
    depth: int

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Temporal":
        return Temporal(self, rngs=rngs, execution=execution)


def tiny() -> Config:
    return Config(width=32, depth=2)


def small() -> Config:
    return Config(width=128, depth=2)


def base() -> Config:
    return Config(width=768, depth=12)


def large() -> Config:
    return Config(width=1024, depth=24)


class LocalTemporal(nnx.Module):
    """Norm -> half the width -> depthwise convolution over three frames -> QuickGELU -> full width (zero at
    first)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = Norm(width, epsilon=1e-5, rngs=rngs)
        self.down = Linear(width, width // 2, axes=("embed", "mlp"), rngs=rngs)
        self.kernel = parameter(normal(FRAMES**-0.5), (FRAMES, width // 2), (None, "mlp"), rngs)
        self.bias = parameter(zeros, (width // 2,), ("mlp",), rngs)
        self.up = Linear(width // 2, width, axes=("mlp", "embed"), rngs=rngs, init=zeros)

    def __call__(self, patches: Array) -> Array:
        hidden, kernel = self.down(self.norm(patches)), self.kernel[...]
        frames = hidden.shape[1]
        padded = jnp.pad(hidden, ((0, 0), (FRAMES // 2, FRAMES // 2), (0, 0), (0, 0)))
        mixed: Any = sum(scale(padded[:, i : i + frames], kernel[i]) for i in range(FRAMES))
        return self.up(quick_gelu(add(mixed, self.bias[...])))


class Branches(nnx.Module):
    """The two branches of one vision block."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.before_attention = LocalTemporal(width, rngs=rngs)
        self.before_mlp = LocalTemporal(width, rngs=rngs)


class Temporal(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        self.branches = Stack(
            lambda rngs: Branches(config.width, rngs=rngs), config.depth, rngs=rngs, execution=execution
        )
        self.config = config
