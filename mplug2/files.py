"""Files that are written whole or not at all: whatever happens, a reader finds the old one or the new one;
and the folder of files that can be had again."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mplug2.errors import DownloadError

CACHE = "MPLUG2_CACHE"


def cache_folder() -> Path:
    """Where the user, or else the platform, keeps what can be had again: the variable CACHE names another.
    Raises DownloadError where there is none."""
    said = os.environ.get(CACHE, "")
    try:
        if said:
            folder = Path(said).expanduser()
        elif sys.platform == "darwin":
            folder = Path.home() / "Library" / "Caches" / "mplug2"
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mplug2"
    except RuntimeError:  # no HOME, and a user whom no file knows
        raise DownloadError(
            f"there is no folder for the cache: name one by {CACHE} (it is {said!r})"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise DownloadError(f"{folder} is a file, expected a folder for the cache: {CACHE} names another")
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends well, and leaves nothing behind when
    not. Makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # a temporary file is its owner's alone, a published one is not
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, survives a loss of power
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_unfinished(path: Path) -> None:
    """Removes what a process that was killed within `replacing(path)` left beside it. Raises OSError."""
    for beside in path.parent.iterdir() if path.parent.is_dir() else ():
        if beside.name.startswith(_prefix(path)):
            beside.unlink()


def _prefix(path: Path) -> str:
    return f".{path.name}."


def write_text(path: Path, text: str) -> None:
    """The file `path` with `text` in UTF-8. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())
