"""Text encoder: ids `B S` -> tokens `B S D`; its private layers, below the universal ones. mPLUG-2 section
3.1; BERT.

The official text encoders of 12 and 24 layers end in two universal layers, so 10 and 22 of them are private.
"""

from dataclasses import dataclass

from flax import nnx

from mplug2.modules.layers import PostNormLayer, Stack, WordEmbedding, fold
from mplug2.roles import Array, Execution, padding_mask, split_key


@dataclass(frozen=True, kw_only=True)
class Config:
    vocabulary: int
    positions: int
    width: int
    depth: int
    heads: int
    hidden: int
    dropout: float = 0.1

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Text":
        return Text(self, rngs=rngs, execution=execution)


def tiny() -> Config:
    return Config(vocabulary=128, positions=64, width=32, depth=1, heads=2, hidden=64)


def small() -> Config:
    return Config(vocabulary=128, positions=64, width=128, depth=1, heads=4, hidden=256)


def base() -> Config:
    return Config(vocabulary=30522, positions=512, width=768, depth=10, heads=12, hidden=3072)


def large() -> Config:
    return Config(vocabulary=30522, positions=512, width=1024, depth=22, heads=16, hidden=4096)


class Text(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs, execution: Execution):
        self.embedding = WordEmbedding(
            config.vocabulary,
            config.positions,
            config.width,
            dropout=config.dropout,
            rngs=rngs,
            execution=execution,
        )
        self.layers = Stack(
            lambda rngs: PostNormLayer(config, cross=False, rngs=rngs, execution=execution),
            config.depth,
            rngs=rngs,
            execution=execution,
        )
        self.config = config

    @property
    def words(self) -> Array:
        """The word table `V D`, lent to a module that predicts words."""
        return self.embedding.words[...]

    def __call__(self, ids: Array, *, key: Array | None = None) -> Array:
        embedding_key, layers_key = split_key(key, 2)
        mask = padding_mask(ids)[:, None, None, :]
        return fold(
            lambda x, layer, key: layer(x, mask, key=key),
            self.embedding(ids, key=embedding_key),
            self.layers,
            key=layers_key,
        )
