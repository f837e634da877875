"""Bytes from an address, from a given position on: `https://`, `file://`, `hf://owner/name@revision/path`,
`gs://` and `s3://`.

Servers are strangers. Redirects are followed here, one by one, and never to another kind of address: from
https only to https, so that neither a file of this machine nor a plain connection can be put in the place of
what was asked for. Plain http is refused, because it tells everyone on the way what is fetched; a caller may
name hosts (`Patience.plain_hosts`) that are spoken to all the same, as the tests do with this machine's own.
"""

import contextlib
import http.client
import os
import re
import socket
import stat
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import mplug2
from mplug2.errors import DownloadError

SCHEMES = ("https://", "file://", "hf://", "gs://", "s3://")
_MOST_REDIRECTS = 5
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # "not now"
_DRIVERS = {"gs": "gcsfs", "s3": "s3fs"}


@dataclass(frozen=True)
class Patience:
    """How long to try. Seconds; `attempts`: how many in a row may bring nothing worth mentioning; `backoff`:
    the wait after the first of them, doubled after each further one up to `longest_wait`, which also bounds
    what a server may ask for; a connection that brings less than `slowest` bytes a second for `stall` seconds
    is given up."""

    attempts: int = 5
    stall: float = 30.0
    slowest: float = 200.0
    backoff: float = 1.0
    longest_wait: float = 60.0
    plain_hosts: frozenset[str] = frozenset()


class Refused(DownloadError):
    """This address will not give the file, however often it is asked."""


class Failed(DownloadError):
    """It did not work this time; `after`: the seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class Unresumable(Failed):
    """What has come so far is of no use: begin at the first byte."""

    def __init__(self, reason: str):
        super().__init__(reason, after=0.0)


@dataclass(frozen=True)
class Stream:
    """An answer: bytes from position `start` on, of a file of `length` bytes (None: not said). `validator`
    changes when the file does ("": there is none). `read(n)` gives at most n bytes, none at the end; it
    raises Failed."""

    start: int
    length: int | None
    validator: str
    read: Callable[[int], bytes]


@contextlib.contextmanager
def open_at(url: str, start: int, validator: str, patience: Patience) -> Iterator[Stream]:
    """The content of `url`, from byte `start` on if it still is what `validator` says, else from the first
    one (`Stream.start` tells). Raises Refused, Failed, or Unresumable if the answer does not continue what
    was there."""
    scheme = url.partition("://")[0]
    with contextlib.ExitStack() as stack:
        with _explained():
            if scheme == "file":
                opened = _open_file(url, start, validator)
            elif scheme in _DRIVERS:
                opened = _open_object(url, scheme, start, validator)
            elif scheme == "hf":
                opened = _open_http(*hub_address(url), start, validator, patience)
            else:
                opened = _open_http(url, None, start, validator, patience)
            stream = stack.enter_context(opened)

        def read(size: int) -> bytes:
            with _explained():
                return stream.read(size)

        yield replace(stream, read=read)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What a connection or a file raises, as one of ours; not around the caller's own block, whose errors are
    its own."""
    try:
        yield
    except (http.client.IncompleteRead, ConnectionError, TimeoutError) as error:
        raise Failed(f"the connection broke ({_said(error)})") from None
    except http.client.HTTPException as error:
        raise Failed(f"not an answer of HTTP ({_said(error)})") from None
    except (OSError, ValueError) as error:
        raise Failed(_said(error)) from None


# --- This machine


@contextlib.contextmanager
def _open_file(url: str, start: int, validator: str) -> Iterator[Stream]:
    parts = urllib.parse.urlsplit(url)
    path = Path(urllib.parse.unquote(parts.path))
    if parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise Refused("a file:// address has three slashes and an absolute path")
    try:
        if not path.is_file():  # before it is opened: a pipe would wait for its writer
            raise Refused("there is no such file")
        file = path.open("rb")
    except OSError as error:
        raise Refused(_said(error)) from None
    with file:
        there = os.fstat(file.fileno())
        if not stat.S_ISREG(there.st_mode):
            raise Refused("not a regular file")
        now = f"{there.st_ino}-{there.st_size}-{there.st_mtime_ns}"
        start = start if validator == now else 0
        file.seek(start)
        yield Stream(start, there.st_size, now, file.read)


