"""Shared decoder: ids `B S` and a memory `B N D` -> next-word logits `B S V`. mPLUG-2 section 3.2; BERT
with a causal mask.

The word table is also the output projection. `start` and `step` decode one token at a time with cached keys
and values: those of the memory are computed once for an input, whatever the number of rows (beams, samples)
decoded from it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from mplug2.errors import RecipeError
from mplug2.modules.layers import PostNormLayer, Stack, WordEmbedding, WordPredictor, fold
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

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Decoder":
        return Decoder(self, rngs=rngs, execution=execution)


def tiny() -> Config:
    return Config(vocabulary=128, positions=64, width=32, depth=1, heads=2, hidden=64)


def small() -> Config:
    return Config(vocabulary=128, positions=64, width=128, depth=2, heads=4, hidden=256)


def base() -> Config:
    return Config(vocabulary=30522, positions=512, width=768, depth=12, heads=12, hidden=3072)


def large() -> Config:
    return Config(vocabulary=30522, positions=512, width=1024, depth=12, heads=16, hidden=4096)


KeysValues = tuple[Array, Array]


class Cache(NamedTuple):
    """What decoding remembers, a tuple entry a layer.

    `past`: keys and values of decoded tokens, `B*R K S D`; `context`: those of the memory, `B K N D`;
    `context_mask`: `B 1 1 N` or None; `layers`: the layers themselves, unstacked once (a slice of a stack
    inside the loop would copy every weight at every token); `kernel`: the word table turned to `D V`, for
    the same reason.
    """

    past: tuple[KeysValues, ...]
    context: tuple[KeysValues, ...]
    context_mask: Array | None
    layers: tuple[nnx.State, ...]
    kernel: Array


class Decoder(nnx.Module):
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
            lambda rngs: PostNormLayer(config, cross=True, rngs=rngs, execution=execution),
            config.depth,
            rngs=rngs,
            execution=execution,
        )
        self.predictor = WordPredictor(config.width, config.vocabulary, rngs=rngs)
        self.config = config

    def __call__(
        self, ids: Array, memory: Array, memory_mask: Array | None = None, *, key: Array | None = None
    ) -> Array:
        """Ids `B S`, memory `B N D`, its mask `B N` (True = a token stands there) -> logits `B S V`."""
        return self.predict(self.tokens(ids, memory, memory_mask, key=key))

    def tokens(
        self, ids: Array, memory: Array, memory_mask: Array | None = None, *, key: Array | None = None
    ) -> Array:
        """The same without the last projection: `B S D`, for a loss that never holds all logits at once."""
        embedding_key, layers_key = split_key(key, 2)
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        mask = causal & padding_mask(ids)[:, None, None, :]
        memory_mask = None if memory_mask is None else memory_mask[:, None, None, :]
        return fold(
            lambda x, layer, key: layer(x, mask, memory, memory_mask, key=key),
            self.embedding(ids, key=embedding_key),
            self.layers,
            key=layers_key,
        )

    def predict(self, tokens: Array) -> Array:
        """Tokens `... D` -> logits `... V`."""
        return self.predictor(tokens, self.embedding.words[...])

    def start(self, memory: Array, memory_mask: Array | None, *, rows: int, length: int) -> Cache:
        """An empty cache for `rows` sequences of at most `length` tokens over each memory of `B N D`. Raises
        RecipeError where there are fewer positions: those beyond the table would all read its last row."""
        if not 1 <= length <= self.config.positions:
            raise RecipeError(
                f"decoder: got a length of {length}; expected 1 to {self.config.positions}, its positions"
            )
        graph, _ = nnx.split(self.layers.layers)
        layers = tuple(nnx.split(self.layers[index])[1] for index in range(self.config.depth))
        context = tuple(_layer(graph, state).cross.memory(memory) for state in layers)
        batch, heads = memory.shape[0], self.config.heads
        empty = jnp.zeros((batch * rows, heads, length, self.config.width // heads), memory.dtype)
        return Cache(
            past=((empty, empty),) * self.config.depth,
            context=context,
            context_mask=None if memory_mask is None else memory_mask[:, None, None, :],
            layers=layers,
            kernel=self.embedding.words[...].T,
        )

    def step(self, ids: Array, position: Array, cache: Cache) -> tuple[Array, Cache]:
        """The logits `B R V` that follow ids `B R`, which stand at `position` (a scalar, from 0); and the
        grown cache."""
        graph, _ = nnx.split(self.layers.layers)
        batch, rows = ids.shape
        x = self.embedding(ids.reshape(-1, 1), position).reshape(batch, rows, -1)
        past = []
        for state, layer_past, context in zip(cache.layers, cache.past, cache.context, strict=True):
            x, grown = _layer(graph, state).step(x, layer_past, position, context, cache.context_mask)
            past.append(grown)
        return self.predictor.project(x, cache.kernel), cache._replace(past=tuple(past))


def _layer(graph: Any, state: nnx.State) -> PostNormLayer:
    return nnx.merge(graph, state)
