"""The cache of downloaded files: one folder, shared by all processes of a user, in which a file's name is the
sha256 of its content.

    files/ab/abcd...        whole files, read-only; beside each, a note (.json) of its name and address
    partial/abcd...         what has come so far of a file, and its note
    pins/name.json          of a file that is known by name only: the sha256 and size that it first came with
    locks/abcd...           empty; who downloads the file holds a lock (flock), which ends with the process
    compiled/               JAX's own: what XLA compiled for commands (tools/main.py)

The folder is `MPLUG2_CACHE`, or `mplug2` in the user's cache folder. Nothing gets into files/ but by one move
of a file whose content has been verified.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplug2 import files
from mplug2.errors import DownloadError

UNUSED_DAYS = 30
_LARGEST_NOTE = 1_000_000  # bytes; a real one has about 200


@dataclass(frozen=True)
class Entry:
    """A file of the cache: `name` is what its card called it, `used` when it was last asked for (seconds of
    the epoch)."""

    sha256: str
    name: str
    bytes: int
    used: float
    path: Path


@dataclass(frozen=True)
class Cache:
    """A cache in `folder`, which need not be there yet."""

    folder: Path

    @classmethod
    def default(cls) -> "Cache":
        """In the user's own folder."""
        return cls(files.cache_folder())

    @property
    def whole(self) -> Path:
        """The folder of whole files, which nobody writes into: what is mapped from there stays what it is."""
        return self.folder / "files"

    def path(self, sha256: str) -> Path:
        """Where the file of that content is, or would be."""
        return self.whole / sha256[:2] / sha256

    def partial(self, sha256: str) -> Path:
        return self.folder / "partial" / sha256

    def find(self, sha256: str, size: int) -> Path | None:
        """The file of that content, if it is here and has `size` bytes. Its content was verified when it
        came; whoever loads it verifies it again."""
        path = self.path(sha256)
        try:
            there = path.stat()
        except OSError:
            return None
        if not stat.S_ISREG(there.st_mode) or there.st_size != size:
            return None
        with contextlib.suppress(OSError):  # a cache that others own is used all the same
            os.utime(path)
        return path

    @contextlib.contextmanager
    def locked(self, sha256: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """While it is entered, no other process or thread downloads or removes that file; `waiting` is called
        if one does now. Raises DownloadError where the folder cannot be written."""
        with self._explained():
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "locks" / sha256, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)  # and with it the lock

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DownloadError(
                f"the cache {self.folder} cannot be written ({error.strerror or error}); "
                f"{files.CACHE} names another"
            ) from None

    def keep(self, sha256: str, come_as: str = "") -> Path:
        """Moves a partial file, which must be whole and verified, to its place; `come_as`: the name that it
        came under, while its sha256 was not known. Raises OSError."""
        partial, path = self.partial(come_as or sha256), self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("rb") as file:
            os.fchmod(file.fileno(), 0o444)  # what others have mapped is not to be edited
            os.fsync(file.fileno())
        os.replace(partial, path)
        with contextlib.suppress(FileNotFoundError):
            os.replace(_note(partial), _note(path))
        return path

    def drop(self, sha256: str) -> None:
        """Removes a file that is not what it should be. Raises DownloadError."""
        with self.locked(sha256), self._explained():
            _remove(self.path(sha256))

    def pin(self, name: str, value: dict[str, Any]) -> None:
        """Records the file that is to be taken for `name` from now on. Raises OSError."""
        files.write_text(self.pin_path(name), json.dumps(value, indent=1) + "\n")

    def pinned(self, name: str) -> dict[str, Any]:
        """What was recorded; empty if nothing was. Raises DownloadError for a record that cannot be read:
        what it says must not be forgotten unnoticed."""
        path = self.pin_path(name)
        if not path.exists():
            return {}
        value = _read_json(path)
        if not _is_hash(str(value.get("sha256"))) or type(value.get("bytes")) is not int:
            raise DownloadError(f"{path}: does not say what was taken for {name}; remove it to take any")
        return value

    def pins(self) -> dict[str, str]:
        """The sha256 that is taken for each name. Raises DownloadError as `pinned` does."""
        names = sorted(path.stem for path in (self.folder / "pins").glob("*.json"))
        return {name: self.pinned(name)["sha256"] for name in names}

    def pin_path(self, name: str) -> Path:
        """Where it is recorded, or would be."""
        return self.folder / "pins" / f"{name}.json"

    def note(self, sha256: str, value: dict[str, Any]) -> None:
        """Writes what is known of a partial file. Raises OSError."""
        files.write_text(_note(self.partial(sha256)), json.dumps(value))

    def noted(self, sha256: str) -> dict[str, Any]:
        """What is known of a partial file; empty if nothing is, or it cannot be read."""
        return _read_note(self.partial(sha256))

    def entries(self) -> list[Entry]:
        """The whole files, the one used last first."""
        found = []
        for path in self.folder.glob("files/??/*"):
            with contextlib.suppress(OSError):  # pruned a moment ago
                if _is_hash(path.name):
                    there, name = path.stat(), str(_read_note(path).get("name", "?"))
                    found.append(Entry(path.name, name, there.st_size, there.st_mtime, path))
        return sorted(found, key=lambda entry: -entry.used)

    def verify(self) -> Iterator[tuple[Entry, bool]]:
        """Reads every file: (entry, is it what its name says?). One that is not is removed. Raises
        DownloadError for one that cannot be read or removed."""
        for entry in self.entries():
            with self.locked(entry.sha256):
                try:
                    with entry.path.open("rb") as file:
                        right = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise DownloadError(f"{entry.path}: cannot be read ({error.strerror or error})") from None
                if not right:
                    with self._explained():
                        _remove(entry.path)
            yield entry, right

    def prune(self, days: float = UNUSED_DAYS) -> list[Entry]:
        """Removes files that nobody asked for in so many days, and what is left of broken downloads; returns
        what it removed. A file that is being downloaded stays. Raises DownloadError."""
        before, removed = time.time() - days * 86400, []
        for entry in self.entries():
            if entry.used >= before:
                continue
            with self.locked(entry.sha256), self._explained():
                with contextlib.suppress(FileNotFoundError):
                    if entry.path.stat().st_mtime < before:  # still: somebody may have asked for it since
                        _remove(entry.path)
                        removed.append(entry)
        begun = {path.name.removesuffix(".json") for path in self.folder.glob("partial/*")}
        for sha256 in sorted(filter(_is_hash, begun)):
            if self._busy(sha256):
                continue
            with self.locked(sha256), self._explained():
                path, name = self.partial(sha256), str(self.noted(sha256).get("name", "?"))
                with contextlib.suppress(FileNotFoundError):
                    there = path.stat()
                    removed.append(Entry(sha256, f"{name} (in part)", there.st_size, there.st_mtime, path))
                _remove(path)
        return removed

    def _busy(self, sha256: str) -> bool:
        """Is the file being downloaded now?"""
        try:
            descriptor = os.open(self.folder / "locks" / sha256, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_note(path: Path) -> dict[str, Any]:
    return _read_json(_note(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(files.read_regular(path, _LARGEST_NOTE))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _remove(path: Path) -> None:
    for one in (path, _note(path)):
        one.unlink(missing_ok=True)


def _is_hash(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")
