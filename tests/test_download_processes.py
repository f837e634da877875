"""Downloads by several processes: one of them fetches, and what a killed one leaves the next completes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from misbehaving import CONTENT, QUICK, Server, Wanted, planned  # pyright: ignore[reportMissingImports]

from mplug2.hub.cache import Cache
from mplug2.hub.download import fetch

pytestmark = pytest.mark.usefixtures("online")


CHILD = """
import sys
from misbehaving import *
from mplug2.hub.download import fetch
from pathlib import Path
path = fetch(Wanted((sys.argv[1],)), Cache(Path(sys.argv[2])), patience=dataclasses.replace(QUICK, stall=20))
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def child(server: Server, cache: Cache) -> subprocess.Popen:
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url("f"), str(cache.folder)],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    )


def slowly(self: Server, request, content, tag, start, path) -> None:
    """Half of what is asked for, and the rest after a while."""
    self._send(request, content, tag, start, cut=0)
    middle = (start + len(content)) // 2
    request.wfile.write(content[start:middle])
    time.sleep(1)
    request.wfile.write(content[middle:])


def test_four_processes_that_want_one_file_download_it_once(cache, monkeypatch):
    monkeypatch.setattr(Server, "_good", slowly)
    with Server(CONTENT, planned("good")) as server:
        children = [child(server, cache) for _ in range(4)]
        said = [one.communicate(timeout=60)[0].strip() for one in children]
    assert said == [Wanted(()).sha256] * 4
    assert len(server.log) == 1


def test_a_killed_download_is_completed_by_the_next(cache, monkeypatch):
    monkeypatch.setattr(Server, "_good", slowly)
    partial = cache.partial(Wanted(()).sha256)
    with Server(CONTENT, planned("good")) as server:
        for _ in range(2):  # the second takes up what the first has left, and is killed as well
            before = partial.stat().st_size if partial.exists() else 0
            with child(server, cache) as victim:
                deadline = time.monotonic() + 60
                while not (partial.exists() and partial.stat().st_size > before):
                    assert time.monotonic() < deadline and victim.poll() is None
                    time.sleep(0.01)
                victim.send_signal(signal.SIGKILL)
            assert not cache.entries()
        left = partial.stat().st_size
        assert 0 < left < len(CONTENT)
        monkeypatch.undo()
        assert fetch(Wanted((server.url("f"),)), cache, patience=QUICK).read_bytes() == CONTENT
    assert server.log[-1][2] == left  # by range, not from the beginning
    assert not partial.exists()
