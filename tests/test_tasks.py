"""Tasks: what each reads and learns, by cases small enough to check by hand. Modules here are stand-ins for
roles."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standins
from fresh import compiled, fresh

from mplug2 import recipes, tasks
from mplug2.losses import contrastive_loss, cross_entropy, word_loss
from mplug2.network import Network, select

SEED = 1
IDS = jnp.array([[2, 9, 7, 3, 0], [2, 8, 3, 0, 0], [2, 9, 7, 3, 0]])
OTHER = jnp.array([[2, 9, 7, 3, 0], [2, 8, 3, 0, 0], [2, 11, 3, 0, 0]])
CLIPS = jnp.array(np.random.default_rng(0).normal(size=(3, 1, 32, 32, 3)), jnp.float32)


NETWORK = Network(recipes.find("pretrain.tiny").modules)


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Parameters by module; `loss` binds them anew in each trace."""
    return fresh(NETWORK.configs, SEED)


def loss(task: Any, parts: dict[str, Any], batch: dict[str, Any], key: jax.Array | None = None) -> float:
    chosen = select(task, parts)
    compute = compiled(lambda parts, batch: task(batch, key, **NETWORK.bind(parts)))
    return float(compute(chosen, batch))


def test_losses_are_those_of_the_definition():
    logits = jnp.array([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    expected = -np.log(np.exp(2.0) / np.exp([1.0, 2.0, 0.5]).sum()), np.log(3)
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1, 2])), expected, rtol=1e-6)
    # three words, one of which is padding and does not count
    words = jnp.array([[[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
    np.testing.assert_allclose(word_loss(words, jnp.array([[1, 2, 0]])), np.mean(expected), rtol=1e-6)
    assert word_loss(words, jnp.zeros((1, 3), jnp.int32)) == 0.0


def test_contrast_spreads_its_target_over_equal_captions():
    similarity = jnp.array([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 4.0]])
    same = jnp.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
    pair, alone = np.log(2 + np.exp(-4.0)), np.log(1 + 2 * np.exp(-4.0))
    np.testing.assert_allclose(contrastive_loss(similarity, same), (2 * pair + alone) / 3, rtol=1e-6)


def test_a_caption_is_learned_word_by_word_and_padding_is_not(parts):
    batch = {"clips": CLIPS, "caption": OTHER}
    padded = batch | {"caption": jnp.pad(OTHER, ((0, 0), (0, 4)))}
    assert loss(tasks.caption, parts, padded) == pytest.approx(loss(tasks.caption, parts, batch), rel=1e-5)
    target = batch | {"caption_target": OTHER.at[:, 1].set(0)}  # a prompt's words are read, not learned
    assert loss(tasks.caption, parts, target) != pytest.approx(loss(tasks.caption, parts, batch), rel=1e-5)


def test_an_answer_is_weighted(parts):
    batch = {"clips": CLIPS, "question": IDS, "answer": OTHER}
    weight = jnp.array([2.0, 0.0, 1.0])
    each = [
        loss(tasks.answer, parts, {field: value[i : i + 1] for field, value in batch.items()})
        for i in range(3)
    ]
    weighted = loss(tasks.answer, parts, batch | {"answer_weight": weight})
    assert weighted == pytest.approx(float(np.dot(weight, each)) / 3, rel=1e-5)
    assert loss(tasks.answer, parts, batch) == pytest.approx(float(np.mean(each)), rel=1e-5)


def test_an_answer_depends_on_the_question_and_on_the_picture(parts):
    batch = {"clips": CLIPS, "question": IDS, "answer": OTHER}
    usual = loss(tasks.answer, parts, batch)
    assert usual != loss(tasks.answer, parts, batch | {"question": OTHER})
    assert usual != loss(tasks.answer, parts, batch | {"clips": CLIPS[::-1]})


def test_match_never_takes_an_equal_caption_for_a_false_one(parts):
    """Captions 0 and 2 are equal: each false partner must be 1, and 1's either."""
    similarity = jnp.array([[9.0, 1.0, 9.0], [2.0, 9.0, 3.0], [9.0, 1.0, 9.0]])
    masked = jnp.where(tasks._same(IDS), -jnp.inf, similarity)
    np.testing.assert_array_equal(tasks._draw(masked, None), [1, 2, 1])
    for seed in range(20):
        drawn = np.asarray(tasks._draw(masked, jax.random.key(seed)))
        assert (drawn[[0, 2]] == 1).all() and drawn[1] in (0, 2)
    assert np.isfinite(loss(tasks.match, parts, {"clips": CLIPS, "text": IDS}, jax.random.key(0)))


FITS = jnp.array([[1, 2, 0], [2, 0, 0], [3, 0, 0]])  # text 1 holds of clip 0 too


def test_what_holds_of_a_clip_is_told_by_equal_texts_and_by_fits():
    np.testing.assert_array_equal(tasks._fits({"text": IDS}), [[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    told = tasks._fits({"text": OTHER, "fits": FITS})
    np.testing.assert_array_equal(told, [[1, 1, 0], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["nearest", "drawn"])
def test_match_learns_nothing_where_no_pair_is_false(key):
    """All texts equal, or all of them hold of all clips; of two that differ, it learns."""
    network = Network(standins.MODULES)

    @compiled
    @jax.value_and_grad
    def learned(params: Any, text: jax.Array, fits: jax.Array) -> jax.Array:
        batch = {"clips": CLIPS[:, :, :2, :2], "text": text, "fits": fits}
        return tasks.match(batch, key, **select(tasks.match, network.bind(params)))

    equal, other, alone = jnp.full((3, 5), 7), OTHER, jnp.array([[1, 0, 0], [2, 0, 0], [3, 0, 0]])
    for text, fits in ((equal, alone), (other, jnp.array([[1, 2, 3], [2, 3, 1], [3, 1, 2]]))):
        value, gradients = learned(network.init(0), text, fits)
        assert value == 0.0 and not any(leaf.any() for leaf in jax.tree.leaves(gradients))
    value, gradients = learned(network.init(0), equal.at[2, 1].set(8), alone.at[:2, 0].set(1))
    assert 0.1 < value < 10 and max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradients)) > 1e-3


def test_a_row_without_a_false_partner_does_not_count():
    """Text 1 and text 2 hold of clip 0, whose false text is therefore none; all else is as it was."""
    network = Network(standins.MODULES)
    parts = network.bind(network.init(0))

    class Noting:
        """Matching: notes which pairs it was shown."""

        def __call__(self, tokens, *, key=None):
            return jnp.stack([jnp.zeros(len(tokens)), jnp.arange(1.0, 1 + len(tokens))], 1)

    chosen = select(tasks.match, parts) | {"matching": cast(Any, Noting())}
    batch = {
        "clips": CLIPS[:, :, :2, :2],
        "text": OTHER,
        "fits": jnp.array([[1, 2, 3], [2, 0, 0], [3, 0, 0]]),
    }
    told = float(tasks.match(batch, **chosen))
    wrong = np.log1p(
        np.exp(np.arange(1.0, 10))
    )  # of a pair that is false; less its logit of one that is true
    counted = [*(wrong[:3] - np.arange(1.0, 4)), *wrong[4:9]]  # not the false text of clip 0
    # Text 1 holds of clip 0 and of its own, so that clip 2 is its false one; likewise clip 1 of text 2.
    assert told == pytest.approx(np.mean(counted), rel=1e-6)


def test_match_stands_at_chance_before_it_learns(parts):
    """One true pair to two false ones, and a fresh head that says little."""
    assert loss(tasks.match, parts, {"clips": CLIPS, "text": OTHER}) == pytest.approx(np.log(2), abs=0.4)


def test_unmask_looks_at_the_picture_if_there_is_one(parts):
    words = {"masked": IDS.at[:, 1].set(4), "masked_target": jnp.zeros_like(IDS).at[:, 1].set(IDS[:, 1])}
    blind = loss(tasks.unmask, parts, words)
    seeing = [loss(tasks.unmask, parts, words | {"clips": clips}) for clips in (CLIPS, jnp.roll(CLIPS, 1, 0))]
    assert len({float(blind), *map(float, seeing)}) == 3
    text_alone = {name: parts[name] for name in ("text", "universal", "unmasker")}
    assert loss(tasks.unmask, text_alone, words) == blind


def test_complete_learns_the_target_alone(parts):
    batch = {"text": IDS, "target": OTHER}
    assert loss(tasks.complete, parts, batch) == pytest.approx(np.log(96), abs=0.5)
    assert loss(tasks.complete, parts, batch) != loss(tasks.complete, parts, batch | {"text": OTHER})


def test_a_clip_of_one_frame_goes_past_temporal(parts):
    class Untouchable:
        @property
        def branches(self) -> Any:
            raise AssertionError("an image must not read the temporal branches")

    batch = {"clips": CLIPS, "label": jnp.array([0, 1, 2])}
    chosen = NETWORK.bind(select(tasks.classify_vision, parts)) | {"temporal": cast(Any, Untouchable())}
    image = float(tasks.classify_vision(batch, **chosen))
    assert image == pytest.approx(loss(tasks.classify_vision, parts, batch), rel=1e-5)
    with pytest.raises(AssertionError, match="temporal branches"):
        tasks.classify_vision(batch | {"clips": jnp.repeat(CLIPS, 2, axis=1)}, **chosen)


def test_every_task_drops_out_with_a_key(parts):
    batch = {"text": IDS, "label": jnp.array([0, 1, 1])}
    assert loss(tasks.classify_text, parts, batch, jax.random.key(0)) != loss(
        tasks.classify_text, parts, batch
    )
