"""All tasks at once, 50 steps, in several processes on loopback: the losses and gradients of one device. In
one process: test_meshes.

    make test-slow TEST_ARGS='-k all_tasks -s'
"""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import test_meshes
from cluster import call
from exact import FLOAT64, RTOL, assert_equal, in_float64, widened

from mplug2.checkpoint import Checkpoints
from mplug2.logbook import read_metrics
from mplug2.network import Network, flat
from mplug2.recipe import Recipe
from mplug2.sharding import Mesh
from mplug2.step import Trainer
from mplug2.train import train


def all_tasks(**changes) -> Recipe:
    """Without dropout, whose random bits take as long to compile as all else, in every process anew; how a
    mesh draws them, test_meshes shows."""
    return test_meshes.multi_task(
        steps=50, log_every=1, checkpoint_every=1, keep=50, dropout=False, **changes
    )


def train_all_tasks(folder: str, mesh: str) -> None:
    """Every step is kept, since the first must be, and all items of all processes are written 50 times."""
    recipe = all_tasks(mesh=Mesh(**json.loads(mesh)))
    params = widened(jax.jit(Network(recipe.parts).init, static_argnums=0)(recipe.seed))
    with in_float64():
        train(recipe, folder, composed=(Network(recipe.parts, FLOAT64), params))


def learned(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """The losses of a run, and its first step's gradients, clipped (Adam's first moment begins as a tenth of
    them), with their norm before."""
    recipe, checkpoints = all_tasks(), Checkpoints(folder)
    checkpoints.continue_from(1)
    moments = widened(Trainer(recipe, Network(recipe.parts)).abstract["moments"])
    with in_float64():
        _, items = checkpoints.restore({"optimizer": moments}) or pytest.fail("no checkpoint")
    moment = jax.device_get(flat(optax.tree.get(items["optimizer"], "mu")))
    lines = read_metrics(folder)
    return np.array([line["loss"] for line in lines]), moment, lines[0]["gradient_norm"]


@pytest.fixture(scope="module")
def all_tasks_alone(tmp_path_factory) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    folder = tmp_path_factory.mktemp("all")
    call("test_all_tasks.train_all_tasks", folder, "{}", count=1, devices=1)
    return learned(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, mesh",
    [
        (2, {"data": 8}),
        (2, {"fsdp": 8}),
        (2, {"fsdp": 2, "tensor": 4}),
        (2, {"data": 2, "sequence": 2, "tensor": 2}),
        (4, {"data": 8}),
        (4, {"fsdp": 8}),
        (4, {"fsdp": 2, "tensor": 4}),
        (4, {"data": 2, "sequence": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_fifty_steps_of_all_tasks_in_several_processes_are_those_of_one(
    count, mesh, all_tasks_alone, tmp_path
):
    words = ("test_all_tasks.train_all_tasks", tmp_path, json.dumps(mesh))
    call(*words, count=count, devices=8 // count)
    (expected, expected_gradients, expected_norm), (found, gradients, norm) = (
        all_tasks_alone,
        learned(tmp_path),
    )
    apart = abs(found / expected - 1)
    print(count, mesh, "relative differences: first step", apart[0], "largest", apart.max())
    assert len(apart) == 50 and apart[0] <= RTOL and apart.max() <= 1e4 * RTOL  # training widens a difference
    np.testing.assert_allclose(norm, expected_norm, rtol=RTOL)
    assert_equal(gradients, expected_gradients)
