"""Parity of what is generated: the official search and answer ranking over a case's own memory."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from mplug2.convert import stages
from mplug2.convert.recorded import QUICK, Case, Check, ids_of, worst_error
from mplug2.generate import decode
from mplug2.network import Parameters
from mplug2.official_search import Official, rank_official
from mplug2.roles import PAD, Array

END = 102
"""[SEP], whatever the vocabulary: the official search has its number written in."""

SEARCHED = re.compile(r"out\.gen\.beam(\d+)\.min(\d+)\.max(\d+)\.ids")
RANKED = "out.rank.topk_ids"


def compare_generation(case: Case, memory: np.ndarray, mask: np.ndarray, atol: float) -> list[Check]:
    """Every recorded search and ranking over the decoder's memory `B N D` and mask `B N`, as our own modules
    made them. Ids are counted: one text or place that differs is a miss."""
    checks = []
    seen, tokens = jnp.asarray(memory), jnp.asarray(mask) != 0
    for name in sorted(case.given):
        if match := SEARCHED.fullmatch(name):
            checks += _search_checks(case, [int(number) for number in match.groups()], seen, tokens, atol)
    return checks + (_rank_checks(case, seen, tokens, atol) if RANKED in case.given else [])


def _search_checks(case: Case, setting: list[int], memory: Array, mask: Array, atol: float) -> list[Check]:
    rows, least, length = setting
    name = f"gen.beam{rows}.min{least}.max{length}"
    ids, lengths, scores = (case.given[f"out.{name}.{kind}"] for kind in ("ids", "lengths", "scores"))
    search = Official(length=length, least=least, rows=rows, best=rows)

    def run(params: Parameters, memory: Array, mask: Array) -> tuple[Array, Array]:
        decoder = stages.bound(case.model.configs, params)["decoder"]
        return decode(decoder, memory, mask, search, begin=int(ids[0, 0, 0]), end=END)

    found = jax.jit(run, compiler_options=QUICK)(case.params, memory, mask)
    made, made_scores = (np.asarray(part)[:, : ids.shape[1]] for part in found)
    inside = np.arange(ids.shape[2]) < lengths[..., None]
    return [
        Check(case.name, f"{name}.ids", float((inside & (made != ids)).any(-1).sum()), 0),
        # What was generated may be padding itself: a length shows only in what does not follow.
        Check(case.name, f"{name}.lengths", float((~inside & (made != PAD)).any(-1).sum()), 0),
        Check(case.name, f"{name}.scores", worst_error(made_scores, scores), atol),
    ]


def _rank_checks(case: Case, memory: Array, mask: Array, atol: float) -> list[Check]:
    candidates = ids_of(case, "rank.candidate")
    places, shares = case.given[RANKED], case.given["out.rank.topk_probs"]

    def run(params: Parameters, memory: Array, mask: Array) -> tuple[Array, Array]:
        decoder = stages.bound(case.model.configs, params)["decoder"]
        return rank_official(decoder, memory, mask, candidates, best=places.shape[1])

    made, made_shares = jax.jit(run, compiler_options=QUICK)(case.params, memory, mask)
    return [
        Check(case.name, RANKED.removeprefix("out."), float((np.asarray(made) != places).sum()), 0),
        Check(case.name, "rank.topk_probs", worst_error(made_shares, shares), atol),
    ]
