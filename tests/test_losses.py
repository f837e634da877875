"""Losses over many words at once, a few places at a time."""

from typing import Any

import jax
import pytest
from exact import assert_equal, in_float64, widened

from mplug2.losses import mean_of_words, predicted_losses

BATCH, PLACES, WIDTH, WORDS = 4, 7, 16, 1000


def loss(table: jax.Array, tokens: jax.Array, targets: jax.Array, chunk: int) -> jax.Array:
    return mean_of_words(
        *predicted_losses(tokens, lambda part: part @ table.astype(part.dtype), targets, chunk)
    )


def work(places: int = PLACES, dtype: str = "float32"):
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (WIDTH, WORDS))
    tokens = jax.random.normal(keys[1], (BATCH, places, WIDTH), dtype)
    return table, tokens, jax.random.randint(keys[2], (BATCH, places), 0, WORDS).at[:, -2:].set(0)


@pytest.mark.parametrize("places_at_once", [1, 2, 3])
def test_in_chunks_the_loss_and_its_gradients_are_those_of_the_whole(places_at_once):
    made = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=3)
    given = widened(work())
    with in_float64():
        assert_equal(made(*given, places_at_once * BATCH * WORDS), made(*given, BATCH * PLACES * WORDS))


def test_in_chunks_no_float32_copy_of_all_logits_exists():
    def compiled(chunk: int) -> Any:
        made = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=3)
        return made.lower(*work(64, "bfloat16"), chunk).compile()

    whole, chunked = compiled(BATCH * 64 * WORDS), compiled(BATCH * 4 * WORDS)
    logits = 4 * BATCH * 64 * WORDS
    assert whole.memory_analysis().temp_size_in_bytes > logits
    assert chunked.memory_analysis().temp_size_in_bytes < logits / 2
    assert (
        f"f32[{BATCH},64,{WORDS}]" in whole.as_text() and f"f32[{BATCH},64,{WORDS}]" not in chunked.as_text()
    )
