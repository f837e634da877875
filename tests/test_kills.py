"""kill -9 of a training in two processes, at random instants: it goes on from its newest complete checkpoint
and ends with the very same parameters.

The default run kills once. Fifty times: make test-slow TEST_ARGS='-k fifty -s'
"""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import call, finish, start
from toy import losses, run, same, toy

from mplug2.checkpoint import Checkpoints, restore_modules
from mplug2.logbook import read_metrics
from mplug2.sharding import Mesh

STARTING = 8.0  # seconds, in which processes begin
SLOW = 0.03  # seconds a step takes at least, for a kill to find it


def train_toy(folder: str, steps: str, checkpoint_every: str, wait: str) -> None:
    """Parameters, moments and averages lie in parts on both processes."""
    recipe = toy(
        steps=int(steps), checkpoint_every=int(checkpoint_every), mesh=Mesh(fsdp=2), ema=0.9, accumulate=2
    )
    run(recipe, Path(folder), wait=float(wait))


def finish_both(killed: str, whole: str, steps: str) -> None:
    for folder in (killed, whole):
        train_toy(folder, steps, "1000000", "0")


def kill(started: list[subprocess.Popen[str]], folder: Path, chance: random.Random) -> bool:
    """Kills one process or both, at an instant of a step or of a checkpoint's writing, when the other one
    must end by itself; or both as they start, when one alone would wait for the other to join. Whether the
    writing of a checkpoint was cut off."""
    checkpoints, logged, begun = Checkpoints(folder), len(read_metrics(folder)), set(unfinished(folder))
    instant = chance.choice(["start", "step", "write", "write"])
    if instant == "start":
        time.sleep(chance.uniform(0, STARTING))
    else:
        done = checkpoints.steps[-1:]
        while len(read_metrics(folder)) <= logged and checkpoints.steps[-1:] == done and alive(started):
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
    call("test_kills.finish_both", folder / "killed", folder / "whole", steps, count=2, devices=1)
    for ema in (True, False):
        ends = [restore_modules(folder / name, ema=ema) for name in ("killed", "whole")]
        assert ends[0][0] == ends[1][0] == steps
        same(ends[0][1], ends[1][1])
    assert losses(folder / "killed") == losses(folder / "whole")
    return cut


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    survives(tmp_path, kills=1, steps=60, seed=5)


@pytest.mark.slow
def test_a_run_killed_fifty_times_ends_as_if_it_had_not_been(tmp_path):
    assert survives(tmp_path, kills=50, steps=1000, seed=1) >= 5
