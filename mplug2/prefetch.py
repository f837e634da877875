"""Batches on their devices before they are needed: a background thread reads the stream and places its
arrays."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from mplug2.roles import Array


class Batches(Iterator[dict[str, dict[str, np.ndarray]]], Protocol):
    """What training reads: an iterator of `{feed: batch}` whose position can be told and set, as JSON."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Ready(NamedTuple):
    """One step's batches on the devices, the example ids in them by feed, and the stream's position after
    them."""

    arrays: dict[str, dict[str, Array]]
    ids: dict[str, list[int]]
    position: Any


class Prefetch:
    """Iterates over `batches`, at most `depth` steps ahead. `place` puts an array onto the devices.

    The stream must not be used by anybody else until this is closed. Its errors are raised by `next`.
    """

    PATIENCE = 5.0  # seconds that closing waits for a stream that does not answer

    def __init__(self, batches: Batches, place: Callable[[np.ndarray], Array], depth: int = 2):
        self._batches, self._place = batches, place
        self._queue: queue.Queue[Ready | Exception] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mplug2-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._stopped.is_set():
            try:
                step = next(self._batches)
                item = Ready(
                    {
                        name: {k: self._place(v) for k, v in batch.items() if k != "index"}
                        for name, batch in step.items()
                    },
                    {
                        name: np.asarray(batch["index"]).tolist()
                        for name, batch in step.items()
                        if "index" in batch
                    },
                    self._batches.get_state(),
                )
            except Exception as error:  # the stream's own, StopIteration included: the caller's to handle
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, Exception):
                return

    def __iter__(self) -> Iterator[Ready]:
        return self

    def __next__(self) -> Ready:
        item = self.next(None)
        assert item is not None
        return item

    def next(self, patience: float | None) -> Ready | None:
        """The next one; None if it does not come within so many seconds."""
        try:
            item = self._queue.get(timeout=patience)
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            self._queue.put(item)  # the next call gets it too
            raise item
        return item

    def close(self) -> None:
        """Ends the thread; what was read ahead is dropped."""
        self._stopped.set()
        self._thread.join(self.PATIENCE)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
