"""The one door for files that people hand over: pictures, videos and annotations are regular files, opened
without waiting (mplug2.files). A refusal is a DataError that says what the file was to be."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mplug2 import files
from mplug2.errors import DataError


@contextmanager
def opened(path: str | Path, what: str = "") -> Iterator[IO[bytes]]:
    """The regular file at `path`, a `what` such as "the picture", for reading. Raises DataError naming it if
    it is missing, may not be read, or is anything but a regular file."""
    named = f"{what} {path}" if what else str(path)
    try:
        file = files.open_regular(Path(path))
    except OSError as error:
        raise DataError(f"cannot read {named}: {error.strerror or error}") from None
    except ValueError as error:  # a name that no file can have, such as one with a NUL
        raise DataError(f"cannot read {named!r}: {error}") from None
    with file:
        yield file


def reason(error: BaseException) -> str:
    """What a decoder's error says, as the end of a sentence; some say nothing but their name."""
    said = getattr(error, "strerror", None) or str(error)
    return said or type(error).__name__
