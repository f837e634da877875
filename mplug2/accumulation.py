"""A batch in parts, computed one after the other, and what a loss asks of the whole batch meanwhile.

Parts are of one size, so a mean over examples is the mean of its parts' means, and a task that gives one
needs nothing of this. Whatever else joins examples (a mean over words, a contrast with the others) takes
`everywhere` what it joins, as it would on several devices: then its loss and its gradient are those of the
undivided batch. For that the step first finds what all parts have to give (`found`), of each part nothing
more, and then differentiates part by part (`part_of`), as GradCache does (Gao et al., arXiv:2101.06983).

Of `B` examples in `P` parts, example `i` is row `i // P` of part `i modulo P`: so every device of a mesh
keeps examples of its own in every part.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from mplug2.errors import RecipeError
from mplug2.roles import Array


@dataclass
class _Part:
    """The part that is traced. `given`: what it has been asked for so far; `known`: the same of all parts,
    `P b ...` each, or None while that is still being found."""

    parts: int
    index: Array | int
    given: list[Array]
    known: list[Array] | None


_STAND_IN = "stands in for the whole batch"

_HERE: ContextVar[_Part | None] = ContextVar("part", default=None)


@contextmanager
def part_of(parts: int, index: Array | int = 0, known: list[Array] | None = None) -> Iterator[list[Array]]:
    """While part `index` is traced within it: `everywhere` and `own` mean the whole batch, of which `known`
    is what `found` gave. The list fills with what the part gives."""
    here = _Part(parts, index, [], known)
    token = _HERE.set(here)
    try:
        yield here.given
    finally:
        _HERE.reset(token)


def found(function: Callable[..., Any], parts: int, split: Any, *args: Any) -> list[Array]:
    """What `function(*args, index, part)` takes `everywhere`, of all parts: `P b ...` each, in the order in
    which it asks. `split`: the batch, `P b ...` its arrays. Nothing else of the function is computed."""

    def given(*args: Any) -> list[Array]:
        *before, split = args

        def one_part(part: tuple[Array, Any]) -> list[Array]:
            with part_of(parts) as given:
                function(*before, *part)
            return list(given)

        return jax.lax.map(one_part, (jnp.arange(parts), split))

    traced, shapes = jax.make_jaxpr(given, return_shape=True)(*args, split)
    wanted = [True] * len(shapes)
    needed, consts, inputs = partial_eval.dce_jaxpr_consts(traced.jaxpr, wanted)
    if _STAND_IN in str(needed):
        raise RecipeError(
            "a task takes everywhere what it has made of what it took everywhere before, which is not known "
            "by then: expected something of its own examples alone (mplug2.accumulation)"
        )
    kept = [const for const, used in zip(traced.consts, consts, strict=True) if used]
    flat = [leaf for leaf, used in zip(jax.tree.leaves((*args, split)), inputs, strict=True) if used]
    return list(jaxpr_as_fun(ClosedJaxpr(needed, kept))(*flat))


def divided() -> bool:
    """Whether what is traced is a part of a batch."""
    return _HERE.get() is not None


def everywhere(x: Array) -> Array:
    """`b ...` of a part -> `B ...` of the whole batch, in its own order; `x` itself of an undivided one.

    A loss that is made of it is the whole batch's in every part, and their mean has its gradient.
    """
    here = _HERE.get()
    if here is None:
        return x
    here.given.append(x)
    if here.known is None:
        whole = checkpoint_name(jnp.stack([x] * here.parts), _STAND_IN)
    else:
        mine = x
        if jnp.issubdtype(x.dtype, jnp.inexact):
            # A part passes on the gradient of its own examples alone, and is one of those that are averaged.
            mine = x + (here.parts - 1) * (x - jax.lax.stop_gradient(x))
        known = here.known[len(here.given) - 1]
        whole = jax.lax.dynamic_update_index_in_dim(known, mine, here.index, 0)
    return rearrange(whole, "p b ... -> (b p) ...")


def own(whole: Array) -> Array:
    """The rows `b ...` of the part that is traced, of `B ...`: all of an undivided batch."""
    here = _HERE.get()
    if here is None:
        return whole
    split = rearrange(whole, "(b p) ... -> p b ...", p=here.parts)
    return jax.lax.dynamic_index_in_dim(split, here.index, keepdims=False)
