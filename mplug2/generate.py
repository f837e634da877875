"""Generation: a decoder and a memory `B N D` -> texts `B results 1+length` and their scores, one compiled
loop.

`decode` owns the loop and the key-value cache; a search, one frozen dataclass a kind, owns what is kept:
`Greedy`, `Beam`, `Sample`. `rank` scores given answers through the same cache. All of it works inside
`jax.jit`; the rows of one input (beams, samples, answers) are queries over its one cross-attention memory,
which is never repeated.

A text is `begin words end pad pad`, as in a batch. Padding and `begin` are never generated. A row that is
finished stays as it is. (`mplug2.official_search` keeps neither promise, as the official code does not.)
Length penalty `((5 + n) / 6) ** alpha` with n the generated ids, end included: Wu et al. 2016, as mPLUG-2 has
it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mplug2.errors import RecipeError
from mplug2.roles import PAD, Array, Decoder


class Decoded(NamedTuple):
    """What was found for each input, best first: `ids` int32 `B results 1+length`, `scores` float32 `B
    results`."""

    ids: Array
    scores: Array


class Special(NamedTuple):
    """The ids of a tokenizer that a search must know."""

    begin: int
    end: int


class Search(Protocol):
    """A rule that grows `rows` texts side by side for each input, by at most `length` ids.

    Its state is a tuple of arrays whose field `ids`, `B R 1+length`, holds the rows that are being grown.
    """

    @property
    def length(self) -> int: ...

    @property
    def rows(self) -> int: ...

    def start(self, ids: Array, key: Array | None) -> Any:
        """The state before the first step; `ids` holds `begin` and padding."""
        ...

    def advance(
        self, state: Any, logits: Array, position: Array, special: Special
    ) -> tuple[Any, Array | None]:
        """Chooses the ids at `position + 1` by logits `B R V`: the new state, and which row `B R` each new
        row continues (None: its own)."""
        ...

    def done(self, state: Any) -> Array:
        """True when no further step can change the results."""
        ...

    def results(self, state: Any) -> Decoded: ...


def decode(
    decoder: Decoder,
    memory: Array,
    mask: Array | None,
    search: Search,
    *,
    begin: int,
    end: int,
    key: Array | None = None,
) -> Decoded:
    """Texts for each memory of `B N D` (its mask `B N`, True = a token stands there). `key` is what `Sample`
    draws by. Raises RecipeError where the search is longer than the decoder has positions."""
    batch, rows, special = memory.shape[0], search.rows, Special(begin, end)
    cache = decoder.start(memory, mask, rows=rows, length=search.length)
    ids = jnp.full((batch, rows, 1 + search.length), PAD, jnp.int32).at[..., 0].set(begin)
    first_rows = jnp.arange(batch)[:, None] * rows

    def go_on(carry: tuple[Array, Any, Any]) -> Array:
        position, _, state = carry
        return (position < search.length) & ~search.done(state)

    def step(carry: tuple[Array, Any, Any]) -> tuple[Array, Any, Any]:
        position, past, state = carry
        # Only the past is carried: what the loop does not change must not be copied by it.
        logits, grown = decoder.step(state.ids[..., position], position, cache._replace(past=past))
        state, parents = search.advance(state, logits, position, special)
        past = grown.past
        if parents is not None:
            chosen = (first_rows + parents).reshape(-1)
            past = jax.tree.map(lambda values: values[chosen], past)
        return position + 1, past, state

    start = (jnp.zeros((), jnp.int32), cache.past, search.start(ids, key))
    return search.results(lax.while_loop(go_on, step, start)[2])


def rank(decoder: Decoder, memory: Array, mask: Array | None, candidates: Array) -> Array:
    """The log-probability of every answer of a list, end included: memory `B N D` and ids `C S` (one list for
    all) or `B C S` (one each), `begin words end pad` -> float32 `B C`. The best answer has the highest."""
    candidates = jnp.broadcast_to(candidates, (memory.shape[0], *candidates.shape[-2:]))
    _, rows, length = candidates.shape
    cache = decoder.start(memory, mask, rows=rows, length=length - 1)

    def step(carry: tuple[Any, Array], position: Array) -> tuple[tuple[Any, Array], None]:
        past, scores = carry
        logits, grown = decoder.step(candidates[..., position], position, cache._replace(past=past))
        target = candidates[..., position + 1]
        gained = jnp.take_along_axis(_log_softmax(logits), target[..., None], -1)[..., 0]
        return (grown.past, scores + jnp.where(target == PAD, 0.0, gained)), None

    start = (cache.past, jnp.zeros(candidates.shape[:2], jnp.float32))
    return lax.scan(step, start, jnp.arange(length - 1))[0][1]


# ------------------------------------------------------------------------------------------------------------
# Searches


class Rows(NamedTuple):
    """Rows that never change places: `ids` `B R 1+length`, `scores` `B R` (summed log-probabilities),
    `finished` `B R`."""

    ids: Array
    scores: Array
    finished: Array
    key: Array | None

    def grown(self, chosen: Array, log_probabilities: Array, position: Array, special: Special) -> "Rows":
        """With ids `chosen` `B R` at `position + 1`; finished rows get padding, and nothing is added to their
        scores."""
        gained = jnp.take_along_axis(log_probabilities, chosen[..., None], -1)[..., 0]
        chosen = jnp.where(self.finished, PAD, chosen)
        return self._replace(
            ids=put(self.ids, chosen, position + 1),
            scores=self.scores + jnp.where(self.finished, 0.0, gained),
            finished=self.finished | (chosen == special.end),
        )


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The likeliest id at every step. One result; its score is the sum of log-probabilities.

    `length`: generated ids at most, end included; `least`: words at least.
    """

    length: int = 20
    least: int = 0

    def __post_init__(self) -> None:
        check_lengths(self)

    @property
    def rows(self) -> int:
        return 1

    def start(self, ids: Array, key: Array | None) -> Rows:
        return _rows(ids, None)

    def advance(self, state: Rows, logits: Array, position: Array, special: Special) -> tuple[Rows, None]:
        scores = _log_softmax(logits)
        chosen = _allowed(scores, position, self.least, special).argmax(-1).astype(jnp.int32)
        return state.grown(chosen, scores, position, special), None

    def done(self, state: Rows) -> Array:
        return state.finished.all()

    def results(self, state: Rows) -> Decoded:
        return Decoded(state.ids, state.scores)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws `rows` texts independently; results are sorted by the model's own penalised score, so that the
    first is the best of them (best-of-n).

    `temperature` divides the logits; then only the `top_k` likeliest ids are drawn (0: all), and of these the
    fewest that hold `top_p` of the probability.
    """

    length: int = 20
    least: int = 0
    rows: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    penalty: float = 0.0

    def __post_init__(self) -> None:
        check_lengths(self)
        if self.rows < 1 or self.temperature <= 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise RecipeError(f"{self}: expected rows >= 1, temperature > 0, top_k >= 0 and 0 < top_p <= 1")

    def start(self, ids: Array, key: Array | None) -> Rows:
        if key is None:
            raise RecipeError("Sample draws at random: decode needs a key")
        return _rows(ids, key)

    def advance(self, state: Rows, logits: Array, position: Array, special: Special) -> tuple[Rows, None]:
        scores = _log_softmax(logits)
        allowed = _allowed(scores, position, self.least, special) / self.temperature
        count = allowed.shape[-1]
        likeliest, ids = lax.top_k(allowed, min(self.top_k or count, count))
        shares = jax.nn.softmax(likeliest, -1)
        before = shares.cumsum(-1) - shares
        likeliest = jnp.where(before < self.top_p, likeliest, -jnp.inf)
        assert state.key is not None
        drawn = jax.random.categorical(jax.random.fold_in(state.key, position), likeliest)
        chosen = jnp.take_along_axis(ids, drawn[..., None], -1)[..., 0]
        return state.grown(chosen, scores, position, special), None

    def done(self, state: Rows) -> Array:
        return state.finished.all()

    def results(self, state: Rows) -> Decoded:
        lengths = (state.ids[..., 1:] != PAD).sum(-1)
        scores, order = lax.top_k(state.scores / length_penalty(lengths, self.penalty), self.rows)
        return Decoded(jnp.take_along_axis(state.ids, order[..., None], 1), scores)


class Beams(NamedTuple):
    """Live rows `ids` `B R 1+length` with `scores` `B R` (log-probabilities; -inf: no such row), and the
    finished texts `found` `B R 1+length` with their penalised `found_scores` `B R`, best first."""

    ids: Array
    scores: Array
    found: Array
    found_scores: Array


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Beam search. Of all continuations of the live rows, those among the `rows` likeliest that end are
    finished and set aside; the likeliest that do not end live on, always `rows` of them. A text is finished
    once and never grows.

    An input is closed when `rows` texts are finished, or when no live row can still enter its `results` best;
    what else is in the batch never changes its results. Should fewer texts exist, the rest score -inf.
    """

    length: int = 20
    least: int = 0
    rows: int = 5
    penalty: float = 0.6
    best: int = 1

    def __post_init__(self) -> None:
        check_beams(self)

    def start(self, ids: Array, key: Array | None) -> Beams:
        scores, none = first_scores(ids)
        return Beams(ids, scores, ids, none)

    def advance(self, state: Beams, logits: Array, position: Array, special: Special) -> tuple[Beams, Array]:
        allowed = _allowed(_log_softmax(logits), position, self.least, special)
        scores, parents, chosen = continuations(state.scores, allowed, 2 * self.rows)
        ids = put(jnp.take_along_axis(state.ids, parents[..., None], 1), chosen, position + 1)

        # At the last step every row is finished, with or without `end`.
        ends = (chosen == special.end) & jnp.isfinite(scores)
        finished = (ends | (position + 1 == self.length))[:, : self.rows] & ~self._closed(state)[:, None]
        new_scores = jnp.where(
            finished, scores[:, : self.rows] / length_penalty(position + 1, self.penalty), -jnp.inf
        )
        found_scores, order = lax.top_k(jnp.concatenate([state.found_scores, new_scores], 1), self.rows)
        found = jnp.concatenate([state.found, ids[:, : self.rows]], 1)
        found = jnp.take_along_axis(found, order[..., None], 1)

        live_scores, order = lax.top_k(jnp.where(ends, -jnp.inf, scores), self.rows)
        live = jnp.take_along_axis(ids, order[..., None], 1)
        parents = jnp.take_along_axis(parents, order, 1)
        return Beams(live, live_scores, found, found_scores), parents

    def _closed(self, state: Beams) -> Array:
        """Inputs `B` whose results are final: log-probabilities only fall, and the longest text is penalised
        least."""
        within_reach = state.scores.max(1) / length_penalty(jnp.asarray(self.length), self.penalty)
        full = jnp.isfinite(state.found_scores).all(1)
        return full | (state.found_scores[:, self.best - 1] >= within_reach)

    def done(self, state: Beams) -> Array:
        return self._closed(state).all()

    def results(self, state: Beams) -> Decoded:
        return Decoded(state.found[:, : self.best], state.found_scores[:, : self.best])


