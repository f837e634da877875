"""Prompt: learned tokens that a module is given before its own (Lester et al., arXiv:2104.08691): they
enter once, with the module's input. A form of delta, of modules that are given tokens:

- `universal`, `fusion`: text tokens and vision tokens with the prompt before them, which is taken off again
- `decoder`: a memory with the prompt before it

Tokens are inputs, so no parameter of the base says the same: a prompt is never merged, and because attention
is not linear in what it reads, prompts are neither added nor averaged. A fresh one changes a little.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from mplug2.errors import RecipeError
from mplug2.modules import decoder, fusion, universal
from mplug2.modules.forms import Arrays, Form, Leaf, Path, named, positive
from mplug2.modules.functions import repeated
from mplug2.modules.layers import normal
from mplug2.roles import Array

TOKENS: Path = ("prompt",)


@dataclass(frozen=True, kw_only=True)
class Prompt(Form):
    """`length` tokens of the base's width."""

    length: int = 8

    merges: ClassVar[bool] = False

    def __post_init__(self):
        positive(self, "length")

    def merged(self, config: Any) -> Any:
        raise RecipeError(
            "a Prompt is tokens that its base is given, no parameter of the base can say them: "
            "it cannot be merged, publish the delta beside its base"
        )

    def begin(self, base: Mapping[Path, Leaf]) -> dict[Path, Leaf]:
        width = next(leaf.shape[leaf.axes.index("embed")] for leaf in base.values() if "embed" in leaf.axes)
        return {TOKENS: Leaf((self.length, width), ("places", "embed"), normal())}

    def around(self, module: Any, delta: Arrays) -> Any:
        return _PROMPTED[type(module.config)](module, delta[TOKENS])

    def check(self, config: Any) -> None:
        """Raises RecipeError for the config of a module that is given no tokens."""
        if type(config) not in _PROMPTED:
            known = ", ".join(kind.__module__.rpartition(".")[2] for kind in _PROMPTED)
            raise RecipeError(
                f"{named(config)} is given no tokens that a Prompt could stand before; these are: {known}"
            )

    @staticmethod
    def sum(parts: Sequence[tuple["Prompt", Arrays, float]]) -> Any:
        raise RecipeError(
            "prompts cannot be added or averaged: attention is not linear in the tokens that it reads; "
            "switch between them by request"
        )


class _Prompted:
    """A module with its prompt; whatever reads no tokens is the module's own."""

    def __init__(self, module: Any, prompt: Array):
        self._module, self._prompt = module, prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _before(self, tokens: Array) -> Array:
        """`B N D` -> `B P+N D`."""
        prompt: Array = repeated(self._prompt, (len(tokens), *self._prompt.shape), tokens.dtype)
        return jnp.concatenate([prompt, tokens], axis=1)

    def _seen(self, mask: Array) -> Array:
        """`B N` -> `B P+N`, True where a prompt's token stands."""
        return jnp.pad(mask, ((0, 0), (len(self._prompt), 0)), constant_values=True)

    def _own(self, tokens: Array) -> Array:
        """`B P+N D` -> `B N D`."""
        return tokens[:, len(self._prompt) :]


class _Universal(_Prompted):
    def text(self, tokens: Array, mask: Array, *, key: Array | None = None) -> Array:
        return self._own(self._module.text(self._before(tokens), self._seen(mask), key=key))

    def vision(self, tokens: Array, *, key: Array | None = None) -> Array:
        return self._own(self._module.vision(self._before(tokens), key=key))


class _Fusion(_Prompted):
    def __call__(
        self, vision: Array, text: Array, text_mask: Array, *rest: Any, key: Array | None = None
    ) -> tuple[Array, Array]:
        vision, text = self._module(vision, self._before(text), self._seen(text_mask), *rest, key=key)
        return vision, self._own(text)


class _Decoder(_Prompted):
    def __call__(
        self, ids: Array, memory: Array, memory_mask: Array | None = None, *, key: Array | None = None
    ) -> Array:
        return self._module(ids, *self._memory(memory, memory_mask), key=key)

    def tokens(
        self, ids: Array, memory: Array, memory_mask: Array | None = None, *, key: Array | None = None
    ) -> Array:
        return self._module.tokens(ids, *self._memory(memory, memory_mask), key=key)

    def start(self, memory: Array, memory_mask: Array | None, *, rows: int, length: int) -> Any:
        return self._module.start(*self._memory(memory, memory_mask), rows=rows, length=length)

    def _memory(self, memory: Array, mask: Array | None) -> tuple[Array, Array | None]:
        return self._before(memory), None if mask is None else self._seen(mask)


_PROMPTED = {universal.Config: _Universal, fusion.Config: _Fusion, decoder.Config: _Decoder}
