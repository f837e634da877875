"""The roll call: before JAX joins processes, each says which it is and how many it was told there are.

JAX ends a process whose number another one has with a stack trace, and believes whatever number of processes
each was told. So process 0 first listens at the coordinator's address itself: every other process sends a
JSON line `{"process", "processes"}`, and when all have come each is sent `{"refused": sentence}`, empty where
they belong together."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

PATIENCE_WITH_ONE = 5.0
"""Seconds for a line of somebody who has connected."""

LONGEST = 1 << 12


def take(server: socket.socket, processes: int, patience: float) -> str:
    """On process 0: waits at `server` until all of `processes` have come, or `patience` seconds are over;
    answers them all. The sentence by which they are refused, empty where they belong together."""
    come: dict[int, socket.socket] = {}
    told: list[socket.socket] = []
    until, refused = time.monotonic() + patience, ""
    with contextlib.ExitStack() as lines:
        while len(come) < processes - 1 and not refused:
            server.settimeout(max(0.01, until - time.monotonic()))
            try:
                line = lines.enter_context(server.accept()[0])
            except TimeoutError:
                lacking = ", ".join(str(one) for one in range(1, processes) if one not in come)
                refused = (
                    f"not all processes joined within {patience:g} s (--patience): missing are {lacking}"
                )
                break
            said = _read(line)
            number, count = said.get("process"), said.get("processes")
            if not isinstance(number, int) or not isinstance(count, int):
                continue  # somebody else
            if count != processes:
                refused = f"process {number} was told --processes {count}, process 0 was told {processes}"
            elif number == 0 or number in come and _waits(come[number]):
                refused = f"two processes were started as --process {number}"
            come[number] = line  # perhaps in place of one that was started again
            told.append(line)
        for line in told:
            _write(line, {"refused": refused})
    return refused


def answer(address: tuple[str, int], process: int, processes: int, patience: float) -> str:
    """On any other process: the sentence by which it is refused, empty where all belong together. Raises
    OSError where process 0 does not listen, or goes away."""
    with socket.create_connection(address, timeout=patience) as line:
        _write(line, {"process": process, "processes": processes})
        refused = _read(line, patience + PATIENCE_WITH_ONE).get("refused")
    if not isinstance(refused, str):
        raise ConnectionAbortedError("process 0 ended before all had come")
    return refused


def _waits(line: socket.socket) -> bool:
    """Whether the process at the other end, which says nothing more, is still there."""
    line.setblocking(False)
    try:
        return bool(line.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _read(line: socket.socket, patience: float = PATIENCE_WITH_ONE) -> dict[str, Any]:
    """Nothing, where the line ends or makes no sense."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        line.settimeout(patience)
        with line.makefile("rb") as lines:
            said = json.loads(lines.readline(LONGEST))
        if isinstance(said, dict):
            return said
    return {}


def _write(line: socket.socket, said: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # of one that has gone, its lifeline will tell
        line.settimeout(PATIENCE_WITH_ONE)
        line.sendall(json.dumps(said).encode() + b"\n")


@contextlib.contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that listens at `port` for both kinds of addresses, where there are both. Raises OSError."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=both) as server:
        yield server
