"""What a person sees of a download: bytes, speed and time left on a terminal; a line at its end elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from mplug2.screen import note


class Meter:
    """Is told how a download goes, and says nothing."""

    def begin(self, name: str, size: int) -> None:
        """A file of so many bytes is about to come."""

    def at(self, done: int) -> None:
        """So many bytes of the file are here."""

    def say(self, sentence: str) -> None:
        """Something that a person would want to know while waiting."""


class Bar(Meter):
    """On stderr, so that a command's output stays its own. A context: the bar leaves the screen with it."""

    def __init__(self) -> None:
        self._progress: Any = None
        self._task: Any = None
        self._name, self._size, self._began = "", -1, 0.0
        self._first: int | None = None  # what an earlier process had left is not this one's speed

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, name: str, size: int) -> None:
        self._name, self._size, self._began, self._first = name, size, time.monotonic(), None
        if sys.stderr is None or not sys.stderr.isatty():
            return
        if self._progress is None:
            self._progress = _progress()
            self._progress.start()
        self._task = self._progress.add_task(name, total=size)

    def at(self, done: int) -> None:
        self._first = done if self._first is None else min(done, self._first)
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
        elif done == self._size:
            seconds = max(time.monotonic() - self._began, 1e-3)
            speed = (done - self._first) / seconds / 1e6
            self.say(f"{self._name}: {done / 1e6:.2f} MB in {seconds:.1f} s, {speed:.1f} MB/s")

    def say(self, sentence: str) -> None:
        if self._progress is not None:
            self._progress.console.print(sentence)
        else:
            note(sentence)


def _progress() -> Any:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    from mplug2.console import Console

    text = TextColumn("{task.description}", markup=False)  # names are strangers'
    columns = (text, BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
