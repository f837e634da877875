"""The training step, on a toy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import standins
from exact import RTOL, assert_equal, in_float64
from fresh import compiled
from toy import Numbers, batch, same, toy, trainer

from mplug2 import tasks
from mplug2.errors import RecipeError
from mplug2.network import Network
from mplug2.recipe import AdamW
from mplug2.roles import Execution
from mplug2.sharding import Mesh
from mplug2.step import Trainer, averaged


def test_a_recipe_that_freezes_everything_is_refused():
    cards = {"vision": "a card", "head": "a card"}
    with pytest.raises(RecipeError, match="nothing is trained"):
        trainer(toy(modes={"vision": "frozen", "head": "frozen"}, cards=cards))


def test_accumulated_gradients_equal_the_whole_batchs():
    with in_float64():
        whole, state = trainer(toy(dropout=False))
        parts, _ = trainer(toy(dropout=False, accumulate=4))
        given = state["params"], {}, batch(whole.recipe), None
        assert_equal(jax.jit(parts.gradients)(*given), jax.jit(whole.gradients)(*given))


def test_a_step_reuses_the_buffers_of_its_state():
    made, state = trainer(toy(ema=0.9))
    plan: Any = made.lower(batch(made.recipe)).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"])) * 4


@pytest.mark.parametrize("attention, needed", [("cudnn", "GPUs and .*"), ("splash", "TPUs")])
def test_kernels_are_refused_where_they_cannot_be_had(attention, needed):
    said = f"attention={attention} needs {needed}, here are cpu and bfloat16; written"
    with pytest.raises(RecipeError, match=said):
        trainer(toy(execution=Execution(attention=attention, dtype="bfloat16")))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(RecipeError, match=r"classify: a batch of 8 does not divide into 3 .*; 6 or 9 would"):
        trainer(toy(accumulate=3))


@pytest.mark.devices(8)
def test_a_batch_or_a_mesh_that_devices_cannot_share_is_refused():
    with pytest.raises(RecipeError, match=r"a batch of 8 does not divide into 4 .* each of 4 .*; 16 would"):
        trainer(toy(accumulate=4, mesh=Mesh(data=2, fsdp=2)))
    with pytest.raises(RecipeError, match="an axis has at least 1 device"):
        trainer(toy(mesh=Mesh(data=0)))


@pytest.mark.devices(8)
def test_parts_of_a_batch_that_devices_share_learn_what_the_whole_does_on_one():
    """The same batch, in parts and not, of one device and of four: losses and gradients in float64."""
    draw = np.random.default_rng(0)
    ids = draw.integers(5, 12, (16, 7), np.int32) * (np.arange(7) < draw.integers(2, 8, (16, 1)))
    clips = draw.integers(0, 255, (16, 1, 2, 2, 3), np.uint8)
    told = []
    with jax.enable_x64(True):
        for parts, mesh in ((1, Mesh()), (2, Mesh(data=2, fsdp=2))):
            learned = {"caption": tasks.caption, "contrast": tasks.contrast, "match": tasks.match}
            asked = standins.recipe(16, learned, accumulate=parts, mesh=mesh)
            made = Trainer(asked, Network(asked.parts))
            params = jax.tree.map(lambda array: array.astype(jnp.float64), made.network.init(0))
            fields = {"clips": clips, "caption": ids, "text": ids[:, ::-1]}
            batches = {"caption": {name: made.place_batch(array) for name, array in fields.items()}}
            compute = compiled(functools.partial(made.gradients, key=None))
            told.append(jax.device_get(compute(made.begin(params)["params"], {}, batches)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), *told)


@pytest.mark.devices(8)
def test_dropout_draws_the_same_bits_on_any_mesh():
    def losses(mesh: Mesh) -> list[float]:
        made, state = trainer(toy(dropout=True, mesh=mesh, log_every=1))
        numbers, told = Numbers(made.recipe), []
        for _ in range(3):
            state, metrics = made.step(state, {}, jax.tree.map(made.place_batch, next(numbers)))
            told.append(float(metrics["metrics"]["loss"]))
        return told

    with in_float64():
        alone = losses(Mesh())
        for mesh in (Mesh(data=2), Mesh(fsdp=2, tensor=2)):
            np.testing.assert_allclose(losses(mesh), alone, rtol=RTOL)


def test_the_loss_is_the_sum_of_the_objectives_by_weight():
    with in_float64():
        made, state = trainer(toy(dropout=False))
        total, parts = made.loss(state["params"], {}, batch(made.recipe), None)
    assert float(total) == pytest.approx(float(parts["classify"]) + 0.1 * float(parts["count"]), rel=RTOL)


def test_the_average_follows_its_formula():
    ema, params = {"m": {"w": jnp.array([1.0])}}, {"m": {"w": jnp.array([3.0])}}
    by_hand = {0: 0.1 * 1 + 0.9 * 3, 90: 0.91 * 1 + 0.09 * 3, 10**6: 0.95 * 1 + 0.05 * 3}
    for done, expected in by_hand.items():
        found = averaged(ema, params, 0.95, done)["m"]["w"]
        np.testing.assert_allclose(found, expected, rtol=8 * 2.0**-24)  # eight roundings at most


def test_each_step_averages_what_it_has_just_learned():
    with in_float64():
        made, state = trainer(toy(ema=0.9))
        before = jax.tree.map(np.array, state["ema"])
        after, _ = made.step(state, {}, batch(made.recipe))
        assert_equal(after["ema"], averaged(before, after["params"], 0.9, 0))


def test_dropout_is_another_at_each_step_and_none_where_the_recipe_says_so():
    def first_losses(**changes: Any) -> list[float]:
        made, state = trainer(toy(optimizer=AdamW(learning_rate=0.0), **changes))
        found = []
        for _ in range(2):
            state, metrics = made.step(state, {}, batch(made.recipe))
            found.append(float(metrics["metrics"]["loss"]))
        return found

    dropped, again, kept = first_losses(), first_losses(), first_losses(dropout=False)
    assert dropped == again and dropped[0] != dropped[1]
    assert kept[0] == kept[1] != dropped[0]


def test_a_modules_learning_rate_is_its_own():
    made, state = trainer(toy(learning_rates={"head": 0.0}))
    before = jax.tree.map(np.array, state["params"])
    after, _ = made.step(state, {}, batch(made.recipe))
    same(after["params"]["head"], before["head"])
    assert not np.array_equal(after["params"]["vision"]["kernel"], before["vision"]["kernel"])


def test_the_reported_gradient_norm_is_that_before_clipping():
    with in_float64():
        made, state = trainer(toy(dropout=False))
        _, gradients = made.gradients(state["params"], {}, batch(made.recipe), None)
        _, metrics = made.step(state, {}, batch(made.recipe))
        norm = optax.tree.norm(gradients)
    assert float(metrics["metrics"]["gradient_norm"]) == pytest.approx(float(norm), rel=RTOL)
    assert float(metrics["metrics"]["learning_rate"]) == pytest.approx(0.01 / 3)


def test_an_option_that_the_compiler_does_not_know_is_refused_by_name():
    trainer(toy(compiler={"xla_cpu_enable_fast_math": False}))
    for option in ({"xla_cpu_enable_fast_maths": False}, {"xla_cpu_enable_fast_math": "fast"}):
        with pytest.raises(RecipeError, match=f"compiler.{next(iter(option))} is"):
            trainer(toy(compiler=option))


def test_the_step_is_compiled_once():
    made, state = trainer(toy())
    stream = Numbers(made.recipe)
    for _ in range(3):
        placed = jax.tree.map(made.place_batch, next(stream))
        state, _ = made.step(state, {}, placed)
    assert made.step._cache_size() == 1  # type: ignore[attr-defined]


def test_a_resumed_step_is_compiled_once_too():
    made, state = trainer(toy())
    resumed = made.resume(3, {name: state[name] for name in ("params", "moments", "window")})
    stream = Numbers(made.recipe)
    for _ in range(3):
        resumed, _ = made.step(resumed, {}, jax.tree.map(made.place_batch, next(stream)))
    assert int(resumed["step"]) == 6
    assert made.step._cache_size() == 1  # type: ignore[attr-defined]
