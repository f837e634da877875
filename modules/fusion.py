"""Fusion: text tokens `B S D` attend to vision tokens `B N D`; both come back. mPLUG-2 section 3.2; mPLUG
section 3.2.

In mPLUG's connected layers (`connected_at`) both streams attend to each other side by side instead, and
vision changes too. mPLUG-2 has none.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from mplug2.errors import RecipeError
from mplug2.modules.layers import PostNormLayer, Stack, fold
from mplug2.roles import Array, Execution, split_key


@dataclass(frozen=True, kw_only=True)
class Config:
    """`connected_at` lists the layers (counted from 0) that are connected."""

    width: int
    depth: int
    heads: int
    hidden: int
    connected_at: tuple[int, ...] = ()
    dropout: float = 0.1

    def __post_init__(self):
        if strange := [index for index in self.connected_at if not 0 <= index < self.depth]:
            raise RecipeError(
                f"fusion: connected_at names layers {strange}, there are layers 0 to {self.depth - 1}"
            )

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Fusion":
        return Fusion(self, rngs=rngs, execution=execution)


def tiny() -> Config:
    return Config(width=32, depth=1, heads=2, hidden=64)


def small() -> Config:
    return Config(width=128, depth=2, heads=4, hidden=256)


def base() -> Config:
    return Config(width=768, depth=3, heads=12, hidden=3072)


def large() -> Config:
    return Config(width=1024, depth=6, heads=16, hidden=4096)


class Fusion(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        self.layers = Stack(
            lambda rngs: PostNormLayer(config, cross=True, rngs=rngs, execution=execution),
            config.depth,
            rngs=rngs,
            execution=execution,
        )
        self.config = config

    def __call__(
        self,
        vision: Array,
        text: Array,
        text_mask: Array,
        vision_mask: Array | None = None,
        *,
        key: Array | None = None,
    ) -> tuple[Array, Array]:
        """Vision `B N D`, text `B S D`, masks `B S` and `B N` (True = a token stands there) -> (vision,
        text)."""
        look = text_mask[:, None, None, :]
        see = None if vision_mask is None else vision_mask[:, None, None, :]
        if not self.config.connected_at:
            text = fold(
                lambda x, layer, key: layer(x, look, vision, see, key=key), text, self.layers, key=key
            )
            return vision, text
        if vision_mask is None:
            vision_mask = jnp.ones(vision.shape[:2], bool)
        both_look = jnp.concatenate([vision_mask, text_mask], axis=1)[:, None, None, :]
        for index, layer_key in enumerate(split_key(key, self.config.depth)):
            layer = self.layers[index]
            if index in self.config.connected_at:
                both = layer(jnp.concatenate([vision, text], axis=1), both_look, key=layer_key)
                vision, text = vision + both[:, : vision.shape[1]], both[:, vision.shape[1] :]
            else:
                text = layer(text, look, vision, see, key=layer_key)
        return vision, text
