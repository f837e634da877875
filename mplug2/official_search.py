"""The official mPLUG-2 search and answer ranking, exactly: what published numbers came from.

`Official` is one more search for `mplug2.generate.decode`, with its compiled loop and its cache, and
`rank_official` stands beside `rank`. The official code (`models/predictor.py`, `rank_answer` of its model for
video QA) recomputes the whole prefix at every step; the ids are the same.

How `Official` differs from `Beam`:
- A row that has ended stays among the rows and is continued past `end`, unless it is the best of them. What
  had ended is kept, but what it grew into may be kept too: a result can hold words after `end`, also the
  first.
- An input is closed as soon as its best row ends, although others could still overtake it; its other rows
  are then ranked as they stand, though they have not ended.
- `begin` and padding may be generated. A result that ends in padding reads as a shorter text.
- `end` that comes too early scores -1e20, not -inf: a last resort, and not impossible.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mplug2.errors import RecipeError
from mplug2.generate import (
    Decoded,
    Special,
    check_beams,
    continuations,
    first_scores,
    length_penalty,
    put,
    rank,
)
from mplug2.roles import Array, Decoder

TOO_EARLY = -1e20
"""The log-probability of `end` before `least` words."""


class Growing(NamedTuple):
    """Rows `ids` `B R 1+length` with `scores` `B R` (log-probabilities), best first by penalised score; the
    texts that were set aside, `kept` `B R 1+length` with their penalised `kept_scores` `B R`, best first; and
    `closed` `B`, the inputs whose results are final.

    The official list of hypotheses has no bound. Only its `R` best are ever returned, and what is worse than
    `R` others of a list that only grows will not return to them: so these are all that must be kept.
    """

    ids: Array
    scores: Array
    kept: Array
    kept_scores: Array
    closed: Array


@dataclass(frozen=True, kw_only=True)
class Official:
    """The official beam search; the defaults are those of its captioning, question answering has `length=10,
    least=1`.

    `length`: generated ids at most; `least`: ids that come before `end` at least; `rows`: the beam; `best`:
    results. Scores are the sums of log-probabilities by `((5 + n) / 6) ** penalty`, n counted when the text
    was set aside. Should fewer texts have any probability, the rest score -inf.
    """

    length: int = 20
    least: int = 4
    rows: int = 5
    penalty: float = 0.6
    best: int = 1

    def __post_init__(self) -> None:
        check_beams(self)

    def start(self, ids: Array, key: Array | None) -> Growing:
        scores, none = first_scores(ids)
        return Growing(ids, scores, ids, none, jnp.zeros(ids.shape[:1], bool))

    def advance(
        self, state: Growing, logits: Array, position: Array, special: Special
    ) -> tuple[Growing, Array]:
        # The logarithm of rounded probabilities, as the official code has it: what rounds to 0 is impossible.
        gains = jnp.log(jax.nn.softmax(logits.astype(jnp.float32), -1))
        too_early = (jnp.arange(gains.shape[-1]) == special.end) & (position < self.least)
        totals, parents, chosen = continuations(
            state.scores, jnp.where(too_early, TOO_EARLY, gains), self.rows
        )
        ids = put(jnp.take_along_axis(state.ids, parents[..., None], 1), chosen, position + 1)
        penalty = length_penalty(position + 1, self.penalty)
        scores = totals / penalty

        ended = (chosen == special.end) | (position + 1 == self.length)
        closing = ended[:, :1]  # all rows are set aside, ended or not
        aside = (ended | closing) & ~state.closed[:, None]
        # Of equal scores the earlier comes first, as in a stable sort of the official list.
        every_score = jnp.concatenate([state.kept_scores, jnp.where(aside, scores, -jnp.inf)], 1)
        kept_scores, order = lax.top_k(every_score, self.rows)
        kept = jnp.take_along_axis(jnp.concatenate([state.kept, ids], 1), order[..., None], 1)
        return Growing(ids, scores * penalty, kept, kept_scores, state.closed | closing[:, 0]), parents

    def done(self, state: Growing) -> Array:
        return state.closed.all()

    def results(self, state: Growing) -> Decoded:
        return Decoded(state.kept[:, : self.best], state.kept_scores[:, : self.best])


class Ranked(NamedTuple):
    """The best answers of a list for each input, best first: `places` in the list, int32 `B k`, and their
    `shares` of the probability, float32 `B k`, which sum to 1."""

    places: Array
    shares: Array


def rank_official(
    decoder: Decoder, memory: Array, mask: Array | None, candidates: Array, *, best: int
) -> Ranked:
    """The official ranking of a list of answers: memory `B N D` and ids `C S`, `begin words end pad`.

    The `best` answers by the probability of their first word are chosen, and ranked by the probability of the
    whole text times that of its first word, which so counts twice; `shares` are a softmax over those chosen.
    Answers that share a first word are equal to the first choice: the first in the list go first. Prefer
    `rank`, which has neither fault.
    """
    if not 1 <= best <= len(candidates):
        raise RecipeError(f"rank_official: best is {best}; expected 1 to {len(candidates)}, the candidates")
    begin = jnp.broadcast_to(candidates[:1, :1], (memory.shape[0], 1))
    first_words = jax.nn.softmax(decoder(begin, memory, mask)[:, 0].astype(jnp.float32), -1)
    first_shares, places = lax.top_k(first_words[:, candidates[:, 1]], best)
    wholes = rank(decoder, memory, mask, candidates[places])
    shares, order = lax.top_k(jax.nn.softmax(jnp.log(first_shares) + wholes, -1), best)
    return Ranked(jnp.take_along_axis(places, order, 1), shares)
