"""A batch in parts: loss and gradient are those of the undivided batch, whatever a task joins."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import compiled
from standins import WORDS, recipe

from mplug2 import composition, tasks
from mplug2.accumulation import everywhere
from mplug2.errors import RecipeError
from mplug2.flops import executed_flops, step_flops
from mplug2.losses import mean_of_words
from mplug2.network import Network
from mplug2.recipe import Objective
from mplug2.step import Trainer

BATCH = 8


@functools.cache
def batch(size: int = BATCH) -> dict[str, np.ndarray]:
    """Texts of very different lengths; two are equal, and of one nothing is learned."""
    draw = np.random.default_rng(3)
    made: dict[str, np.ndarray] = {"clips": draw.integers(0, 255, (size, 1, 2, 2, 3), np.uint8)}
    for name in ("caption", "question", "answer", "text", "target", "masked"):
        ids = draw.integers(5, WORDS, (size, 7), np.int32)
        ids[np.arange(7) >= draw.integers(2, 8, (size, 1))] = 0
        made[name] = ids
    made["text"][size // 2] = made["text"][1]
    made["masked_target"] = np.where(draw.random((size, 7)) < 0.3, made["masked"], 0)
    made["caption_target"] = made["caption"].copy()
    made["caption_target"][[2, size - 1]] = 0
    made["answer_weight"] = draw.random(size).astype(np.float32)
    made["fits"] = np.stack([np.arange(size) + 1, (np.arange(size) + 3) % size + 1], 1).astype(np.int32)
    return made


def lengths(batch, key=None, *, text) -> jax.Array:
    """A user's own: a mean over examples, which knows nothing of parts."""
    return jnp.square(text(batch["text"])).mean()


def squares_of_words(batch, key=None, *, text) -> jax.Array:
    """A user's own mean over words, weighed, beside one over examples."""
    counted = (batch["text"] != 0).astype(jnp.float32)
    losses = jnp.square(text(batch["text"])).sum(-1) * counted
    return 0.3 * mean_of_words(losses, counted) + lengths(batch, text=text)


def spread_of_texts(batch, key=None, *, text) -> jax.Array:
    """A user's own loss of the whole batch, which is linear in nothing."""
    firsts = everywhere(text(batch["text"])[:, 0])
    return jnp.log(jnp.var(firsts, 0).sum()) ** 2


def without(*fields: str):
    """`contrast` and so on, of a batch that lacks some fields."""

    def changed(task):
        @functools.wraps(task)
        def on_less(batch, key=None, **modules):
            return task({name: it for name, it in batch.items() if name not in fields}, key, **modules)

        return on_less

    return changed


TASKS: dict[str, Any] = {
    "caption": tasks.caption,
    "caption_all": without("caption_target")(tasks.caption),
    "answer": tasks.answer,
    "contrast": tasks.contrast,
    "contrast_equal": without("fits")(tasks.contrast),
    "match": tasks.match,
    "match_equal": without("fits")(tasks.match),
    "unmask": tasks.unmask,
    "complete": tasks.complete,
    "lengths": lengths,
    "squares_of_words": squares_of_words,
    "spread_of_texts": spread_of_texts,
}


@functools.cache
def computed(parts: int) -> tuple[np.ndarray, dict[str, Any], dict[str, Any]]:
    """(loss, losses, gradient) of all TASKS in float64, of the batch in so many parts."""
    with jax.enable_x64(True):
        asked = recipe(tasks=TASKS, accumulate=parts)
        network = Network(asked.parts)
        trainer = Trainer(asked, network)
        params = jax.tree.map(lambda array: array.astype(jnp.float64), network.init(0))
        compute = compiled(functools.partial(trainer.gradients, key=None))
        (total, losses), gradients = compute(params, {}, {next(iter(TASKS)): batch()})
        return jax.device_get((total, losses, gradients))


@pytest.mark.parametrize("parts", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_a_batch_in_parts_has_the_losses_and_the_gradient_of_the_whole(parts):
    (total, losses, gradients), (whole, of_whole, gradients_of_whole) = computed(parts), computed(1)
    assert total.dtype == np.float64 and float(total) == pytest.approx(float(whole), rel=1e-12)
    assert {name: float(one) for name, one in losses.items()} == pytest.approx(
        {name: float(one) for name, one in of_whole.items()}, rel=1e-12
    )
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_of_whole), strict=True):
        largest = np.abs(other).max()
        assert largest > 1e-3
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * largest)


def flops(task: Any, parts: int, count: Any = executed_flops) -> float:
    return count(recipe(tasks={"it": task}, accumulate=parts), {"it": batch()})


def test_in_parts_a_mean_over_words_costs_what_it_costs_at_once():
    """How many words there are is counted without computing anything else."""
    for task in (tasks.caption, tasks.complete, squares_of_words):
        assert flops(task, 4) == flops(task, 1)


def test_in_parts_a_contrast_costs_another_forward_pass_which_is_not_the_models():
    at_once, in_parts = flops(tasks.contrast, 1), flops(tasks.contrast, 4)
    assert at_once < in_parts
    assert flops(tasks.contrast, 4, step_flops) == flops(tasks.contrast, 1, step_flops)


def test_what_is_made_of_the_whole_batch_cannot_be_taken_everywhere_again():
    def twice(batch, key=None, *, text):
        return everywhere(text(batch["text"]) - everywhere(text(batch["text"])).mean(0)).sum()

    trainer = Trainer(recipe(tasks={"twice": twice}, accumulate=2), Network(recipe().parts))
    params = trainer.network.shapes
    assert jax.eval_shape(trainer.loss, params, {}, {"twice": batch()}, None)[0].shape == ()
    with pytest.raises(RecipeError, match="everywhere what it has made of what it took everywhere before"):
        jax.eval_shape(trainer.gradients, params, {}, {"twice": batch()}, None)


class One:
    """A data set of one example."""

    def source(self, split: str) -> list[dict[str, Any]]:
        return [{"index": 0, "clips": np.zeros((1, 2, 2, 3), np.uint8), "text": "one"}]


@pytest.mark.parametrize("task", [tasks.contrast, tasks.match])
def test_a_batch_of_one_has_nothing_to_tell_apart_and_is_refused_before_training(task):
    def checked(size: int) -> None:
        objective = Objective(task=task, data=One(), batch=size, lengths={"text": 4})
        composition.check_modules(recipe(objectives={"near": objective}))

    checked(2)
    with pytest.raises(RecipeError, match="objective near: .* a batch of 1 has no others: expected"):
        checked(1)
