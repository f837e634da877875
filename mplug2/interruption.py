"""How a training is told to stop: Ctrl-C, SIGTERM, SIGHUP.

A handler runs between any two instructions of the main thread, which may hold the lock of a screen or of a
queue: it notes the signal and does nothing else. The loop says it.
"""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

MOMENT = 1.0
"""Seconds within which signals are one: a supervisor tells the process and its group, a terminal that goes
away hangs up and takes its shell along."""


class Interruption:
    """While it is entered, a first Ctrl-C, SIGTERM or SIGHUP (unless SIGHUP is ignored, as under `nohup`)
    makes `asked` true, and one that comes more than a MOMENT later raises KeyboardInterrupt. Before `hold`,
    while there is nothing to save, the first one raises it.

    In several processes JAX itself listens for SIGTERM, however many come, and tells all of them; a first
    signal of another kind is passed on as one.
    """

    def __init__(self) -> None:
        self._noted: tuple[float, str] | None = None
        self._say: Callable[[str], None] | None = None
        self._said = False
        self._before: dict[int, Any] = {}

    def hold(self, say: Callable[[str], None]) -> None:
        """From here on there is something to save; `say` shows a sentence to the user."""
        self._say = say

    @property
    def noted(self) -> bool:
        """Whether this process was told to stop."""
        return self._noted is not None

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`: the same in all processes, each of which asks after every step."""
        if self._noted is not None and self._say is not None and not self._said:
            self._said = True
            self._say(f"{self._noted[1]}: finishing this step and saving; once more stops at once")
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted is not None

    def _note(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self._noted is not None:
            if now - self._noted[0] > MOMENT:
                raise KeyboardInterrupt
            return
        self._noted = now, signal.Signals(number).name
        if self._say is None:
            raise KeyboardInterrupt
        if jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():  # elsewhere Python forbids it
            return self
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        if jax.distributed.is_initialized():
            numbers.remove(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
