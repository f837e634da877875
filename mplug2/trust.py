"""Whose code a run's recipe file is: what this user made carries a mark that only this user can make.

A run of a recipe file holds Python. A folder may come from anybody, so the run carries an HMAC-SHA256 over
its sources, by a secret that lies in this user's cache folder (mplug2.files.cache_folder) and nowhere else.
Several users may share that folder: a secret that another one wrote, or can read or write, marks nothing.
"""

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mplug2.errors import CheckpointError
from mplug2.files import CACHE, cache_folder, open_regular

_BYTES = 32


def mark(facts: Mapping[str, object]) -> str:
    """The mark of what this user made. Raises CheckpointError where the secret can be neither read nor
    kept."""
    try:
        return _mark(_made_key(), facts)
    except OSError as error:
        raise CheckpointError(
            f"the secret that marks a run as this user's cannot be kept at {_path()} "
            f"({error.strerror or error}); {CACHE} names another folder"
        ) from None


def is_ours(facts: Mapping[str, object], marked: str) -> bool:
    """Whether this user made that mark, of these facts."""
    key = _read_key()
    if key is None:
        return False
    return hmac.compare_digest(_mark(key, facts).encode(), marked.encode(errors="replace"))


def _mark(key: bytes, facts: Mapping[str, object]) -> str:
    said = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, b"mplug2 run\n" + said.encode(), hashlib.sha256).hexdigest()


def _path() -> Path:
    return cache_folder() / "key"


def _read_key() -> bytes | None:
    try:
        with open_regular(_path()) as file:
            there, key = os.fstat(file.fileno()), file.read(_BYTES + 1)
    except OSError:
        return None
    return key if len(key) == _BYTES and _is_private(there) else None


def _is_private(there: os.stat_result) -> bool:
    return there.st_uid == os.geteuid() and not stat.S_IMODE(there.st_mode) & 0o077


def _made_key() -> bytes:
    """The secret; where there is none, a new one. Of two processes that make one, the first wins."""
    if key := _read_key():
        return key
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".key.")  # its owner's alone
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(descriptor)
        if path.is_file() and _read_key() is None:
            if path.stat().st_uid != os.geteuid():  # marks of theirs depend on it
                raise PermissionError(errno.EACCES, "another user's lies there")
            os.replace(temporary, path)  # one that was cut short, or that others could read
        else:
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    if (key := _read_key()) is None:
        raise PermissionError(errno.EACCES, "it is not this user's alone there, or cannot be read")
    return key
