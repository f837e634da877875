"""Universal layers, shared by all modalities: `B N D -> B N D`. mPLUG-2 section 3.2, figure 2c.

Text and vision share self-attention and MLP. Vision alone has learned latents and cross-attention: the
latents gather from all vision tokens in every layer but the last; in the last, the vision tokens read back
from the latents. The latents are thus a bottleneck of information, not of length. The official code calls
this mode `v_module`.
"""

from dataclasses import dataclass

from flax import nnx

from mplug2.modules.functions import dropout, repeated
from mplug2.modules.layers import Norm, PostNormLayer, Stack, fold, normal, parameter
from mplug2.roles import Array, Execution, split_key


@dataclass(frozen=True, kw_only=True)
class Config:
    width: int
    depth: int
    heads: int
    hidden: int
    latents: int = 50
    dropout: float = 0.1

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Universal":
        return Universal(self, rngs=rngs, execution=execution)


def tiny() -> Config:
    return Config(width=32, depth=2, heads=2, hidden=64, latents=4)


def small() -> Config:
    return Config(width=128, depth=2, heads=4, hidden=256, latents=8)


def base() -> Config:
    return Config(width=768, depth=2, heads=12, hidden=3072)


def large() -> Config:
    return Config(width=1024, depth=2, heads=16, hidden=4096)


class Universal(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        self.layers = Stack(
            lambda rngs: PostNormLayer(config, cross=True, rngs=rngs, execution=execution),
            config.depth,
            rngs=rngs,
            execution=execution,
        )
        self.latents = parameter(normal(1.0), (config.latents, config.width), ("places", "embed"), rngs)
        self.vision_norm = Norm(config.width, epsilon=PostNormLayer.EPSILON, rngs=rngs)
        self.config = config

    def text(self, tokens: Array, mask: Array, *, key: Array | None = None) -> Array:
        """Tokens `B S D`, mask `B S` (True = a token stands there) -> `B S D`."""
        look = mask[:, None, None, :]
        return fold(lambda x, layer, key: layer(x, look, key=key), tokens, self.layers, key=key)

    def vision(self, tokens: Array, *, key: Array | None = None) -> Array:
        """Tokens `B N D` -> `B N D`."""
        *keys, outer_key = split_key(key, self.config.depth + 1)
        *gather, read = (self.layers[index] for index in range(self.config.depth))
        latents = repeated(self.latents[...], (len(tokens), *self.latents.shape), tokens.dtype)
        for layer, layer_key in zip(gather, keys, strict=False):
            latents = layer(latents, context=tokens, key=layer_key)
        seen = read(tokens, context=latents, key=keys[-1])
        return dropout(self.vision_norm(tokens + seen), self.config.dropout, outer_key)
