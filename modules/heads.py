"""Heads: what is read from tokens for a task that does not generate. One class and one config each.

`Contrastive`: two streams -> one space of unit vectors, with a learned temperature (ALBEF, mPLUG).
`Classifier`: first token -> class logits; with two classes it is the matching head (does this text fit this
picture?). `Unmasker`: text tokens -> vocabulary logits, through the text encoder's own word table.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx

from mplug2.modules.functions import bounded, dropout
from mplug2.modules.layers import Linear, WordPredictor, parameter, spread, whole
from mplug2.roles import Array, Execution, sum_dtype


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """`width` is that of both streams, `space` that of the shared space."""

    width: int
    space: int
    temperature: float = 0.07

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Contrastive":
        return Contrastive(self, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    width: int
    classes: int
    dropout: float = 0.1

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Classifier":
        return Classifier(self, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class UnmaskerConfig:
    width: int
    vocabulary: int

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "Unmasker":
        return Unmasker(self, rngs=rngs)


class Contrastive(nnx.Module):
    BOUNDS = 0.001, 0.5

    def __init__(self, config: ContrastiveConfig, *, rngs: nnx.Rngs):
        self.vision_projection = Linear(config.width, config.space, axes=("embed", "mlp"), rngs=rngs)
        self.text_projection = Linear(config.width, config.space, axes=("embed", "mlp"), rngs=rngs)
        self.learned_temperature = parameter(
            lambda key, shape: jnp.full(shape, config.temperature), (), (), rngs, self.BOUNDS
        )
        self.config = config

    def vision(self, tokens: Array) -> Array:
        """Vision tokens `B N D` -> unit vectors `B space`, float32."""
        return _unit(self.vision_projection(tokens[:, 0]))

    def text(self, tokens: Array) -> Array:
        """Text tokens `B S D` -> unit vectors `B space`, float32."""
        return _unit(self.text_projection(tokens[:, 0]))

    def similarity(self, vision: Array, text: Array) -> Array:
        """Vision tokens `B N D`, text tokens `B S D` -> `B B`, row = vision, column = text, divided by the
        temperature. On a mesh every device has the rows of its own examples: vectors of texts are gathered,
        similarities never."""
        texts = whole(self.text(text))
        return spread(spread(self.vision(vision)) @ texts.T / self.temperature())

    def temperature(self) -> Array:
        """The scalar that similarities are divided by, kept within mPLUG's bounds."""
        return bounded(self.learned_temperature[...], *self.BOUNDS)


def _unit(x: Array) -> Array:
    x = x.astype(sum_dtype(x))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Classifier(nnx.Module):
    def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
        self.linear = Linear(config.width, config.classes, axes=("embed", "mlp"), rngs=rngs)
        self.config = config

    def __call__(self, tokens: Array, *, key: Array | None = None) -> Array:
        """Tokens `B N D` -> logits `B classes`, float32."""
        logits = self.linear(dropout(tokens[:, 0], self.config.dropout, key))
        return logits.astype(sum_dtype(logits))


class Unmasker(nnx.Module):
    def __init__(self, config: UnmaskerConfig, *, rngs: nnx.Rngs):
        self.predictor = WordPredictor(config.width, config.vocabulary, rngs=rngs)
        self.config = config

    def __call__(self, tokens: Array, table: Array) -> Array:
        """Tokens `B S D`, the text encoder's word table `V D` -> logits `B S V`."""
        return self.predictor(tokens, table)