# ------------------------------------------------------------------------------------------------------------
# What searches share


def check_lengths(search: Any) -> None:
    if search.length < 1 or not 0 <= search.least <= search.length:
        raise RecipeError(f"{search}: expected length >= 1 and least from 0 to length")


def check_beams(search: Any) -> None:
    check_lengths(search)
    if search.rows < 1 or search.penalty < 0 or not 1 <= search.best <= search.rows:
        raise RecipeError(
            f"{search}: expected rows >= 1, penalty >= 0 and best (results given) from 1 to rows"
        )


def first_scores(ids: Array) -> tuple[Array, Array]:
    """Scores `B R` of rows that are all alike at first, so that one of them goes on; and of texts when there
    are none."""
    none = jnp.full(ids.shape[:2], -jnp.inf, jnp.float32)
    return none.at[:, 0].set(0.0), none


def _rows(ids: Array, key: Array | None) -> Rows:
    return Rows(ids, jnp.zeros(ids.shape[:2], jnp.float32), jnp.zeros(ids.shape[:2], bool), key)


def _log_softmax(logits: Array) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32), -1)


def _allowed(scores: Array, position: Array, least: int, special: Special) -> Array:
    """Scores `B R V` with -inf for what may not come next: padding, `begin`, and `end` before `least`
    words."""
    id = jnp.arange(scores.shape[-1])
    too_short = (id == special.end) & (position < least)
    return jnp.where((id == PAD) | (id == special.begin) | too_short, -jnp.inf, scores)


def continuations(scores: Array, gains: Array, count: int) -> tuple[Array, Array, Array]:
    """The `count` best of scores `B R` + gains `B R V`: (scores, rows, ids), each `B count`, best first.

    In two stages, the best of every row and then the best of those: a row has thousands of ids, and few are
    needed.
    """
    best, ids = lax.top_k(gains, min(count, gains.shape[-1]))
    each = best.shape[-1]
    totals = (scores[..., None] + best).reshape(scores.shape[0], -1)
    totals, places = lax.top_k(totals, min(count, totals.shape[-1]))
    return totals, places // each, jnp.take_along_axis(ids.reshape(totals.shape[0], -1), places, 1)


def put(ids: Array, chosen: Array, position: Array) -> Array:
    """Ids `B R S` with `chosen` `B R` at `position`."""
    return lax.dynamic_update_slice_in_dim(ids, chosen[..., None].astype(ids.dtype), position, 2)


def length_penalty(length: Array, alpha: float) -> Array:
    return ((5.0 + length) / 6.0) ** alpha
