"""A line from each process to process 0, so that all know at once when one of them ends too early, and why.

Collectives wait for a process that is gone, on some machines for ever; JAX's own heartbeats find it after a
while, and end the others with a stack trace. A line breaks at once when the process at its other end is
killed. Over it go JSON lines: first `[process, token]`, at last null (ended well) or `[process, reason]`.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

GRACE = 3.0
"""Seconds for a process to give an error of its own before it is ended by another's."""

CONNECT = 20.0
"""Seconds for a line to be laid."""


class Lifeline:
    """The line of this process, or on process 0 all of them. `exchange` gives what every process gave it;
    `host` is where process 0 is reached. A process whose line cannot be laid is left to JAX's heartbeats."""

    def __init__(self, process: int, exchange: Callable[[Any], list[Any]], host: str | None = None):
        self._process, self._ended = process, False
        self._lines: dict[int, socket.socket] = {}
        server = _server() if process == 0 else None
        port = server.getsockname()[1] if server else 0
        address, port, token = exchange((host or _own_address(), port, secrets.token_hex()))[0]
        if server:
            threading.Thread(target=self._accept, args=(server, token), daemon=True).start()
        else:
            self._connect(address, port, token)
        missing = [other for other, laid in enumerate(exchange(bool(server or self._lines))) if not laid]
        if missing:
            warnings.warn(
                f"no line from process(es) {', '.join(map(str, missing))} to {address}:{port}: only JAX's "
                "heartbeats will notice their end",
                stacklevel=3,
            )

    def close(self, reason: str = "") -> None:
        """Tells the others that this process has ended well, or why it did not."""
        self._ended = True
        for line in list(self._lines.values()):
            _send(line, [self._process, reason] if reason else None)

    def _connect(self, host: str, port: int, token: str) -> None:
        try:
            line = socket.create_connection((host, port), timeout=CONNECT)
        except OSError:
            return
        line.settimeout(None)
        _send(line, [self._process, token])
        self._lines[0] = line
        threading.Thread(target=self._watch, args=(line, 0), daemon=True).start()

    def _accept(self, server: socket.socket, token: str) -> None:
        while True:
            line, _ = server.accept()
            threading.Thread(target=self._greet, args=(line, token), daemon=True).start()

    def _greet(self, line: socket.socket, token: str) -> None:
        hello = _receive(line)
        if not isinstance(hello, list) or len(hello) != 2 or hello[1] != token:
            line.close()  # somebody else
            return
        self._lines[hello[0]] = line
        self._watch(line, hello[0])

    def _watch(self, line: socket.socket, other: int) -> None:
        """Waits for the last word from the other end of a line; a broken one is that, too."""
        said = _receive(line)
        if said is None or self._ended:
            return
        process, reason = said or (other, "")
        for told, another in list(self._lines.items()):  # on process 0, which alone has others
            if told != process:
                _send(another, [process, reason])
        self._end(process, reason)

    def _end(self, process: int, reason: str) -> None:
        if reason:
            time.sleep(GRACE)
            if self._ended:
                return
        end = f"process {process} has ended ({reason})" if reason else f"process {process} is gone"
        with contextlib.suppress(OSError, ValueError):  # a screen that is gone holds up nothing
            print(
                f"mplug2: error: {end}, and process {self._process} ends with it", file=sys.stderr, flush=True
            )
        os._exit(2)


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _send(line: socket.socket, value: Any) -> None:
    try:
        line.sendall(json.dumps(value).encode() + b"\n")
    except OSError:
        pass  # nobody is there any more


def _receive(line: socket.socket) -> Any:
    """One value; () where the line breaks before."""
    try:
        return json.loads(line.makefile("rb", buffering=0).readline())
    except (OSError, ValueError):
        return ()


def _own_address() -> str:
    """The address by which this machine goes out; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation, which nobody has
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()
