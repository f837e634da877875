"""A web server that misbehaves on purpose, in a thread of the test's own process.

`Server(content, plan)`: `plan(path)` names what an answer does, one of TRICKS; the server notes every request
in `log` as (path, trick, first byte asked for). CONTENT, Wanted and QUICK are what tests ask it for, and how.
"""

import dataclasses
import hashlib
import random
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mplug2.hub.cache import Cache
from mplug2.hub.meter import Meter
from mplug2.hub.remote import Patience

TRICKS = (
    "good",
    "drop",  # the connection ends at a random byte
    "drop_at_once",
    "no_range",  # Range is ignored
    "wrong_range",  # 206, of other bytes than those asked for
    "unasked_range",  # 206, of a part, whatever was asked for
    "busy",  # 429 with Retry-After
    "broken",  # 503 with Retry-After: a date
    "failing",  # 500
    "missing",  # 404
    "wrong_bytes",
    "wrong_tail",  # right length, tag and range; the bytes asked for are others
    "longer",
    "shorter",
    "endless",  # chunked, and never at its end
    "changed",  # another file with another tag, from now on
    "stall",
    "to_other_host",
    "to_file",
    "in_circles",
    "no_tag",
    "weak_tag",
    "garbage",  # not HTTP
    "coded",  # Content-Encoding: gzip
    "slow_head",  # a byte of the answer's head now and then, and never its end
)


class Server:
    def __init__(self, content: bytes, plan: Callable[[str], str], *, stall: float = 0.3, seed: int = 7):
        self.content, self.plan, self.stall = content, plan, stall
        self.random = random.Random(seed)
        self.log: list[tuple[str, str, int]] = []
        self.changed: set[str] = set()
        self.outside = "file:///etc/hostname"
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.close_connection = True
                server.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client left, as it should

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self._server.server_address[1]}/{path}"

    def answer(self, request: Any) -> None:
        path = request.path.lstrip("/")
        trick = self.plan(path) if not path.startswith("elsewhere/") else "good"
        asked = re.fullmatch(r"bytes=([0-9]+)-", request.headers.get("Range") or "")
        start = int(asked[1]) if asked else 0
        self.log.append((path, trick, start))
        content, tag = self.content, '"one"'
        if trick == "changed":
            self.changed.add(path)
        if path in self.changed:
            content, tag = bytes(reversed(content)), '"two"'
        if asked and request.headers.get("If-Range") not in (tag, None) and trick != "wrong_tail":
            start = 0
        getattr(self, f"_{trick}", self._good)(request, content, tag, start, path)

    def _send(
        self, request: Any, content: bytes, tag: str, start: int, *, said: str = "", cut: int | None = None
    ) -> None:
        body = content[start:]
        request.send_response(206 if start or said else 200)
        if start or said:
            request.send_header("Content-Range", said or f"bytes {start}-{len(content) - 1}/{len(content)}")
        request.send_header("Content-Length", str(len(body)))
        if tag:
            request.send_header("ETag", tag)
        request.end_headers()
        request.wfile.write(body[:cut])

    def _status(self, request: Any, status: int, **headers: str) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _good(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content, tag, start)

    def _drop(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content, tag, start, cut=self.random.randrange(len(content) - start))

    def _drop_at_once(self, request: Any, *_: Any) -> None:
        pass

    def _no_range(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content, tag, 0)

    def _wrong_range(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        wrong = self.random.randrange(1, len(content))
        self._send(request, content, tag, wrong)

    def _unasked_range(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content, tag, 0, said=f"bytes 0-{len(content) // 2}/{len(content)}")

    def _busy(self, request: Any, *_: Any) -> None:
        self._status(request, 429, Retry_After="0")

    def _broken(self, request: Any, *_: Any) -> None:
        self._status(request, 503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")

    def _failing(self, request: Any, *_: Any) -> None:
        self._status(request, 500)

    def _missing(self, request: Any, *_: Any) -> None:
        self._status(request, 404)

    def _wrong_bytes(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, self.random.randbytes(len(content)), tag, start)

    def _wrong_tail(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content[:-1] + bytes([content[-1] ^ 1]), tag, start)

    def _longer(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content + b"more", tag, 0)

    def _shorter(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content[:-1], tag, 0)

    def _endless(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for _ in range(1000):
            request.wfile.write(b"1000\r\n" + bytes(4096) + b"\r\n")

    def _stall(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content, tag, start, cut=self.random.randrange(len(content) - start))
        time.sleep(self.stall)

    def _to_other_host(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._status(request, 302, Location=self.url(f"elsewhere/{path}", host="localhost"))

    def _to_file(self, request: Any, *_: Any) -> None:
        self._status(request, 302, Location=self.outside)

    def _in_circles(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._status(request, 307, Location=f"/{path}")

    def _no_tag(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content, "", start, cut=self.random.randrange(len(content) - start + 1))

    def _weak_tag(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._send(request, content, 'W/"w"', 0, cut=self.random.randrange(len(content)))

    def _garbage(self, request: Any, *_: Any) -> None:
        request.wfile.write(self.random.randbytes(100) + b"\r\n\r\n")

    def _coded(self, request: Any, content: bytes, tag: str, start: int, path: str) -> None:
        self._status(request, 200, Content_Encoding="gzip")

    def _slow_head(self, request: Any, *rest: Any) -> None:
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        for _ in range(50):
            request.wfile.write(b"x")
            time.sleep(0.02)


CONTENT = random.Random(0).randbytes(20_000)
HOSTS = frozenset({"127.0.0.1", "localhost"})
QUICK = Patience(attempts=4, stall=0.1, backoff=0.001, longest_wait=0.05, plain_hosts=HOSTS)


@dataclasses.dataclass(frozen=True)
class Wanted:
    urls: tuple[str, ...]
    path: str = "vision.safetensors"
    sha256: str = hashlib.sha256(CONTENT).hexdigest()
    bytes: int = len(CONTENT)


class Heard(Meter):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.places: list[int] = []

    def at(self, done: int) -> None:
        self.places.append(done)

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)


def right(cache: Cache) -> bool:
    """Is every file of the cache what its name says?"""
    return all(hashlib.sha256(e.path.read_bytes()).hexdigest() == e.sha256 for e in cache.entries())


def planned(*tricks: str):
    """These, one after the other; then the last for ever."""
    left = list(tricks)
    return lambda path: left.pop(0) if len(left) > 1 else left[0]
