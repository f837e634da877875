"""TensorBoard's events of a run, without TensorFlow. They are a convenience: whatever becomes of their file,
the work goes on and ends without them.
"""

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from mplug2.errors import cause

Event = cast(Any, event_pb2).Event  # made by protobuf as it is imported: no type checker sees it
SessionLog = cast(Any, event_pb2).SessionLog

ROOM = 10_000
"""Events that may wait to be written."""

PATIENCE = 5.0
"""Seconds that closing waits for those that still are."""


class Events:
    """Writes into `folder` from a thread of its own (tensorboardX's leaves a full queue behind when it dies,
    for which its writer then waits for ever). Readers forget what an earlier session said of `step` and
    later. `failure` says why nothing more is written; it is empty as long as all is well."""

    def __init__(self, folder: Path, step: int):
        self.failure = ""
        self._queue: queue.Queue[Any] = queue.Queue(ROOM)
        self._thread = threading.Thread(target=self._write, args=(folder,), name="mplug2-events", daemon=True)
        self._thread.start()
        self._put(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Never waits, never raises."""
        for name, value in values.items():
            self._put(Event(step=step, summary=scalar(name, value)))

    def _put(self, event: Any) -> None:
        if self.failure:
            return
        event.wall_time = time.time()
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.failure = "its disk does not answer"

    def _write(self, folder: Path) -> None:
        try:
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            file = RecordWriter(str(folder / name))
            try:
                file.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
                while (event := self._queue.get()) is not None:
                    file.write(event.SerializeToString())
                    if self._queue.empty():
                        file.flush()
                file.flush()
            finally:
                with contextlib.suppress(OSError):
                    file.close()
        except Exception as error:  # of whatever kind: it is not the work
            self.failure = cause(error)

    def close(self) -> None:
        """Waits no longer than PATIENCE."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self.failure = self.failure or "its disk does not answer"
