"""The parts that modules play, and how they are executed. Imports nothing of ours.

Axis letters, used in every docstring, einops pattern (lower case) and test of the project:
`B` batch, `T` frames, `H W C` pixels, `S` text tokens, `N` any tokens, `D` width, `K` heads, `V`
vocabulary, `L` layers, `R` rows decoded side by side for one input (beams or samples).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array

PAD = 0
"""The id of padding in every tokenizer of the zoo; a text mask is always `ids != PAD`."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a network is run; never what it computes. Part of a recipe, given to each module when it is built.

    `dtype` is the type that activations flow in (parameters, softmax, norms' statistics and losses stay
    float32); `remat` says what the backward pass computes again: nothing, everything but products with
    weights ("offload": they wait in the host's memory), or whole layers; `scan` runs stacked layers as
    one `lax.scan` (quick to compile) instead of unrolling them (quick to run); `attention` is who computes it
    where no weights drop out: our own written-out products, XLA's, cuDNN's fused kernel (GPUs, bfloat16), or
    JAX's splash kernels (TPUs).
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "offload", "full"] = "none"
    scan: bool = True
    attention: Literal["written", "xla", "cudnn", "splash"] = "written"


@runtime_checkable
class Config(Protocol):
    """A module's configuration: a frozen dataclass that can build the module."""

    def build(self, *, rngs: nnx.Rngs, execution: Execution) -> Any: ...


DELTA = "_delta"
"""A module's delta is called like the module, with this at the end."""


def base_of(name: str) -> str | None:
    """`universal_delta` -> `universal`: the module that a delta is of; None for what is not one."""
    return name.removesuffix(DELTA) if name.endswith(DELTA) else None


class Delta(Protocol):
    """Adapts a module: the base's parameters -> those that it computes with, nested dict -> nested dict; and,
    unless `merges`, what it is given: the base as an object -> one that is called like it."""

    merges: bool

    def __call__(self, params: Mapping[str, Any], *, key: Array | None = None) -> dict[str, Any]: ...

    def around(self, module: Any) -> Any: ...


class Form(Protocol):
    """How a module is adapted (LoRA of a rank, ...): gives the config of such a delta of a module."""

    def delta(self, config: Config) -> Config: ...


class Temporal(Protocol):
    """The video-only branches of every vision block (`B T N D -> B T N D`, added by the caller)."""

    branches: Any


class Vision(Protocol):
    """One encoder for images and videos: normalised clips `B T H W C` -> `B 1+T*N D`, class token first."""

    def __call__(
        self, clips: Array, temporal: Temporal | None = None, *, key: Array | None = None
    ) -> Array: ...


class Text(Protocol):
    """Text encoder: ids `B S` -> tokens `B S D`, the first of them stands for the whole text."""

    words: Any

    def __call__(self, ids: Array, *, key: Array | None = None) -> Array: ...


class Connector(Protocol):
    """Brings vision tokens `B N D` to another width, when two modules of different widths are composed."""

    def __call__(self, tokens: Array, *, key: Array | None = None) -> Array: ...


class Universal(Protocol):
    """Layers shared by all modalities, one method a stream; no mode strings."""

    def text(self, tokens: Array, mask: Array, *, key: Array | None = None) -> Array: ...

    def vision(self, tokens: Array, *, key: Array | None = None) -> Array: ...


class Fusion(Protocol):
    """Text tokens attend to vision tokens: returns (vision tokens, text tokens)."""

    def __call__(
        self, vision: Array, text: Array, text_mask: Array, *, key: Array | None = None
    ) -> tuple[Array, Array]: ...


class Decoder(Protocol):
    """Autoregressive text decoder over a memory of tokens: ids -> `predict(tokens(...))`, logits; `start` and
    `step` decode with a cache."""

    def __call__(
        self, ids: Array, memory: Array, memory_mask: Array | None = None, *, key: Array | None = None
    ) -> Array: ...

    def tokens(
        self, ids: Array, memory: Array, memory_mask: Array | None = None, *, key: Array | None = None
    ) -> Array: ...

    def predict(self, tokens: Array) -> Array: ...

    def start(self, memory: Array, memory_mask: Array | None, *, rows: int, length: int) -> Any: ...

    def step(self, ids: Array, position: Array, cache: Any) -> tuple[Array, Any]: ...


class Contrastive(Protocol):
    """Projects the two first tokens into one space: unit vectors `B D`; `temperature()` divides
    similarities; `similarity` is `B B`, row = vision, column = text, so divided."""

    def vision(self, tokens: Array) -> Array: ...

    def text(self, tokens: Array) -> Array: ...

    def similarity(self, vision: Array, text: Array) -> Array: ...

    def temperature(self) -> Array: ...


class Head(Protocol):
    """Class logits `B classes` from tokens `B N D`."""

    def __call__(self, tokens: Array, *, key: Array | None = None) -> Array: ...


class Unmasker(Protocol):
    """Vocabulary logits `B S V` from text tokens; `table` is the text encoder's word table, shared by
    call."""

    def __call__(self, tokens: Array, table: Array) -> Array: ...


def padding_mask(ids: Array) -> Array:
    """True where a token stands: ids `B S` -> bool `B S`."""
    return jnp.not_equal(ids, PAD)


def sum_dtype(*arrays: Array) -> Any:
    """What sums over such numbers are kept in: float32, whatever is narrower; float64 stays float64, in which
    the equality of two ways to compute can be told from rounding."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def split_key(key: Array | None, count: int) -> tuple[Array | None, ...]:
    """`count` keys from one, or as many Nones: a part that gets no key drops nothing."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