# --- HTTP


def hub_address(url: str) -> tuple[str, str | None]:
    """`hf://owner/name@revision/path` -> (address of the file, the user's token if there is one). Raises
    Refused."""
    repository, revision, path = split_hub(url)
    if not path:
        raise Refused(f'"{url}" names no file; the form is hf://owner/name@revision/path')
    import huggingface_hub  # a second of import, that only these addresses cost

    try:
        address = huggingface_hub.hf_hub_url(repository, path, revision=revision or None)
    except ValueError as error:  # a name that the Hub would not have
        raise Refused(_said(error)) from None
    return address, huggingface_hub.get_token()


def split_hub(url: str) -> tuple[str, str, str]:
    """`hf://owner/name[@revision][/path]` -> (owner/name, revision, path). Raises Refused."""
    part = r"[A-Za-z0-9][\w.-]*"
    match = re.fullmatch(rf"hf://({part}/{part})(?:@([\w.-]+))?(?:/(.+))?", url, re.ASCII)
    if match is None or ".." in url:
        raise Refused(f'"{url}" is not of the form hf://owner/name@revision/path')
    repository, revision, path = match.groups(default="")
    return repository, revision, path


@contextlib.contextmanager
def _open_http(
    url: str, token: str | None, start: int, validator: str, patience: Patience
) -> Iterator[Stream]:
    response = _answered(url, token, start, validator, patience)
    with response:
        yield _stream(response, start, validator, patience)


def _answered(url: str, token: str | None, start: int, validator: str, patience: Patience) -> Any:
    """The first answer that is not a redirect."""
    home = urllib.parse.urlsplit(url)
    _allowed(url, home.scheme, patience)
    for _ in range(_MOST_REDIRECTS + 1):
        headers = {"User-Agent": f"mplug2/{mplug2.__version__}", "Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": validator}
        there = urllib.parse.urlsplit(url)
        if token and there.netloc == home.netloc:  # a token is nobody's business but its own host's
            headers["Authorization"] = f"Bearer {token}"
        request = urllib.request.Request(url, headers=headers)
        response: Any = _opener(plain=there.hostname in patience.plain_hosts).open(
            request, timeout=patience.stall
        )
        if response.status not in (301, 302, 303, 307, 308):
            return response
        response.close()
        url = urllib.parse.urljoin(url, response.headers.get("Location") or "")
        _allowed(url, there.scheme, patience, redirected=True)
    raise Refused(f"more than {_MOST_REDIRECTS} redirects")


def _allowed(url: str, scheme: str, patience: Patience, redirected: bool = False) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise Refused(f"not an address ({error})") from None
    plain = parts.scheme == "http" and scheme == "http" and host in patience.plain_hosts
    if not host or (parts.scheme != "https" and not plain):
        said = f"redirects to {url[:200]!r}" if redirected else f"is a {parts.scheme or 'nameless'} address"
        raise Refused(f"{said}; addresses of files begin with {', '.join(SCHEMES)}")


class _BoundedHead(http.client.HTTPConnection):
    """Is given up where the head of an answer is not whole within `timeout`, which else bounds the wait for
    each byte only."""

    def getresponse(self) -> http.client.HTTPResponse:
        late = threading.Event()

        def hang_up() -> None:
            late.set()
            with contextlib.suppress(OSError):  # it hung up itself
                connection.shutdown(socket.SHUT_RDWR)

        connection = self.sock
        timer = threading.Timer(self.timeout or 0, hang_up)
        timer.start()
        response: http.client.HTTPResponse | None = None
        try:
            response = super().getresponse()
            return response
        finally:
            timer.cancel()
            if late.is_set():  # whatever else that led to
                if response is not None:  # a head that is cut may pass for a whole one
                    response.close()
                raise TimeoutError(f"no whole answer in {self.timeout:g} s")


