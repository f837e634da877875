"""What becomes of a training when its surroundings fail: its disk, its folder, its data, whoever stops it."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import pytest
from disks import small_disk
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.record_writer import RecordWriter
from toy import Numbers, losses, run, same, toy

from mplug2 import logbook
from mplug2.checkpoint import Checkpoints, restore_modules
from mplug2.errors import CheckpointError, RecipeError
from mplug2.logbook import Logbook, read_metrics
from mplug2.network import Network
from mplug2.recipe import Recipe
from mplug2.train import Outcome, train


class Eventful(Numbers):
    """A stream before whose batches of some steps something happens."""

    def __init__(self, recipe: Recipe, happens: dict[int, Callable[[], object]]):
        super().__init__(recipe)
        self.happens = happens

    def __next__(self) -> dict[str, Any]:
        self.happens.pop(self.step + 1, lambda: None)()
        return super().__next__()


def eventful(folder: Path, happens: dict[int, Callable[[], object]], **changes: Any) -> Outcome:
    recipe = toy(**changes)
    network = Network(recipe.parts)
    return train(recipe, folder, batches=Eventful(recipe, happens), composed=(network, network.init(0)))


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All of these runs have the same step: it is compiled for the first of them."""
    options = [
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    ]
    before = [getattr(jax.config, option) for option in options]
    for option, value in zip(options, [str(tmp_path_factory.mktemp("compiled")), 0, -1], strict=True):
        jax.config.update(option, value)
    compilation_cache.reset_cache()
    yield
    for option, value in zip(options, before, strict=True):
        jax.config.update(option, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, list[tuple]]:
    """What a training that nothing happens to has learned and logged."""
    folder = tmp_path_factory.mktemp("whole")
    return run(toy(), folder), losses(folder)


def test_a_run_that_is_moved_is_kept_where_it_went_and_continues_there(whole, tmp_path, capsys):
    here, there = tmp_path / "lr[0.1]", tmp_path / "moved 100%"
    happens = {8: lambda: here.rename(there), 10: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    stopped = eventful(here, happens)
    said = capsys.readouterr().out
    assert f"{here} was moved: the run is kept where it is now, in {there}" in said
    assert (
        f"{there}: stopped after step {stopped.step} of 12; the same command continues with --run-dir" in said
    )
    assert not here.exists() and stopped.run.path == there
    assert Checkpoints(there).steps == sorted({5, stopped.step})
    same(run(toy(), there).params, whole[0].params)
    assert losses(there) == whole[1]


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("loss", [removed, emptied], ids=lambda loss: loss.__name__)
def test_a_run_whose_folder_is_lost_ends_at_the_next_line_of_its_log(loss, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(Logbook, "advance", lambda self, step: loss(folder) if step == 7 else None)
    with pytest.raises(CheckpointError, match=f"run was {loss.__name__} while it was trained in"):
        run(toy(checkpoint_every=100), folder)
    assert list(tmp_path.rglob("*")) == ([] if loss is removed else [folder])


def test_an_address_is_no_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for address in ("gs://bucket/run", "s3://bucket/run", "file:///run"):
        with pytest.raises(RecipeError, match=f"{address} is an address; a run is kept in a folder"):
            train(toy(), address)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_ends_the_run_which_continues_when_there_is_room(
    whole, tmp_path, monkeypatch
):
    write = os.write

    def full(file: int, data: bytes) -> int:
        if b'"step": 8' in bytes(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(logbook.os, "write", full)
        said = rf"{tmp_path}/metrics.jsonl .*: No space left on device[^;]*; checkpoint 5 is whole and"
        with pytest.raises(CheckpointError, match=said):
            run(toy(), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 8))
    same(run(toy(), tmp_path).params, whole[0].params)
    assert losses(tmp_path) == whole[1]


def test_tensorboard_without_room_changes_nothing_of_the_run(whole, tmp_path, monkeypatch, capsys):
    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", full)
    same(run(toy(), tmp_path).params, whole[0].params)
    said = capsys.readouterr().out
    assert said.count("No space left on device; training goes on without TensorBoard") == 1
    assert f"{tmp_path}: finished after step 12" in said
    assert losses(tmp_path) == whole[1]


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGHUP, signal.SIGTERM], [signal.SIGINT] * 3],
    ids=lambda signals: "+".join(one.name for one in signals),
)
def test_signals_of_one_moment_save_once_and_the_run_continues(signals, whole, tmp_path, capsys):
    def told() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    stopped = eventful(tmp_path, {8: told})
    assert not stopped.finished and Checkpoints(tmp_path).steps == sorted({5, stopped.step})
    assert f"stopped after step {stopped.step} of 12" in capsys.readouterr().out
    same(run(toy(), tmp_path).params, whole[0].params)


