"""Generation: searches against brute force, and the promises they make on length, finishing and ranking."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.errors import RecipeError
from mplug2.generate import Beam, Greedy, Sample, decode, rank
from mplug2.losses import word_losses
from mplug2.modules.decoder import Config

PAD, BEGIN, END, VOCABULARY = 0, 2, 3, 6  # three words: 1, 4, 5
WORDS = (1, 4, 5)
CONFIG = Config(vocabulary=VOCABULARY, positions=8, width=16, depth=2, heads=2, hidden=16)


@functools.cache
def graph():
    """The decoder's structure and parameters, scaled up so that the memory decides what is said."""
    graph, state = nnx.split(CONFIG.build(rngs=nnx.Rngs(0)))
    return graph, jax.tree.map(lambda values: values * (10 if values.ndim > 1 else 1), state)


def decoder():
    return nnx.merge(*graph())


@functools.cache
def memory(batch: int = 3, seed: int = 1):
    """Memories of five tokens; the mask hides two of the last one's."""
    mask = jnp.ones((batch, 5), bool).at[-1, 3:].set(False)
    return 3 * jax.random.normal(jax.random.key(seed), (batch, 5, CONFIG.width)), mask


@functools.partial(jax.jit, static_argnames="search")
def compiled(search, state, tokens, mask, key):
    return decode(nnx.merge(graph()[0], state), tokens, mask, search, begin=BEGIN, end=END, key=key)


def run(search, seed=1, batch=3, key=None):
    """What a search finds for `batch` memories drawn by `seed`."""
    return compiled(search, graph()[1], *memory(batch, seed), key)


@jax.jit
def forced(state, ids, tokens, mask):
    losses, _ = word_losses(nnx.merge(graph()[0], state)(ids[:, :-1], tokens, mask), ids[:, 1:])
    return -losses.sum(-1)


def teacher_forced(ids, tokens, mask):
    """Log-probability of each text, end included, by the decoder's parallel pass."""
    return forced(graph()[1], ids, tokens, mask)


def every_text(length: int, least: int = 0) -> np.ndarray:
    """All texts that a search of at most `length` ids can give."""
    texts = []
    for count in range(length + 1):
        for words in itertools.product(WORDS, repeat=count):
            if count == length:
                texts.append([BEGIN, *words])
            elif count >= least:
                texts.append([BEGIN, *words, END])
    return np.array([text + [PAD] * (1 + length - len(text)) for text in texts], np.int32)


def best_texts(length: int, penalty: float, least: int = 0):
    """Every text and its penalised score, best first, for each memory."""
    texts = every_text(length, least)
    lengths = (texts[:, 1:] != PAD).sum(1)
    found = []
    for tokens, mask in zip(*memory(), strict=True):
        tokens, mask = (jnp.repeat(x[None], len(texts), 0) for x in (tokens, mask))
        scores = np.asarray(teacher_forced(texts, tokens, mask)) / ((5 + lengths) / 6) ** penalty
        order = np.argsort(-scores)
        found.append((texts[order], scores[order]))
    return found


# Each search is compiled once, so that the seeds are many and the searches few.
GREEDY = Greedy(length=6, least=2)
BEAM = Beam(length=6, least=1, rows=3, best=3)
SAMPLE = Sample(length=6, least=1, rows=3, temperature=2.0)
SEARCHES = [GREEDY, BEAM, SAMPLE, Beam(length=2, rows=4, best=4), Greedy(length=3, least=3)]


def test_a_beam_of_one_row_is_greedy():
    for seed in range(20):
        greedy = run(GREEDY, seed)
        beam = run(Beam(length=6, least=2, rows=1, penalty=0.0), seed)
        np.testing.assert_array_equal(greedy.ids, beam.ids)
        np.testing.assert_allclose(greedy.scores, beam.scores, rtol=1e-5)


@pytest.mark.parametrize(("penalty", "least"), [(0.6, 0), (2.0, 2)])
def test_a_beam_as_wide_as_all_paths_is_brute_force(penalty, least):
    search = Beam(length=3, least=least, rows=27 + 9 + 3 + 1, best=5, penalty=penalty)
    for (texts, scores), ids, found in zip(best_texts(3, penalty, least), *run(search), strict=True):
        np.testing.assert_array_equal(ids, texts[:5])
        np.testing.assert_allclose(found, scores[:5], rtol=1e-4)


def test_a_wider_beam_finds_texts_that_greedy_misses():
    wide = Beam(length=6, least=2, rows=4, penalty=0.0)
    gains = [run(wide, seed).scores - run(GREEDY, seed).scores for seed in range(20)]
    assert np.max(gains) > 1e-3


