"""The one door for files that people hand over: pictures, videos and annotations are regular files, opened
without waiting. A pipe, a device or a socket would be waited for, or read for ever."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mplug2.errors import DataError

_OTHERS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextmanager
def opened(path: str | Path, what: str = "") -> Iterator[BinaryIO]:
    """The regular file at `path`, a `what` such as "the picture", for reading. Raises DataError naming it if
    it is missing, may not be read, or is anything but a regular file."""
    named = f"{what} {path}" if what else str(path)
    try:
        _check(os.stat(path), named)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DataError(f"cannot read {named}: {error.strerror or error}") from None
    except ValueError as error:  # a name that no file can have, such as one with a NUL
        raise DataError(f"cannot read {named!r}: {error}") from None
    with os.fdopen(descriptor, "rb") as file:
        _check(os.fstat(descriptor), named)  # again: another may have taken its place meanwhile
        yield file


def _check(found: os.stat_result, named: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _OTHERS if is_kind(found.st_mode)), "something else")
        raise DataError(f"cannot read {named}: it is {kind}, and only regular files are read")


def reason(error: BaseException) -> str:
    """What a decoder's error says, as the end of a sentence; some say nothing but their name."""
    said = getattr(error, "strerror", None) or str(error)
    return said or type(error).__name__
