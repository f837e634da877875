"""Files that are written whole or not at all: whatever happens, a reader finds the old one or the new one;
and the folder of files that can be had again.

No file is ever written in place: what another process has open or mapped keeps its bytes.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mplug2.errors import DownloadError, Mplug2Error

CACHE = "MPLUG2_CACHE"
_PATIENCE = 60.0  # seconds; a folder is locked for as long as some renames take


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


# --- Reading


def open_regular(path: Path) -> IO[bytes]:
    """A regular file, open to read. Raises OSError, without waiting, for whatever else has that name: a named
    pipe would be waited for, and a device has no end."""
    _check_regular(path, os.stat(path).st_mode)  # some devices do something when they are opened
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes. Raises OSError."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"longer than {most} bytes", str(path))
    return content


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a regular file", str(path))


# --- Writing


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends well, and leaves nothing behind when
    not. Makes the folder. Raises OSError that names `path`; so it does where that is no regular file: a
    device is not replaced."""
    temporary = None
    try:
        with contextlib.suppress(FileNotFoundError):
            _check_regular(path, os.stat(path).st_mode)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o644)  # a temporary file is its owner's alone, a published one is not
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
        sync(path.parent)  # the new name, too, survives a loss of power
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        # What fills a disk is seldom named: `write` and `fsync` know no path.
        if isinstance(error, OSError) and error.filename in (None, temporary):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        raise


def sync(folder: Path) -> None:
    """Returns when the names in a folder are on the disk. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def copy(source: Path, path: Path) -> None:
    """The file `path` with the content of another. Raises OSError that names the one at fault."""
    with open_regular(source) as content, replacing(path) as file:
        shutil.copyfileobj(content, file, 1 << 20)


@contextmanager
def refusing(kind: type[Mplug2Error], place: Path) -> Iterator[None]:
    """Raises `kind` for an OSError: which file cannot be written (`place` where the system names none), and
    why."""
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or place}: cannot be written ({error.strerror or error})") from None


# --- Folders


def is_free(folder: Path) -> bool:
    """Is nothing there, or an empty folder?"""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder` when the block ends well and is gone when not: one rename.
    Raises OSError; FileExistsError unless `folder` is free."""
    if not is_free(folder):
        raise FileExistsError(errno.EEXIST, "is there already", str(folder))
    real = Path(os.path.realpath(folder))
    real.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=real.parent, prefix=_prefix(real)))
    try:
        with named(beside, folder):
            yield beside
            beside.chmod(0o755)  # a temporary folder is its owner's alone, a written one is not
            sync(beside)
            _become(beside, real)
            sync(real.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _become(beside: Path, folder: Path) -> None:
    try:
        if folder != Path.cwd():  # who stands in a folder that is replaced stands nowhere
            os.replace(beside, folder)
            return
    except OSError as error:
        if error.errno != errno.EBUSY:  # a mount point cannot be replaced either
            raise
    # What says that the others are there (a lock, a card) comes last.
    for path in sorted(beside.iterdir(), key=lambda path: (path.name == "lock.json", path.suffix == ".json")):
        os.replace(path, folder / path.name)


@contextmanager
def named(place: Path, other: Path) -> Iterator[None]:
    """A refusal that names a file below `place` names that below `other` instead: people know nothing of
    temporary folders."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(place), str(other))
        raise
    except Mplug2Error as error:
        if str(place) not in str(error):
            raise
        raise type(error)(str(error).replace(str(place), str(other))) from None


@contextmanager
def locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """While it is entered, readers wait for the one who changes what is in `folder`, and that one for all
    others. It ends with the process. Where the file system knows no such locks, or the folder is not there,
    nobody waits. Raises TimeoutError after a minute."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        _wait(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, folder)
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def _wait(descriptor: int, kind: int, folder: Path) -> None:
    until, pause = time.monotonic() + _PATIENCE, 0.0005
    while True:
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds it", str(folder)) from None
        except OSError:
            return
        time.sleep(pause)
        pause = min(0.05, 2 * pause)
