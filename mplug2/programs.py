"""Compiled programs kept on disk for the next start, in the cache's folder: what is damaged there is compiled
again and replaced, and a folder that cannot be used costs time and one sentence, not the work.

JAX keeps them; it warns of an entry that it cannot read at every start, and leaves it there.
"""

import hashlib
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mplug2.files import cache_folder
from mplug2.screen import note

MARK = b"mplug2\x00"
"""Begins an entry that goes on with its sha256; entries without it are those of other programs."""

FUNCTIONS = (
    "compress_executable",
    "decompress_executable",
    "get_executable_and_time",
    "put_executable_and_time",
)
"""JAX's own, of no public interface: where one is missing all are left alone."""


def keep() -> None:
    """What XLA compiles is kept in the cache's folder (MPLUG2_CACHE) for the next start, unless JAX's own
    variables say another place or size, or JAX_ENABLE_COMPILATION_CACHE=false that it is not. JAX reads them
    as it starts."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "compiled" / processor()))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))


def processor() -> str:
    """A name for this kind of CPU: code for one may be none for another that shares the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    said = "\n".join([platform.machine(), platform.processor(), *sorted(told)])
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def mend() -> None:
    """From here on JAX's entries hold their sha256 and damaged ones are replaced. Once a process."""
    from jax._src import compilation_cache as jax_cache

    global _mended
    if _mended is None and all(hasattr(jax_cache, name) for name in FUNCTIONS):
        _mended = _Mended(*(getattr(jax_cache, name) for name in FUNCTIONS))
        own = (_mended.pack, _mended.unpack, _mended.get, _mended.put)
        for name, function in zip(FUNCTIONS, own, strict=True):
            setattr(jax_cache, name, function)


class _Mended:
    """JAX's four functions for the same purpose, around those given."""

    def __init__(self, pack: Callable, unpack: Callable, get: Callable, put: Callable):
        self._pack, self._unpack, self._get, self._put = pack, unpack, get, put
        self._usable, self._told = True, False

    def pack(self, program: bytes) -> bytes:
        packed = self._pack(program)
        return MARK + hashlib.sha256(packed).digest() + packed

    def unpack(self, entry: bytes) -> bytes:
        if not entry.startswith(MARK):
            return self._unpack(entry)
        said, packed = entry[len(MARK) : len(MARK) + 32], entry[len(MARK) + 32 :]
        if hashlib.sha256(packed).digest() != said:
            raise ValueError("its sha256 is another")
        return self._unpack(packed)

    def get(self, key: str, *rest: Any, **named: Any) -> tuple[Any, Any]:
        """The program of a key and its time; or twice None, and then the entry is gone."""
        if self._usable:
            try:
                return self._get(key, *rest, **named)
            except Exception as error:
                self._repair(_entry(key), error)
        return None, None

    def put(self, key: str, *rest: Any, **named: Any) -> None:
        """Once more where strays were in the way: to make room, JAX reads all entries."""
        for _ in range(2):
            if not self._usable:
                return
            try:
                return self._put(key, *rest, **named)
            except Exception as error:
                _clear(_entry(key))  # half a file, where the disk is full
                self._repair(_strays(), error)

    def _repair(self, damaged: list[Path], error: Exception) -> None:
        """Away with what is damaged; or with the cache, where it is not that."""
        if not _clear(damaged):
            self._usable = False
            reason = getattr(error, "strerror", None) or error
            note(f"warning: {_folder()}: compiled programs cannot be kept there, and cost time ({reason})")
        elif not self._told:
            self._told = True
            note(f"warning: {_folder()}: damaged programs are removed, and compiled again")


def _clear(paths: list[Path]) -> bool:
    """Whether there were any, and are no more."""
    there = [path for path in paths if os.path.lexists(path)]
    for path in there:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    return bool(there) and not any(map(os.path.lexists, there))


_mended: _Mended | None = None


def _folder() -> Path:
    import jax

    return Path(jax.config.jax_compilation_cache_dir or "")  # pyright: ignore[reportAttributeAccessIssue]


def _entry(key: str) -> list[Path]:
    """The files of an entry: the program, and when it was used last."""
    return [_folder() / f"{key}-cache", _folder() / f"{key}-atime"]


def _strays() -> list[Path]:
    """Files of entries of which one is missing or none."""
    keys = {path.name.rpartition("-")[0] for path in _folder().glob("*-cache")}
    return [path for key in keys if not all(map(Path.is_file, _entry(key))) for path in _entry(key)]
