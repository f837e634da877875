"""A folder that is held open: the same one whatever its name means to a library, and wherever it is moved.

A path is a sentence that others read: TensorStore takes `[`, `%` and `?` in it for the syntax of an address,
tensorboardX takes `gs:` for a bucket. And it says where to look, not what was found there: once a folder is
moved, the same path makes a second one. So whoever writes into a run gets `path`, which on Linux names the
open folder itself; people are told `name`.
"""

import fcntl
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mplug2 import processes
from mplug2.errors import CheckpointError, cause

DESCRIPTORS = Path("/proc/self/fd")
"""Where Linux has the open files of a process, by number; a folder there is followed wherever it goes."""

PLAIN = re.compile(r"[\w./+=@,~-]*", re.ASCII)
"""Paths that mean the same to everybody, for systems without DESCRIPTORS."""


class OpenFolder:
    """The folder `given`, once it is opened. It stays open as long as somebody holds this."""

    def __init__(self, given: Path | str):
        self.given = Path(given)
        self._absolute = self.given.absolute()  # the working directory may change
        self._descriptor: int | None = None

    def open(self) -> "OpenFolder":
        """Opens the folder if that has not been done; all processes call it. Raises CheckpointError."""
        if self._descriptor is not None:
            return self
        mine, failure = -1, ""
        try:
            mine = os.open(self._absolute, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            failure = f"{self.given} cannot be opened: {cause(error)}"
        if failures := [one for one in processes.exchange(failure) if one]:
            raise CheckpointError(failures[0])
        told = processes.exchange(mine)
        while len(set(told)) > 1:  # Orbax wants the same path in all processes
            if mine < max(told):
                first, mine = mine, fcntl.fcntl(mine, fcntl.F_DUPFD_CLOEXEC, max(told))
                os.close(first)
            told = processes.exchange(mine)
        self._descriptor = mine
        weakref.finalize(self, os.close, mine)
        return self

    @property
    def path(self) -> Path:
        """What to hand to whoever reads or writes there. Raises CheckpointError for a name that could be
        taken for something else, where the system has no way around names."""
        if self._descriptor is None:
            return self._absolute
        itself = DESCRIPTORS / str(self._descriptor)
        if self._is(itself):
            return itself
        if not PLAIN.fullmatch(str(self._absolute)):
            raise CheckpointError(
                f"{self.given}: this system cannot keep a run in a folder of that name: give one whose path "
                "has letters, digits and -_.+=@,~ only"
            )
        return self._absolute

    @property
    def name(self) -> Path:
        """Where the folder is now, as far as that can be told."""
        if self._descriptor is None or self._is(self._absolute):
            return self.given
        try:
            now = Path(os.readlink(DESCRIPTORS / str(self._descriptor)))
        except OSError:
            return self.given
        return now if self._is(now) else self.given

    @property
    def moved(self) -> bool:
        """Whether the folder is no longer where it was opened."""
        return not self._is(self._absolute)

    def check(self) -> None:
        """Raises CheckpointError if the folder was removed, or is moved out of reach."""
        assert self._descriptor is not None
        if not self.moved:
            return
        try:
            gone = os.fstat(self._descriptor).st_nlink == 0
        except OSError:  # on a network file system: a stale handle
            gone = True
        if gone or not self._is(DESCRIPTORS / str(self._descriptor)):
            what = "removed" if gone else "moved away"
            raise CheckpointError(
                f"run directory {self.given} was {what} while it was trained in: nothing more can be kept "
                "there"
            )

    def told(self, text: str) -> str:
        """`text`, which may name `path`, for people."""
        return text.replace(str(self.path), str(self.name))

    @contextmanager
    def written(self) -> Iterator[None]:
        """An OSError in the block becomes a CheckpointError that names the file."""
        try:
            yield
        except OSError as error:
            file = self.told(str(error.filename or self.path))
            raise CheckpointError(f"{file} cannot be read or written: {self.why(error)}") from error

    def why(self, error: BaseException) -> str:
        """The cause of a failed write there."""
        said = self.told(cause(error))
        try:
            room = os.statvfs(self.path)
        except OSError:
            return said
        if room.f_files and not room.f_favail:  # some file systems count none
            return f"{said}: there are no inodes left for new files"
        return said

    def _is(self, path: Path) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except (OSError, ValueError):
            return False