@settings(max_examples=60, deadline=None)
@given(search=st.sampled_from(SEARCHES), seed=st.integers(0, 1000))
def test_lengths_hold_and_finished_texts_do_not_grow(search, seed):
    found = run(search, seed, key=jax.random.key(seed))
    texts = np.asarray(found.ids).reshape(-1, 1 + search.length)
    for text, score in zip(texts, np.ravel(found.scores), strict=True):
        if not np.isfinite(score):
            continue  # fewer texts exist
        words = list(text[1:])
        ended = words.index(END) if END in words else search.length
        assert text[0] == BEGIN
        assert search.least <= ended
        assert all(word in WORDS for word in words[:ended])
        assert all(word == PAD for word in words[ended + 1 :])


@pytest.mark.parametrize("search", [GREEDY, BEAM, SAMPLE])
def test_scores_are_those_of_the_texts(search):
    found, (tokens, mask) = run(search, key=jax.random.key(0)), memory()
    penalty = getattr(search, "penalty", 0.0)
    for row in range(found.ids.shape[1]):
        ids = found.ids[:, row]
        scores = teacher_forced(ids, tokens, mask) / ((5 + (ids[:, 1:] != PAD).sum(1)) / 6) ** penalty
        np.testing.assert_allclose(found.scores[:, row], scores, rtol=1e-4, atol=1e-5)
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("search", [GREEDY, BEAM])
def test_an_inputs_results_do_not_depend_on_its_batch(search):
    for seed in range(30):  # inputs close at different steps, and few would find more later
        together, (tokens, mask) = run(search, seed), memory(3, seed)
        alone = compiled(search, graph()[1], tokens[:1], mask[:1], None)
        np.testing.assert_array_equal(alone.ids[0], together.ids[0])
        np.testing.assert_allclose(alone.scores[0], together.scores[0], rtol=1e-4)


def shares(search, texts=4000):
    """How often each of the first words is drawn for the first memory."""
    rows = run(search, batch=1, key=jax.random.key(7))
    counts = np.bincount(np.asarray(rows.ids)[0, :, 1], minlength=VOCABULARY)
    assert counts.sum() == texts
    return counts / texts


@jax.jit
def first_logits(tokens, mask):
    return decoder()(jnp.array([[BEGIN]]), tokens, mask)[0, 0]


def first_word(temperature=1.0):
    """The model's distribution over what may be said first."""
    logits = np.array(first_logits(*memory(1)))
    logits[[PAD, BEGIN]] = -np.inf
    shares = np.exp((logits - logits.max()) / temperature)
    return shares / shares.sum()


def test_samples_follow_the_models_distribution():
    np.testing.assert_allclose(shares(Sample(length=1, rows=4000)), first_word(), atol=0.03)


def test_temperature_reshapes_the_distribution():
    np.testing.assert_allclose(
        shares(Sample(length=1, rows=4000, temperature=3.0)), first_word(3.0), atol=0.03
    )


def test_top_k_keeps_the_likeliest_ids_alone():
    expected = first_word(4.0)
    expected[np.argsort(-expected)[2:]] = 0
    found = shares(Sample(length=1, rows=4000, temperature=4.0, top_k=2))
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_top_p_keeps_the_fewest_ids_that_hold_p():
    expected = first_word(4.0)
    order = np.argsort(-expected)
    kept = 1 + int(np.searchsorted(expected[order].cumsum(), 0.7))
    expected[order[kept:]] = 0
    assert 1 < kept < 4
    found = shares(Sample(length=1, rows=4000, temperature=4.0, top_p=0.7))
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_sampling_without_a_key_is_refused():
    with pytest.raises(RecipeError, match="needs a key"):
        run(Sample(length=6))


@pytest.mark.parametrize("kind", [Greedy, Sample, Beam])
def test_impossible_lengths_are_refused(kind):
    with pytest.raises(RecipeError, match="least from 0 to length"):
        kind(length=3, least=4)


def test_texts_longer_than_the_position_table_are_refused():
    with pytest.raises(RecipeError, match="got a length of 9; expected 1 to 8, its positions"):
        run(Greedy(length=9))
    with pytest.raises(RecipeError, match="got a length of 9"):
        ranked(*memory(), np.full((2, 10), WORDS[0], np.int32))


@jax.jit
def ranked(tokens, mask, candidates):
    return rank(decoder(), tokens, mask, candidates)


def test_rank_is_the_teacher_forced_sum():
    texts, (tokens, mask) = every_text(3), memory()
    found = ranked(tokens, mask, texts)
    for row, text in enumerate(texts):
        expected = teacher_forced(np.repeat(text[None], 3, 0), tokens, mask)
        np.testing.assert_allclose(found[:, row], expected, rtol=1e-4, atol=1e-5)


def test_rank_takes_a_list_for_each_input():
    texts, (tokens, mask) = every_text(3), memory()
    lists = np.array([[0, 5], [7, 2], [1, 1]])
    whole = ranked(tokens, mask, texts)
    found = ranked(tokens, mask, texts[lists])
    np.testing.assert_allclose(found, np.take_along_axis(np.asarray(whole), lists, 1), rtol=1e-5)
