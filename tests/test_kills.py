"""kill -9 of a training in two processes, at random instants: it goes on from its newest complete checkpoint
and ends with the very same parameters; in one process on one device, with the same examples and losses.

The default run kills once. Fifty times: make test-slow TEST_ARGS='-k killed_fifty -s'
From some devices and processes to others: make test-slow TEST_ARGS='-k that_moves'
"""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cluster import call, finish, start
from toy import classify, count, losses, same, toy

from mplug2.checkpoint import Checkpoints, restore_modules
from mplug2.data.stream import Mixture
from mplug2.errors import DataError
from mplug2.logbook import read_metrics
from mplug2.network import Network
from mplug2.prefetch import Batches
from mplug2.recipe import Objective
from mplug2.roles import Array
from mplug2.sharding import Mesh
from mplug2.train import data_stream, train

BOTH = Mesh(fsdp=2)
STARTING = 8.0  # seconds, in which processes begin
SLOW = 0.03  # seconds a step takes at least, for a kill to find it


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A data set of `count` random pictures, whose numbers begin at `first`."""

    first: int
    count: int

    def source(self, split: str) -> "Pictures":
        return self

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng([self.first, index])
        clips, label = random.integers(0, 255, (1, 2, 2, 3), np.uint8), int(random.integers(4))
        return {"index": self.first + index, "clips": clips, "label": label}


def label(batch: Mapping[str, Array], key: Array | None = None, *, vision: Any, head: Any) -> Array:
    return classify({**batch, "scale": jnp.ones(len(batch["label"]))}, key, vision=vision, head=head)


class Noted:
    """A stream that notes in `folder` which examples it gave, takes `wait` seconds a step at least, and ends
    after step `end`."""

    def __init__(self, batches: Batches, folder: Path, wait: float, end: int | None):
        self.batches, self.wait, self.end = batches, wait, end
        self.notes = folder / f"examples-{jax.process_index()}-of-{jax.process_count()}.jsonl"
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __iter__(self) -> "Noted":
        return self

    def __next__(self) -> dict[str, dict[str, np.ndarray]]:
        time.sleep(self.wait)
        if self.get_state()["step"] == self.end:
            raise StopIteration
        given = next(self.batches)
        ids = {feed: batch["index"].tolist() for feed, batch in given.items()}
        with self.notes.open("a") as notes:
            notes.write(json.dumps([self.get_state()["step"], ids]) + "\n")
        return given


def examples(folder: Path, count: int, steps: int) -> dict[int, dict[str, list[int]]]:
    """By step and feed, what a training in `count` processes has read of the first `steps`, ascending."""
    read: dict[int, dict[str, set[int]]] = {}
    for notes in sorted(folder.glob(f"examples-*-of-{count}.jsonl")):
        for step, ids in map(json.loads, notes.read_text().splitlines()):
            for feed, some in ids.items():
                read.setdefault(step, {}).setdefault(feed, set()).update(some)
    return {
        step: {feed: sorted(ids) for feed, ids in feeds.items()}
        for step, feeds in read.items()
        if step <= steps
    }


def train_toy(
    folder: str, steps: str, checkpoint_every: str, wait: str, mesh: Mesh = BOTH, end: int | None = None
) -> None:
    """Parameters, moments and averages lie in parts on both processes."""
    mixture = Mixture({Pictures(0, 50): 3, Pictures(100, 30): 1})
    recipe = toy(
        objectives={
            "label": Objective(task=label, data=mixture, batch=8),
            "count": Objective(task=count, data=Pictures(200, 40), batch=4, weight=0.1),
        },
        steps=int(steps),
        checkpoint_every=int(checkpoint_every),
        mesh=mesh,
        ema=0.9,
        accumulate=2,
    )
    network = Network(recipe.parts)
    composed = (network, network.init(recipe.seed))
    noted = Noted(data_stream(recipe), Path(folder), float(wait), end)
    train(recipe, folder, batches=noted, composed=composed)


def finish_both(killed: str, whole: str, steps: str) -> None:
    for folder in (killed, whole):
        train_toy(folder, steps, "1000000", "0")


def kill(started: list[subprocess.Popen[str]], folder: Path, chance: random.Random) -> bool:
    """Kills one process or both, at an instant of a step or of a checkpoint's writing, when the other one
    must end by itself; or both as they start, when one alone would wait for the other to join. Whether the
    writing of a checkpoint was cut off."""
    checkpoints, logged, begun = Checkpoints(folder), len(read_metrics(folder)), set(unfinished(folder))
    kept = checkpoints.steps[-1:]
    instant = chance.choice(["start", "step", "write", "write"])
    if instant == "start":
        time.sleep(chance.uniform(0, STARTING))
    else:
        while len(read_metrics(folder)) <= logged and checkpoints.steps[-1:] == kept and alive(started):
            time.sleep(0.01)
    if instant == "step":
        time.sleep(chance.uniform(0, 1))
    if instant == "write":
        while not set(unfinished(folder)) - begun and alive(started):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.2))
    assert alive(started), finish(started)
    victims = [0, 1] if instant == "start" else chance.choice([[0], [1], [0, 1]])
    for victim in victims:
        started[victim].send_signal(signal.SIGKILL)
    for process, (status, said) in enumerate(finish(started)):
        if process in victims:
            assert status == -signal.SIGKILL
        else:
            assert status != 0 and f"process {victims[0]} is gone" in said, said
    assert checkpoints.steps[-1:] >= kept  # and a run that had not gone on from there would have cut its log
    assert len(read_metrics(folder)) >= sum(kept)
    return bool(unfinished(folder))


def unfinished(folder: Path) -> list[str]:
    kept = set(map(str, Checkpoints(folder).steps))
    there = folder / "checkpoints"
    return [path.name for path in there.iterdir() if path.name not in kept] if there.is_dir() else []


def alive(started: list[subprocess.Popen[str]]) -> bool:
    return all(process.poll() is None for process in started)


def survives(folder: Path, *, kills: int, steps: int, seed: int) -> int:
    """How many of the kills cut off the writing of a checkpoint."""
    chance, cut = random.Random(seed), 0
    for number in range(kills):
        words = (folder / "killed", steps, 2, SLOW)
        cut += kill(start("test_kills.train_toy", *words, count=2, devices=1), folder / "killed", chance)
        print(f"kill {number + 1}: after {Checkpoints(folder / 'killed').steps}, {cut} cut off", flush=True)
    shutil.copytree(folder / "killed", folder / "alone")
    call("test_kills.finish_both", folder / "killed", folder / "whole", steps, count=2, devices=1)
    for ema in (True, False):
        ends = [restore_modules(folder / name, ema=ema) for name in ("killed", "whole")]
        assert ends[0][0] == ends[1][0] == steps
        same(ends[0][1], ends[1][1])
    assert losses(folder / "killed") == losses(folder / "whole")
    read = examples(folder / "whole", 2, steps)
    assert len(read) == steps and examples(folder / "killed", 2, steps) == read
    goes_on_alone(folder, steps)
    return cut


def goes_on_alone(folder: Path, steps: int) -> None:
    """In one process on one device. What differs by rounding there grows from step to step."""
    begun = Checkpoints(folder / "alone").steps[-1:] or [0]
    train_toy(str(folder / "alone"), str(steps), "1000000", "0", mesh=Mesh())
    found, expected = ([line["loss"] for line in read_metrics(folder / one)] for one in ("alone", "whole"))
    np.testing.assert_allclose(found[: begun[0] + 60], expected[: begun[0] + 60], rtol=1e-4)
    read = examples(folder / "whole", 2, steps)
    rest = {step: read[step] for step in range(begun[0] + 1, steps + 1)}
    assert rest and examples(folder / "alone", 1, steps) == rest


def stopped(folder: str, mesh: str) -> None:
    """As by a crash after step 7; step 5 was kept."""
    with pytest.raises(DataError):
        train_toy(folder, "12", "5", "0", Mesh(**json.loads(mesh)), end=7)


def continued(folder: str, mesh: str) -> None:
    train_toy(folder, "12", "5", "0", Mesh(**json.loads(mesh)))


EIGHT, FOUR = {"fsdp": 2, "sequence": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}
MOVES = {
    "8 devices in 2 processes, then 4 in 1": [(2, 4, EIGHT), (1, 4, FOUR)],
    "1 device, then 8 in 2 processes": [(1, 1, {}), (2, 4, EIGHT)],
}


@pytest.mark.slow
@pytest.mark.parametrize("places", MOVES.values(), ids=MOVES.keys())
def test_a_run_that_moves_reads_the_same_batches_and_learns_the_same(places, tmp_path):
    for function, (processes, devices, mesh) in zip(("stopped", "continued"), places, strict=True):
        words = (f"test_kills.{function}", tmp_path / "moved", json.dumps(mesh))
        call(*words, count=processes, devices=devices)
    train_toy(str(tmp_path / "whole"), "12", "5", "0", mesh=Mesh())
    found, expected = ([line["loss"] for line in read_metrics(tmp_path / one)] for one in ("moved", "whole"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    read = examples(tmp_path / "whole", 1, 12)
    rest = {step: read[step] for step in range(6, 13)}
    assert len(read) == 12 and examples(tmp_path / "moved", places[1][0], 12) == rest


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    survives(tmp_path, kills=1, steps=60, seed=5)


@pytest.mark.slow
def test_a_run_killed_fifty_times_ends_as_if_it_had_not_been(tmp_path):
    assert survives(tmp_path, kills=50, steps=1000, seed=1) >= 5