def test_a_signal_while_the_last_checkpoint_is_written_does_not_lose_it(tmp_path, monkeypatch, capsys):
    finish = Checkpoints._finish

    def told(self: Checkpoints, *given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        finish(self, *given)

    monkeypatch.setattr(Checkpoints, "_finish", told)
    assert run(toy(checkpoint_every=100), tmp_path).finished
    assert "finished after step 12" in capsys.readouterr().out and Checkpoints(tmp_path).steps == [12]


def test_a_signal_before_there_is_anything_to_save_ends_it_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mplug2.train._check_shared", lambda run: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt):
        run(toy(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_training_whose_data_does_not_come_can_be_stopped_and_saves(tmp_path, monkeypatch):
    monkeypatch.setattr("mplug2.prefetch.Prefetch.PATIENCE", 0.1)
    come = threading.Event()

    def stall() -> None:
        while len(read_metrics(tmp_path)) < 5:  # two steps may be in flight
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        come.wait(60)

    stopped = eventful(tmp_path, {8: stall})
    come.set()
    assert stopped.step in (5, 6, 7) and Checkpoints(tmp_path).steps == sorted({5, stopped.step})


CHILD = """
import sys, types, test_surroundings as t
from mplug2.tools import main
tool = types.SimpleNamespace(main=lambda words: t.run(t.long(), t.Path(words[0]), wait=0.02) and 0)
sys.modules["mplug2.tools.train"] = tool
sys.exit(main.main(["train", *sys.argv[1:]]))
"""


def long() -> Recipe:
    return toy(steps=600, checkpoint_every=20, keep=1)


class Child:
    """A training by the command line, in a process of its own."""

    def __init__(self, folder: Path):
        here = Path(__file__).parent
        environ = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.checkpoints = Checkpoints(folder)
        self.process = subprocess.Popen([sys.executable, "-c", CHILD, str(folder)], env=environ, **pipes)

    def until_saved(self) -> None:
        """Waits for another checkpoint, or the end."""
        before, end = self.checkpoints.steps[-1:], time.monotonic() + 300
        while self.checkpoints.steps[-1:] == before and self.process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        try:
            said = self.process.communicate(timeout=300)
        finally:
            self.process.kill()
        return self.process.returncode, "".join(filter(None, said))

    def stop(self) -> tuple[int, str]:
        self.process.terminate()
        return self.end()


@pytest.mark.slow
def test_a_training_that_loses_its_surroundings_in_turn_loses_no_step_before_the_last_save(tmp_path):
    """Its screen, its TensorBoard folder, its disk and its inodes."""
    with small_disk(tmp_path / "disk", "size=4m,nr_inodes=800") as disk:
        folder = disk / "run [1]"
        child = Child(folder)
        child.until_saved()
        assert child.process.stdout
        child.process.stdout.close()
        child.process.stdout = None
        child.until_saved()
        child.until_saved()
        status, said = child.stop()
        assert status == 0 and "Traceback" not in said, said

        with small_disk(folder / "tensorboard", "size=4k,nr_inodes=2") as tensorboard:
            (tensorboard / "full").write_bytes(bytes(4096))
            child = Child(folder)
            child.until_saved()
            child.until_saved()
            status, said = child.stop()
            assert status == 0 and said.count("training goes on without TensorBoard") == 1, said
            assert "the same command continues" in said and "Traceback" not in said
        kept = child.checkpoints.steps[-1]

        def bytes_of(place: Path) -> None:
            with suppress(OSError), (place / "bytes").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

        def files_in(place: Path) -> None:
            with suppress(OSError):
                for number in itertools.count():
                    (place / str(number)).touch()

        for fill, reason in ((bytes_of, ""), (files_in, ": there are no inodes left for new files")):
            child = Child(folder)
            child.until_saved()
            (disk / "others").mkdir()
            fill(disk / "others")
            began = time.monotonic()
            status, said = child.end()
            assert time.monotonic() - began < 120
            assert status == 2 and "Traceback" not in said, said
            assert f"No space left on device{reason}" in said and f"{folder}/" in said
            (step,) = child.checkpoints.steps
            assert f"checkpoint {step} is whole and the run continues from it" in said and step > kept
            kept = step
            shutil.rmtree(disk / "others")

        status, said = Child(folder).end()
        assert status == 0 and f"finished after step {long().steps}" in said, said
        run(long(), tmp_path / "whole")
        assert losses(folder) == losses(tmp_path / "whole")
        same(restore_modules(folder), restore_modules(tmp_path / "whole"))
