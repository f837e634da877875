"""A learned temperature keeps within its bounds, and is never stuck at one."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2.modules.functions import bounded
from mplug2.modules.heads import Contrastive, ContrastiveConfig
from mplug2.network import Network, flat
from mplug2.recipe import AdamW, Objective, Recipe
from mplug2.roles import Array
from mplug2.step import Trainer

LEAST, MOST = Contrastive.BOUNDS
RISE, FALL = -1.0, 1.0
"""Gradients that lead up and down."""


@pytest.mark.parametrize(
    "value, gradient, passes",
    [
        (MOST + 0.1, FALL, True),
        (MOST + 0.1, RISE, False),
        (LEAST - 0.1, RISE, True),
        (LEAST - 0.1, FALL, False),
        (MOST, RISE, True),  # where a step has just brought it
        (LEAST, FALL, True),
        (0.07, RISE, True),
        (0.07, FALL, True),
    ],
)
def test_beyond_a_bound_a_gradient_passes_that_leads_back(value, gradient, passes):
    kept, back = jax.vjp(lambda value: bounded(value, LEAST, MOST), jnp.float32(value))
    assert kept == jnp.clip(jnp.float32(value), LEAST, MOST)
    assert back(jnp.float32(gradient))[0] == (gradient if passes else 0)


def lean(batch: Mapping[str, Array], key: Array | None = None, *, contrastive: Contrastive) -> Array:
    return batch["way"].mean() * contrastive.temperature()


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    recipe = Recipe(
        name="temperature",
        modules={"contrastive": ContrastiveConfig(width=2, space=2)},
        objectives={"lean": Objective(task=lean, data=None, batch=2)},
        optimizer=AdamW(learning_rate=0.01, warmup=0, clip=0.0),
    )
    return Trainer(recipe, Network(recipe.parts))


def learned(trainer: Trainer, start: float, *ways: float) -> list[float]:
    """The parameter after each step of such gradients."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trainer.network.shapes)
    params["contrastive"]["learned_temperature"] = np.float32(start)
    state: Any = trainer.begin(params)
    values = []
    for way in ways:
        batch: Any = {"way": np.full(2, way, np.float32)}
        state, _ = trainer.step(state, {}, {"lean": batch})
        values.append(float(flat(state["params"])["contrastive.learned_temperature"]))
    return values


FEW = 3
INERTIA = 10
"""Steps in which AdamW's mean of gradients turns, whatever they were before: 1 - 2 * 0.9**7 is above 0."""


def test_a_temperature_that_begins_beyond_a_bound_comes_back_within_a_few_steps(trainer):
    assert learned(trainer, 9.0, *[FALL] * FEW)[-1] < MOST
    assert learned(trainer, -1.0, *[RISE] * FEW)[-1] > LEAST


def test_a_temperature_that_is_led_out_stays_at_its_bound_and_returns(trainer):
    up = learned(trainer, MOST - 0.02, *[RISE] * 50, *[FALL] * INERTIA)
    down = learned(trainer, LEAST + 0.02, *[FALL] * 50, *[RISE] * INERTIA)
    assert up[49] == max(up) == pytest.approx(MOST) and up[-1] < MOST - 0.005
    assert down[49] == min(down) == pytest.approx(LEAST) and down[-1] > LEAST + 0.005


def test_within_its_bounds_a_temperature_learns_as_any_parameter(trainer):
    # AdamW's first step is of the learning rate's length.
    assert learned(trainer, 0.07, FALL) == pytest.approx([0.06], rel=1e-5)
    assert learned(trainer, 0.07, RISE) == pytest.approx([0.08], rel=1e-5)


def test_only_temperatures_have_bounds(trainer):
    bounds = flat(trainer.network.bounds)
    assert {name for name, own in bounds.items() if own} == {"contrastive.learned_temperature"}
