"""Training on meshes is training on one device: losses, gradients, what crosses between devices, and where
memory goes. Over 8 virtual CPU devices in one process."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from mplug2.network import Network, flat
from mplug2.recipe import Recipe
from mplug2.recipes import pretrain, world
from mplug2.sharding import Mesh
from mplug2.step import Trainer
from mplug2.train import data_stream

MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(fsdp=8),
    "fsdp and tensor": Mesh(fsdp=2, tensor=4),
    "data, sequence and tensor": Mesh(data=2, sequence=2, tensor=2),
}


QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def multi_task(**changes: Any) -> Recipe:
    """The tiny recipe of all tasks, of which 8 devices can share every objective's batch and 4 the heads."""
    recipe = pretrain.recipe(dataclasses.replace(world.TINY, batch=32))
    modules: dict[str, Any] = dict(recipe.modules)
    for name, config in modules.items():
        if hasattr(config, "heads"):
            modules[name] = dataclasses.replace(config, heads=4)
    return dataclasses.replace(recipe, modules=modules, compiler=QUICK_TO_COMPILE, **changes)


@functools.cache
def batches_of(steps: int) -> list[Any]:
    stream = data_stream(multi_task())
    return [
        {
            feed: {name: array for name, array in batch.items() if name != "index"}
            for feed, batch in next(stream).items()
        }
        for _ in range(steps)
    ]


def trained(recipe: Recipe, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The losses of the first steps, and the first step's gradients, clipped: Adam's first moment begins as a
    tenth of them."""
    network = Network(recipe.parts, recipe.execution)
    trainer = Trainer(recipe, network)
    state = trainer.begin(jax.jit(network.init, static_argnums=0)(recipe.seed))
    losses, moment = [], {}
    for batch in batches_of(steps):
        state, told = trainer.step(state, {}, jax.tree.map(trainer.place_batch, batch))
        losses.append(float(told["metrics"]["loss"]))
        moment = moment or jax.device_get(flat(optax.tree.get(state["moments"], "mu")))
    return np.array(losses), moment


def assert_equal_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Within 1e-3 of each parameter's largest; one that is 0 by the maths (a key's bias) is rounding."""
    rounding = 1e-7 * max(np.abs(gradient).max() for gradient in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(
            found[name], gradient, rtol=0, atol=1e-3 * np.abs(gradient).max() + rounding, err_msg=name
        )


@functools.cache
def on_one_device(steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return trained(multi_task(steps=steps, log_every=1), steps)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_fifty_steps_of_all_tasks_on_a_mesh_are_those_of_one_device(mesh):
    losses, gradients = on_one_device(50)
    found, found_gradients = trained(multi_task(steps=50, log_every=1, mesh=mesh), 50)
    np.testing.assert_allclose(found[0], losses[0], rtol=1e-5)
    np.testing.assert_allclose(found, losses, rtol=1e-3)
    assert_equal_gradients(found_gradients, gradients)
