"""The official search against its description: by lists of whole prefixes, and on cases computed by hand.

A scripted decoder looks its words up by all words before them, so that what it must say is known.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2.errors import RecipeError
from mplug2.generate import Beam, decode, rank
from mplug2.official_search import Official, rank_official

PAD, BEGIN, END, VOCABULARY = 0, 2, 3, 6  # three words: 1, 4, 5
SIZE = 9973


def number(prefix, first=0):
    """The place of a prefix in a script; prefixes of up to four ids of input 0 each have their own."""
    for id in prefix:
        first = (first * VOCABULARY + int(id)) % SIZE
    return first


class Past(NamedTuple):
    past: jax.Array


class Scripted:
    """A decoder that reads its logits from a table `SIZE V`. The number of the words so far travels in the
    cache, as keys and values do; a memory `B 1 1` is the number that it starts from."""

    def __init__(self, table):
        self.table = jnp.asarray(table)

    def start(self, memory, memory_mask, *, rows, length):
        return Past(jnp.repeat(memory[:, 0, 0].astype(jnp.int32), rows))

    def step(self, ids, position, cache):
        past = (cache.past * VOCABULARY + ids.reshape(-1)) % SIZE
        return self.table[past].reshape(*ids.shape, VOCABULARY), Past(past)

    def __call__(self, ids, memory, memory_mask=None, *, key=None):
        cache, rows = self.start(memory, memory_mask, rows=1, length=ids.shape[1]), []
        for position in range(ids.shape[1]):
            logits, cache = self.step(ids[:, position, None], position, cache)
            rows.append(logits)
        return jnp.concatenate(rows, 1)

    tokens = __call__

    def predict(self, tokens):
        return tokens


def script(chances: dict[tuple[int, ...], dict[int, float]]) -> Scripted:
    """By the chances of the next word after the words given; what is left goes evenly to the other ids."""
    table = np.full((SIZE, VOCABULARY), 1 / VOCABULARY)
    for words, chance in chances.items():
        rest = (1 - sum(chance.values())) / (VOCABULARY - len(chance))
        table[number((BEGIN, *words))] = [chance.get(id, rest) for id in range(VOCABULARY)]
    with np.errstate(divide="ignore"):
        return Scripted(np.log(table).astype(np.float32))


def search(decoder, rule):
    """The texts that a search finds for one input, without padding at their ends, and their scores."""
    found = decode(decoder, jnp.zeros((1, 1, 1)), None, rule, begin=BEGIN, end=END)
    return [tuple(np.trim_zeros(text[1:], "b")) for text in np.asarray(found.ids[0])], found.scores[0]


def by_lists(table, first, rule):
    """What the official code does: every prefix anew, a list of hypotheses, one stable sort at the end."""
    rows, sums, hypotheses = [[BEGIN]] * rule.rows, [0.0] + [-np.inf] * (rule.rows - 1), []
    for step in range(rule.length):
        penalty, options = ((5 + step + 1) / 6) ** rule.penalty, []
        for text, total in zip(rows, sums, strict=True):
            logits = table[number(text, first)].astype(np.float64)
            gains = logits - np.log(np.exp(logits).sum())
            if step < rule.least:
                gains[END] = -1e20
            options += [((total + gain) / penalty, [*text, id]) for id, gain in enumerate(gains)]
        options = sorted(options, key=lambda option: option[0], reverse=True)[: rule.rows]
        rows, sums = [text for _, text in options], [score * penalty for score, _ in options]
        ended = [text[-1] == END or step + 1 == rule.length for text in rows]
        hypotheses += [option for option, done in zip(options, ended, strict=True) if done or ended[0]]
        if ended[0]:
            break
    return sorted(hypotheses, key=lambda option: option[0], reverse=True)[: rule.best]


@pytest.mark.parametrize(
    "rule",
    [
        Official(length=7, least=0, rows=3, best=3),
        Official(length=6, least=2, rows=5, best=5, penalty=1.5),
        Official(length=5, least=0, rows=1),
    ],
)
def test_the_loop_finds_what_lists_of_hypotheses_find(rule):
    table = np.random.default_rng(rule.rows).normal(scale=1.5, size=(SIZE, VOCABULARY)).astype(np.float32)
    inputs, lengths, grown = 200, set(), 0
    memory = jnp.arange(inputs)[:, None, None]
    found = jax.jit(lambda table: decode(Scripted(table), memory, None, rule, begin=BEGIN, end=END))(table)
    for first, ids, scores in zip(range(inputs), *map(np.asarray, found), strict=True):
        expected = by_lists(table, first, rule)
        for row, (score, text) in enumerate(expected):
            assert list(ids[row]) == text + [PAD] * (1 + rule.length - len(text))
            assert scores[row] == pytest.approx(score, abs=1e-4)
            grown += END in text[:-1]
        lengths.add(len(expected[0][1]))
    assert len(lengths) > 2  # inputs closed at different steps
    assert grown > 0 or rule.rows == 1


GROWS = script(
    {
        (): {1: 0.5, END: 0.4},
        (1,): {4: 0.3, 5: 0.25, END: 0.2},
        (END,): {5: 0.9},
        (1, 4): {END: 0.9},
        (END, 5): {5: 0.9},
    }
)


def test_a_row_that_ended_but_is_not_the_best_grows_on_and_is_kept_twice():
    texts, scores = search(GROWS, Official(length=3, least=0, rows=2, best=2, penalty=0.0))
    assert texts == [(END,), (END, 5, 5)]
    np.testing.assert_allclose(np.exp(scores), [0.4, 0.4 * 0.81], rtol=1e-4)
    # Where the zoo's own search has finished texts alone:
    texts, scores = search(GROWS, Beam(length=3, rows=2, best=2, penalty=0.0))
    assert texts == [(END,), (1, 4, END)]
    np.testing.assert_allclose(np.exp(scores), [0.4, 0.5 * 0.3 * 0.9], rtol=1e-4)


def test_even_the_first_result_may_hold_words_after_the_end():
    texts, scores = search(GROWS, Official(length=3, least=0, rows=2, best=2, penalty=2.0))
    assert texts == [(END, 5, 5), (END,)]
    np.testing.assert_allclose(scores, [np.log(0.4 * 0.81) / (8 / 6) ** 2, np.log(0.4)], rtol=1e-4)


def test_an_input_closes_when_its_best_row_ends_and_the_others_are_ranked_unfinished():
    decoder = script({(): {END: 0.5, 4: 0.3}, (4,): {END: 0.99}})
    texts, scores = search(decoder, Official(length=3, least=0, rows=2, best=2))
    assert texts == [(END,), (4,)]
    np.testing.assert_allclose(np.exp(scores), [0.5, 0.3], rtol=1e-4)


def test_padding_and_begin_are_words_as_any_other():
    decoder = script({(): {PAD: 0.9}, (PAD,): {BEGIN: 0.9}, (PAD, BEGIN): {END: 0.9}})
    assert search(decoder, Official(length=4, least=0, rows=1))[0] == [(PAD, BEGIN, END)]


def test_an_end_that_comes_too_early_is_a_last_resort():
    decoder = script({(): {END: 0.6, 5: 0.3}, (5,): {END: 0.5}})
    assert search(decoder, Official(length=3, least=1, rows=1))[0] == [(5, END)]
    nothing_else = script({(): {END: 1.0}})
    texts, scores = search(nothing_else, Official(length=3, least=1, rows=1))
    assert texts == [(END,)] and scores[0] == pytest.approx(-1e20)


@pytest.mark.parametrize("wrong", [{"least": 30}, {"best": 6}, {"rows": 0}, {"penalty": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(RecipeError, match="expected"):
        Official(**wrong)


ANSWERS = jnp.array([[BEGIN, 5, END, PAD], [BEGIN, 1, END, PAD], [BEGIN, 4, 5, END]])
ANSWERED = script(
    {(): {1: 0.5, 4: 0.3, 5: 0.19}, (5,): {END: 0.9}, (1,): {END: 0.1}, (4,): {5: 0.9}, (4, 5): {END: 0.9}}
)


def test_the_official_ranking_chooses_by_the_first_word_and_counts_it_twice():
    found = rank_official(ANSWERED, jnp.zeros((2, 1, 1)), None, ANSWERS, best=2)
    counted = np.array([0.3 * 0.3 * 0.81, 0.5 * 0.5 * 0.1])
    np.testing.assert_array_equal(found.places, [[2, 1]] * 2)  # never the first, whose first word is rarest
    np.testing.assert_allclose(found.shares, [counted / counted.sum()] * 2, rtol=1e-4)


def test_the_zoos_ranking_reads_whole_answers_once():
    found = rank(ANSWERED, jnp.zeros((2, 1, 1)), None, ANSWERS)
    np.testing.assert_allclose(np.exp(found), [[0.19 * 0.9, 0.5 * 0.1, 0.3 * 0.81]] * 2, rtol=1e-4)


def test_answers_that_share_a_first_word_are_chosen_in_their_order():
    answers = jnp.array([[BEGIN, 1, *rest] for rest in itertools.permutations((4, 5, END))])
    found = rank_official(ANSWERED, jnp.zeros((1, 1, 1)), None, answers, best=3)
    assert sorted(found.places[0]) == [0, 1, 2]


@pytest.mark.parametrize("best", [0, 4])
def test_no_answers_or_more_than_there_are_cannot_be_asked_for(best):
    with pytest.raises(RecipeError, match="expected 1 to 3, the candidates"):
        rank_official(ANSWERED, jnp.zeros((1, 1, 1)), None, ANSWERS, best=best)
