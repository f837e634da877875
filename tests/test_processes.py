"""Several processes on loopback are one training: the same losses, one log, one set of checkpoints."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from cluster import call
from toy import run, toy

from mplug2.logbook import read_metrics
from mplug2.recipe import Recipe
from mplug2.sharding import Mesh


def recipe(mesh: str, **changes) -> Recipe:
    """The toy without dropout, whose random bits depend on the mesh."""
    return toy(dropout=False, mesh=Mesh(**json.loads(mesh)), **changes)


def train_toy(folder: str, mesh: str, end: str = "") -> None:
    run(recipe(mesh), Path(folder), end=int(end) if end else None)
    print(jax.process_count(), "processes are done")


@pytest.mark.parametrize("mesh", [{"data": 2}, {"fsdp": 2}, {"tensor": 2}], ids=str)
def test_two_processes_learn_what_one_does(mesh, tmp_path):
    said = call("test_processes.train_toy", tmp_path / "two", json.dumps(mesh), count=2, devices=1)
    run(recipe("{}"), tmp_path / "one")
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    np.testing.assert_allclose(two, one, rtol=1e-3)
    assert len(two) == 12
    assert "finished after step 12" in said[0] and "finished" not in said[1]
