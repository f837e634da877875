"""Bundles as one file: a tar of plain files, without folders, the same bytes for the same content.

Reading is strict, because a tar comes from strangers: regular files with plain names, each once, and nothing
else: no link, no device, no path, no extension header. A file's size is checked against what the tar has left
before a byte of it is read, and tars are never compressed, so that nothing grows beyond the tar's own size.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mplug2 import files
from mplug2.errors import CardError
from mplug2.hub.weights import replacing

_BLOCK = 512
_PIECE = 1 << 20
_MOST_FILES = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)


def pack(folder: Path, path: Path) -> None:
    """All files of `folder` into the tar `path`, whole or not at all. Raises CardError."""
    there = sorted(folder.iterdir())
    for file in there:
        if not _NAME.fullmatch(file.name) or file.is_symlink() or not file.is_file():
            raise CardError(f"{file}: a bundle holds regular files with plain names of up to 100 letters")
    with replacing(path) as out:
        for file in there:
            entry = tarfile.TarInfo(file.name)
            entry.size, entry.mode, entry.mtime = file.stat().st_size, 0o644, 0
            out.write(entry.tobuf(tarfile.GNU_FORMAT))
            with file.open("rb") as content:
                while piece := content.read(_PIECE):
                    out.write(piece)
            out.write(bytes(-entry.size % _BLOCK))
        out.write(bytes(2 * _BLOCK))


def held(path: Path) -> dict[str, tuple[int, int]]:
    """The files of a tar: by name, the first byte and the size of each. Raises CardError for a tar that is
    anything but what `pack` writes."""
    found: dict[str, tuple[int, int]] = {}
    with _reading(path) as tar:
        for name, size in _entries(path, tar):
            if name.lower() in map(str.lower, found) or len(found) == _MOST_FILES:  # some disks fold case
                raise CardError(f"bundle {path}: {name} is there twice, or there are too many files")
            found[name] = (tar.tell(), size)
            tar.seek(size + -size % _BLOCK, os.SEEK_CUR)
    return found


def content(path: Path, name: str, most: int) -> bytes:
    """A small file of a tar. Raises CardError where it is not there or longer than `most` bytes."""
    at, size = held(path).get(name, (0, most + 1))
    if size > most:
        raise CardError(f"bundle {path}: holds no {name} of at most {most} bytes")
    with _reading(path) as tar:
        tar.seek(at)
        return tar.read(size)


def unpack(path: Path, folder: Path) -> list[str]:
    """The files of the tar `path` into `folder`, which is made; their names. Raises CardError, before
    anything is unpacked of a tar that is anything but what `pack` writes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = held(path)
        with _reading(path) as tar:
            for name, (at, size) in found.items():
                tar.seek(at)
                with replacing(folder / name) as file:
                    for start in range(0, size, _PIECE):
                        file.write(tar.read(min(_PIECE, size - start)))
    except OSError as error:
        raise CardError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error})"
        ) from None
    return list(found)


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        tar = files.open_regular(path)
    except OSError as error:
        raise CardError(f"bundle {path}: cannot be read ({error.strerror})") from None
    with tar:
        yield tar


def _entries(path: Path, tar: IO[bytes]) -> Iterator[tuple[str, int]]:
    """(name, size) of every file; the reader stands at its first byte, and must stand at the next header
    when it asks for the next."""
    whole = os.fstat(tar.fileno()).st_size
    while True:
        at = tar.tell()
        header = tar.read(_BLOCK)
        if header == bytes(_BLOCK):
            return
        if len(header) < _BLOCK:
            raise CardError(f"bundle {path}: not a tar, it ends within a header at byte {at}")
        name, size = _header(path, header, at)
        if size > whole - at - _BLOCK:
            raise CardError(f"bundle {path}: {name} has {size} bytes, the tar has {whole - at - _BLOCK} left")
        yield name, size


def _header(path: Path, header: bytes, at: int) -> tuple[str, int]:
    if header[257:262] != b"ustar" or _octal(header[148:156]) != sum(header[:148] + header[156:]) + 8 * 32:
        raise CardError(f"bundle {path}: not a tar header at byte {at}")
    name = header[:100].rstrip(b"\0").decode("latin-1")
    if header[156:157] not in (b"0", b"\0") or any(header[345:500]) or not _NAME.fullmatch(name):
        raise CardError(
            f"bundle {path}: {name[:80]!r} is not a regular file with a plain name; a bundle has no others"
        )
    field = header[124:136]
    # Octal, or where that is too short, what GNU tar writes: a bit, then the number itself.
    size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else _octal(field)
    if size is None:
        raise CardError(f"bundle {path}: the size of {name} is not a number")
    return name, size


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    return int(text, 8) if re.fullmatch(rb"[0-7]+", text) else None
