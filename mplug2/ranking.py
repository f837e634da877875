"""Answer lists: an answer is not written word by word but chosen from a list, by the decoder's probability.

`Ranked` takes the likeliest text of the whole list (`generate.rank`), `OfficialRanked` what the official
mPLUG-2 code takes (`official_search.rank_official`). Both stand where a search stands in
`evaluations.Answering`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import lax

from mplug2.data.annotations import read_answers
from mplug2.data.tokens import Tokenizer
from mplug2.data.wording import Plain, Wording
from mplug2.errors import DataError
from mplug2.generate import rank
from mplug2.official_search import rank_official
from mplug2.places import Place
from mplug2.roles import Array, Decoder

Write = Callable[[Decoder, Array, Array | None, Array], Array]
"""(decoder, memory `B N D`, mask `B N`, index `B`) -> ids of a text for each memory, `B S`."""


@runtime_checkable
class AnswerList(Protocol):
    """A list of answers, and how one of them is chosen."""

    def writer(self, tokenizer: Tokenizer) -> Write:
        """What chooses, by ids of the tokenizer. Equal lists give equal writers. Raises DataError."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """The likeliest answer of a list, each scored by its whole text, end included.

    `file`: a json object whose keys are the answers, or jsonl with an "answer" a line; `length`: ids at most;
    `wording`: how training worded answers; `rows`: answers of the list that are scored side by side for every
    input of a batch: fewer need less memory.
    """

    file: Place
    length: int = 16
    wording: Wording = Plain()
    rows: int = 128

    def writer(self, tokenizer: Tokenizer) -> Write:
        return _Likeliest(_candidates(self.file, self.wording, tokenizer, self.length), self.rows)


@dataclass(frozen=True, kw_only=True)
class OfficialRanked:
    """As `rank_official`: of the `best` answers by their first word, the one with the highest rank. Fields as
    in `Ranked`."""

    file: Place
    length: int = 16
    wording: Wording = Plain()
    best: int = 128

    def writer(self, tokenizer: Tokenizer) -> Write:
        candidates = _candidates(self.file, self.wording, tokenizer, self.length)
        return _OfficialChoice(candidates, min(self.best, len(candidates)))


Ids = tuple[tuple[int, ...], ...]


def _candidates(file: str, wording: Wording, tokenizer: Tokenizer, length: int) -> Ids:
    """Ids `C length` of the answers in a file. Raises DataError where one does not fit, since what is cut is
    another answer."""
    end, found = tokenizer.table()["end"], []
    for answer in read_answers(file):
        whole = tokenizer.encode(wording.answer(answer), 8 * length)
        if end not in whole or np.count_nonzero(whole) > length:
            raise DataError(f'{file}: the answer "{answer}" does not fit into {length} ids with its end')
        found.append(tuple(map(int, whole[:length])))
    if not found:
        raise DataError(f"{file} holds no answer")
    return tuple(found)


@dataclass(frozen=True)
class _Likeliest:
    candidates: Ids
    rows: int

    def __call__(self, decoder: Decoder, memory: Array, mask: Array | None, index: Array) -> Array:
        ids = np.array(self.candidates, np.int32)
        rows = min(self.rows, len(ids))
        # The last block is filled up with copies of the first answer, which come after it and lose its ties.
        blocks = np.concatenate([ids, np.repeat(ids[:1], -len(ids) % rows, 0)]).reshape(
            -1, rows, ids.shape[1]
        )
        scores = lax.map(lambda block: rank(decoder, memory, mask, block), jnp.asarray(blocks))
        best = jnp.moveaxis(scores, 0, 1).reshape(memory.shape[0], -1).argmax(-1)
        return jnp.asarray(blocks.reshape(-1, ids.shape[1]))[best]


@dataclass(frozen=True)
class _OfficialChoice:
    candidates: Ids
    best: int

    def __call__(self, decoder: Decoder, memory: Array, mask: Array | None, index: Array) -> Array:
        ids = jnp.asarray(self.candidates, jnp.int32)
        return ids[rank_official(decoder, memory, mask, ids, best=self.best).places[:, 0]]
