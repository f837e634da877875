"""Downloads: a file into the cache, from the first of its addresses that gives it, verified while it comes.

    fetch(card.file)     -> the path of a file with that sha256, downloaded if it is not here yet

Processes that want one file download it once. What has come when a connection breaks, or a process dies, is
continued by range, if the server shows that the file is still the same; else it begins again. Never more than
the stated number of bytes is read. Without a network: `MPLUG2_OFFLINE=1` refuses at once and says where the
file would have to be.
"""

import contextlib
import hashlib
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from mplug2.errors import CheckpointError, DownloadError
from mplug2.hub import remote
from mplug2.hub.cache import Cache
from mplug2.hub.meter import Meter
from mplug2.hub.remote import Failed, Patience, Refused, Unresumable

OFFLINE = "MPLUG2_OFFLINE"
_PIECE = 1 << 20


class Wanted(Protocol):
    """What is fetched (mplug2.hub.card.File is one): the name that people know it by, its content, its
    addresses."""

    @property
    def path(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def urls(self) -> tuple[str, ...]: ...


def fetch(
    file: Wanted, cache: Cache | None = None, *, patience: Patience = Patience(), meter: Meter | None = None
) -> Path:
    """The path of the file in the cache (default: the user's). Raises DownloadError that names every address
    and what it did."""
    cache, meter = cache or Cache.default(), meter or Meter()
    if found := cache.find(file.sha256, file.bytes):
        return found
    place = f"{described(file)} is not at {cache.path(file.sha256)}"
    if offline():
        raise DownloadError(f"{OFFLINE} is set and {place}; put it there, or unset {OFFLINE}")
    if not file.urls:
        raise DownloadError(f"{place}, and its card gives no address to download it from")
    waiting = f"{file.path}: waiting for another process that downloads it"
    with cache.locked(file.sha256, lambda: meter.say(waiting)):
        if found := cache.find(file.sha256, file.bytes):
            return found
        try:
            with _Download(file, cache, patience, meter).opened() as download:
                download.run()
            return cache.keep(file.sha256)
        except OSError as error:
            raise _unwritable(described(file), cache, error) from None


@dataclass(frozen=True)
class _First:
    """A file whose content nobody stated. `sha256` is only what its download is called in the cache."""

    path: str
    sha256: str
    urls: tuple[str, ...]
    bytes: int = 0


@contextlib.contextmanager
def fetched_first(
    path: str,
    urls: tuple[str, ...],
    name: str,
    cache: Cache,
    *,
    patience: Patience = Patience(),
    meter: Meter | None = None,
) -> Iterator[dict[str, Any]]:
    """Gives the sha256, size and address of a file that `name` is known by, downloaded now if its content is
    not known yet. The block looks whether it is what it should be: recorded as what `name` is from now on is
    what came when the block has ended well; CheckpointError says that it is not, and it is removed. Raises
    DownloadError."""
    meter = meter or Meter()
    key = hashlib.sha256(f"{name} {path}".encode()).hexdigest()
    with cache.locked(key, lambda: meter.say(f"{path}: waiting for another process that downloads it")):
        if found := cache.pinned(name):
            yield found
            return
        if offline():
            raise DownloadError(f"{OFFLINE} is set and {path} was never downloaded; unset {OFFLINE}")
        try:
            with _FirstDownload(_First(path, key, urls), cache, patience, meter).opened() as download:
                download.run()
            known = {
                "sha256": download.digest.hexdigest(),
                "bytes": download.done,
                "url": download.note["url"],
            }
            cache.keep(known["sha256"], come_as=key)
        except OSError as error:
            raise _unwritable(path, cache, error) from None
        try:
            yield known
        except CheckpointError as error:
            cache.drop(known["sha256"])
            raise CheckpointError(f"{error}; what came from {known['url']} is not believed") from None
        cache.pin(name, known)


def offline() -> bool:
    """Has the user forbidden the network?"""
    return os.environ.get(OFFLINE, "") not in ("", "0")


def described(file: Wanted) -> str:
    return f"{file.path} (sha256 {file.sha256}, {file.bytes} bytes)"


def _unwritable(what: str, cache: Cache, error: OSError) -> DownloadError:
    return DownloadError(f"{what} cannot be written to {cache.folder} ({error.strerror or error})")


class _Download:
    """One file on its way into the cache: `done` of its `size` bytes are in the partial file and in
    `digest`."""

    def __init__(self, file: Wanted, cache: Cache, patience: Patience, meter: Meter):
        self.file, self.cache, self.patience, self.meter = file, cache, patience, meter
        self.size = file.bytes
        self.done, self.digest = 0, hashlib.sha256()
        self.glued = False  # of more than one answer
        self.note: dict[str, Any] = {}
        self.out: IO[bytes]

    @contextlib.contextmanager
    def opened(self) -> Iterator["_Download"]:
        """Takes up what an earlier process has left."""
        path = self.cache.partial(self.file.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with path.open("r+b", buffering=0) as self.out:
            if 0 < path.stat().st_size <= self.size:
                self.note = self.cache.noted(self.file.sha256)
                self.digest = hashlib.file_digest(self.out, "sha256")  # pyright: ignore[reportArgumentType]
                self.done, self.glued = self.out.tell(), True
            else:
                self._begin()
            yield self

    def run(self) -> None:
        """Until the file is whole and right. Raises DownloadError, OSError."""
        if self.done == self.size and self.digest.hexdigest() == self.file.sha256:
            return  # killed between the last byte and the move
        self._announce()
        self._try_each()

    def _announce(self) -> None:
        free = shutil.disk_usage(self.cache.folder).free
        if free < self.size - self.done:
            raise DownloadError(
                f"{self.file.path}, of {self.size} bytes: the disk of {self.cache.folder} has "
                f"{free / 1e6:.0f} MB left"
            )
        self.meter.begin(self.file.path, self.size)

    def _try_each(self) -> None:
        told = []
        for url in self.file.urls:
            try:
                return self._all_of(url)
            except Refused as refusal:
                told.append(f"{url}: {refusal}")
                self.meter.say(told[-1])
        raise DownloadError(self._failed("; ".join(told)))

    def _failed(self, told: str) -> str:
        return (
            f"{described(self.file)} could not be downloaded: {told}; "
            f"a file that comes another way belongs at {self.cache.path(self.file.sha256)}"
        )

    def _all_of(self, url: str) -> None:
        """Attempts at one address, as long as they get on. Raises Refused."""
        idle, best, patience = 0, self.done, self.patience
        while True:
            try:
                return self._attempt(url)
            except Failed as failure:
                worth = max(1, self.size // 100)  # so that a trickle of bytes is not tried for ever
                # Further than ever before: else a server that makes us begin again and again gets on.
                idle = 0 if self.done - best >= worth else idle + 1
                best = max(best, self.done)
                if idle >= patience.attempts:
                    raise Refused(f"{failure} ({idle} times in a row)") from None
                backoff = min(patience.longest_wait, patience.backoff * 2 ** max(0, idle - 1))
                wait = backoff * random.uniform(0.5, 1) if failure.after is None else failure.after
                if wait > patience.longest_wait:
                    raise Refused(f"{failure}, and asks to wait {wait:.0f} s") from None
                if wait >= 1:
                    self.meter.say(f"{url}: {failure}; again in {wait:.0f} s")
                time.sleep(wait)

    def _attempt(self, url: str) -> None:
        """One request. Raises Refused, Failed, OSError of the disk."""
        validator = str(self.note.get("validator", ""))
        if self.note.get("url") != url or not validator or self.done == self.size:
            self._begin()
        try:
            with remote.open_at(url, self.done, validator if self.done else "", self.patience) as stream:
                if stream.length not in (None, self.size):
                    raise Refused(f"has {stream.length} bytes, expected {self.size}")
                if stream.start != self.done:
                    self._begin()
                self.glued = self.done > 0
                self._receive(stream, url)
        except Unresumable:
            self._begin()
            raise
        if (found := self.digest.hexdigest()) != self.file.sha256:
            reason = f"sent a file of sha256 {found}"
            glued = self.glued
            self._begin()
            raise Failed(reason) if glued else Refused(reason)

    def _receive(self, stream: remote.Stream, url: str) -> None:
        # Before the first byte, so that whoever takes up this file knows whose it is.
        self.note = {"name": self.file.path, "url": url, "validator": stream.validator}
        self.cache.note(self.file.sha256, self.note)
        self.meter.at(self.done)
        while self.done < self.size:
            piece = stream.read(min(_PIECE, self.size - self.done))
            if not piece:
                raise Failed(f"ended after {self.done} of {self.size} bytes")
            self.out.write(piece)
            self.digest.update(piece)
            self.done += len(piece)
            self.meter.at(self.done)

    def _begin(self) -> None:
        """Forgets what has come so far."""
        self.out.seek(0)
        self.out.truncate()
        self.done, self.digest, self.glued, self.note = 0, hashlib.sha256(), False, {}


class _FirstDownload(_Download):
    """Of a file that is as long as the answer says that brings it. All of it is from that one answer: nothing
    would tell that parts of two were glued wrongly."""

    def run(self) -> None:
        """Until a whole file came. Raises DownloadError, OSError."""
        self._try_each()

    def _failed(self, told: str) -> str:
        return f"{self.file.path} could not be downloaded: {told}"

    def _attempt(self, url: str) -> None:
        self._begin()
        with remote.open_at(url, 0, "", self.patience) as stream:
            if not stream.length:
                raise Refused("does not say how many bytes it has, so a part would look like the whole")
            if stream.length != self.size:
                self.size = stream.length
                self._announce()
            self._receive(stream, url)
