"""The logbook of a run: metrics.jsonl, TensorBoard events (without TensorFlow), and progress on the screen.

A line of metrics.jsonl is one JSON object: `step`, the metrics of the window that ends there,
`examples_per_second`, `seconds` since the training step was compiled. On a terminal progress is a bar,
elsewhere a plain line now and then.

metrics.jsonl is the run's: a line is there whole or not at all, and one that cannot be written ends the
training. TensorBoard is a convenience, which ends without it.
"""

import contextlib
import errno
import json
import math
import os
import re
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn

from mplug2 import files
from mplug2.console import Console
from mplug2.events import Events
from mplug2.open_folder import OpenFolder

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10.0  # between plain lines


class Logbook:
    """Opened at `step`: what an earlier session logged later than that is taken back, since it will be done
    again."""

    def __init__(
        self,
        folder: Path | OpenFolder,
        *,
        name: str,
        step: int,
        steps: int,
        examples: int,
        console: Console | None = None,
    ):
        self.steps, self.examples = steps, examples
        self._folder = (folder if isinstance(folder, OpenFolder) else OpenFolder(folder)).open()
        self._moved = False
        self._lines = _Lines(self._folder, step)
        self._events = Events(self._folder.path / "tensorboard", step + 1)
        self._given_up = False
        self._console = console or Console()
        self._bar = Progress(
            TextColumn(name, markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[said]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, completed=step, said="compiling")
        self._bar.start()
        self._name, self._printed = name, -math.inf
        self.ready(step)

    def ready(self, step: int) -> None:
        """The clock starts here: what came before was compilation."""
        self._began = self._last = time.perf_counter()
        self._last_step = step

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line: `metrics` of the window that ends with `step`."""
        now = time.perf_counter()
        rate = (step - self._last_step) / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        line = {
            "step": step,
            **metrics,
            "examples_per_second": round(rate * self.examples, 2),
            "seconds": round(now - self._began, 3),
        }
        self._look()
        self._lines.append(line)
        self._events.add(step, {metric: value for metric, value in line.items() if metric != "step"})
        left = (self.steps - step) / rate if rate else math.inf
        said = f"loss {metrics['loss']:.4f}  {rate * self.examples:.0f} examples/s  {clock(left)} left"
        self._bar.update(self._task, completed=step, said=said)
        if not self._console.is_terminal and (now - self._printed > PLAIN_SECONDS or step >= self.steps):
            self._printed = now
            self.say(f"{self._name}: step {step}/{self.steps}  {said}")

    def judge(self, step: int, name: str, score: float) -> None:
        """The score of a checkpoint."""
        self._events.add(step, {f"checkpoint/{name}": score})
        self.say(f"{self._name}: step {step}/{self.steps}  checkpoint: {name} {score:.4f}")

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        self._console.print(sentence, soft_wrap=True)

    def _look(self) -> None:
        """Says what has become of the folder and of TensorBoard. Raises CheckpointError if the folder is no
        more."""
        self._folder.check()
        if self._folder.moved and not self._moved:
            self._moved = True
            self.say(
                f"{self._folder.given} was moved: the run is kept where it is now, in {self._folder.name}"
            )
        self._look_at_events()

    def _look_at_events(self) -> None:
        if self._events.failure and not self._given_up:
            self._given_up = True
            folder = self._folder.name / "tensorboard"
            self.say(f"{folder}: {self._events.failure}; training goes on without TensorBoard")

    def close(self) -> None:
        self._events.close()
        self._look_at_events()
        self._lines.close()
        self._bar.stop()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Silence:
    """The logbook of a process whose run another one logs."""

    def ready(self, step: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def judge(self, step: int, name: str, score: float) -> None: ...

    def say(self, sentence: str) -> None: ...

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None: ...


class _Lines:
    """metrics.jsonl, open for a session that begins after `step`. What is taken back of it is what is done
    again, and a last line that was cut off; all else stays, byte for byte. Raises CheckpointError."""

    def __init__(self, folder: OpenFolder, step: int):
        self._folder = folder
        self._path = folder.path / METRICS
        with folder.written():
            files.remove_unfinished(self._path)
            before = _read(self._path)
            kept = self._kept(before, step)
            if kept != before:
                with files.replacing(self._path) as file:
                    file.write(kept)
            self._open()

    def append(self, line: Mapping[str, Any]) -> None:
        """The line is there whole or not at all."""
        with self._folder.written():
            if not self._there():
                file, step = self._folder.name / METRICS, line["step"]
                warnings.warn(f"{file} is gone: a new one begins with step {step}", stacklevel=3)
                self.close()
                self._open()
            rest = memoryview(json.dumps(line).encode() + b"\n")
            try:
                while rest:  # a disk that fills takes a part
                    rest = rest[os.write(self._file, rest) :]
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                error.filename = str(self._path)
                raise
            self._size = os.fstat(self._file).st_size

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a network: every line was written before
            os.close(self._file)

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._size = os.fstat(self._file).st_size

    def _there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except OSError:
            return False

    def _kept(self, before: bytes, step: int) -> bytes:
        kept, strange = [], []
        for number, text in enumerate(re.findall(rb"[^\n]*\n|[^\n]+", before), start=1):
            line = _parsed(text)
            if line is None and text.endswith(b"\n"):
                strange += [number] if text.strip() else []
                kept.append(text)
            elif line is not None and line["step"] <= step:
                kept.append(text if text.endswith(b"\n") else text + b"\n")
        if strange:
            told = f"line{'s' * (len(strange) > 1)} {', '.join(map(str, strange[:8]))}"
            told += f" and {len(strange) - 8} more" if len(strange) > 8 else ""
            warnings.warn(
                f"{self._folder.name / METRICS}: {told}: not JSON objects with a step; they stay as they are",
                stacklevel=3,
            )
        return b"".join(kept)


def read_metrics(folder: Path | str) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl; one that was cut off by a crash, or is none of ours, is left out.
    Raises CheckpointError if the file cannot be read."""
    opened = OpenFolder(folder)
    with opened.written():
        return [line for text in _read(opened.path / METRICS).split(b"\n") if (line := _parsed(text))]


def _read(path: Path) -> bytes:
    """Nothing where there is none."""
    if not path.exists():
        return b""
    if not path.is_file():  # a pipe would be waited for
        raise FileExistsError(errno.EEXIST, "it is not a file", str(path))
    return path.read_bytes()


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line of ours; None for anything else."""
    try:
        line = json.loads(text.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    return line


def clock(seconds: float) -> str:
    """`75 -> "1:15"`, `3700 -> "1:01:40"`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