class _SecureBoundedHead(_BoundedHead, http.client.HTTPSConnection):
    pass


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_BoundedHead, req)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureBoundedHead, req)


def _opener(plain: bool) -> urllib.request.OpenerDirector:
    """Speaks HTTP and nothing else, takes every status for an answer, and follows nothing."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler({} if plain else None), _Plain(), _Secure()):
        opener.add_handler(handler)
    return opener


def _stream(response: Any, start: int, validator: str, patience: Patience) -> Stream:
    status, headers = response.status, response.headers
    said = f"answers {status} {response.reason}".strip()
    if status in _PASSING:
        raise Failed(said, _seconds(headers.get("Retry-After")))
    if status == 416:
        raise Unresumable(f"{said} to a request for bytes from {start} on")
    if status not in (200, 206):
        raise Refused(said)
    if (coding := headers.get("Content-Encoding", "identity")) != "identity":
        raise Refused(f"sends the file in another coding, {coding}")
    # A weak tag says "about the same", which is not enough to glue two halves together.
    tag = headers.get("ETag", "")
    now = tag if tag.startswith('"') else headers.get("Last-Modified", "")
    if status == 200:
        length = headers.get("Content-Length")
        whole = int(length) if length is not None and length.isdecimal() and len(length) < 20 else None
        return Stream(0, whole, now, _watched(response.read1, patience))
    said = headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", said.strip(), re.ASCII)
    if match is None or not start or int(match[1]) != start or int(match[2]) >= int(match[3]):
        raise Unresumable(f'answers 206 with "{said[:80]}" to a request for bytes from {start} on')
    if now != validator or not now:
        raise Unresumable("the file has changed since its first part came")
    return Stream(start, int(match[3]), now, _watched(response.read1, patience))


def _watched(read: Callable[[int], bytes], patience: Patience) -> Callable[[int], bytes]:
    """`read`, given up when it is too slow: a server that sends a byte now and then never times out."""
    began, came = time.monotonic(), 0

    def watched(size: int) -> bytes:
        nonlocal began, came
        piece = read(size)
        came += len(piece)
        if (passed := time.monotonic() - began) > patience.stall:
            if came < patience.slowest * passed:
                raise Failed(f"too slow: {came} bytes in {passed:.0f} s")
            began, came = time.monotonic(), 0
        return piece

    return watched


def _seconds(after: str | None) -> float | None:
    """Of a Retry-After header, which is a number of seconds or a date."""
    if after is None:
        return None
    if after.strip().isdecimal():
        return float(after.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


# --- Object stores


@contextlib.contextmanager
def _open_object(url: str, scheme: str, start: int, validator: str) -> Iterator[Stream]:
    import fsspec

    try:
        store, path = fsspec.core.url_to_fs(url)
    except ImportError:
        raise Refused(f"{scheme}:// needs the package {_DRIVERS[scheme]}") from None
    try:
        length, now = store.size(path), str(store.ukey(path))
        file = store.open(path, "rb")
    except FileNotFoundError:
        raise Refused("there is no such object") from None
    except PermissionError as error:
        raise Refused(_said(error)) from None
    except Exception as error:  # of whichever driver it is
        raise Failed(_said(error)) from None
    with file:
        start = start if validator == now else 0
        file.seek(start)

        def read(size: int) -> bytes:
            try:
                return file.read(size)
            except Exception as error:  # of whichever driver it is
                raise Failed(_said(error)) from None

        yield Stream(start, length, now, read)


def _said(error: BaseException) -> str:
    reason = getattr(error, "reason", None)  # of urllib, which wraps what happened
    if isinstance(reason, BaseException):
        return _said(reason)
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
