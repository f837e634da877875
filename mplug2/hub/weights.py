"""Published weights: safetensors files, read memory-mapped or into memory and written whole or not at all.

The promise: what was verified is what is used. No command of ours writes into a file that is there
(mplug2.files), so what is mapped from the cache, where nobody else writes, stays what it is. Everywhere else
people copy over files, so whatever outlives its loading is a copy (`read_own`); what is only read through, as
by a merge, is looked at again in the end (`unchanged`).

Layout (github.com/huggingface/safetensors): 8 bytes little-endian length of the header; the header, a JSON
object `{name: {"dtype", "shape", "data_offsets"}}` with strings under "__metadata__"; then the arrays,
little-endian, row-major, back to back. A file comes from strangers: nothing in it is believed before it is
checked against the file's size.
"""

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from mplug2 import files
from mplug2.errors import CardError, nearest
from mplug2.hub.mistaken import mistaken

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = {"float32": np.dtype("<f4"), "bfloat16": BFLOAT16, "float16": np.dtype("<f2")}
"""The types that modules are published in, by the names that cards use."""

_CODES = {
    "F64": np.dtype("<f8"),
    "F32": FLOATS["float32"],
    "F16": FLOATS["float16"],
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_ALIGNMENT = 64  # of the first array: what XLA asks of host memory that it uses without a copy
_LONGEST_HEADER = 100_000_000  # the bound of the format's own reader
_MOST_AXES = 32
_PIECE = 1 << 20


def read(path: Path, sha256: str | None = None) -> dict[str, np.ndarray]:
    """Read-only arrays by name, in the types they are stored in, as views of the mapped file: no copy is
    made, and they are right for as long as nobody writes into the file.

    With `sha256`, the mapping itself is hashed first (which reads the file once). Raises CardError for a file
    that is missing, malformed or another than the one expected.
    """
    with _opened(path) as (file, size):
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    if sha256 is not None:
        _check_sha256(path, hashlib.sha256(mapped).hexdigest(), sha256)
    return _arrays(path, mapped)


def read_own(path: Path, sha256: str) -> dict[str, np.ndarray]:
    """The same, as views of a copy in memory: what was verified is what is there, whatever becomes of the
    file. It is read once, and hashed on the way. Raises CardError."""
    with _opened(path) as (file, size):
        # Not `bytes`: what begins at a page, XLA uses without another copy.
        memory, digest = mmap.mmap(-1, size), hashlib.sha256()
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)  # else half of the time goes into making pages
        with memoryview(memory) as whole:
            for start in range(0, size, _PIECE):
                with whole[start : start + _PIECE] as piece:
                    if file.readinto(piece) != len(piece):  # pyright: ignore[reportAttributeAccessIssue]
                        raise CardError(f"{path}: was cut short while it was read")
                    digest.update(piece)
    _check_sha256(path, digest.hexdigest(), sha256)
    arrays = _arrays(path, memory)
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@contextlib.contextmanager
def unchanged(paths: Iterable[Path]) -> Iterator[None]:
    """What is read of mapped files while it is entered was theirs all the time. Raises CardError, at the end,
    for one that somebody has written into."""
    before = {path: _state(path) for path in paths}
    yield
    for path, state in before.items():
        if _state(path) != state:
            raise CardError(f"{path}: was changed while it was read")


def _state(path: Path) -> tuple[int, ...]:
    try:
        now = os.stat(path)
    except OSError as error:
        raise CardError(f"{path}: cannot be read ({error.strerror})") from None
    return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """(a file of at least 8 bytes, their number)."""
    try:
        with files.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise CardError(f"{path}: not a safetensors file, it has {size} bytes")
            yield file, size
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):
            raise CardError(f"{path}: there is no such weights file ({error.strerror})") from None
        raise CardError(f"{path}: cannot be read ({error.strerror})") from None


def _check_sha256(path: Path, found: str, sha256: str) -> None:
    if found != sha256:
        raise CardError(
            f"{path}: sha256 is {found}, the card says {sha256}; the file is damaged or another one"
        )


def _arrays(path: Path, mapped: mmap.mmap) -> dict[str, np.ndarray]:
    arrays = {}
    for name, (dtype, shape, start) in _entries(path, mapped).items():
        count = math.prod(shape)
        arrays[name] = (
            np.frombuffer(mapped, dtype, count, start).reshape(shape) if count else np.empty(shape, dtype)
        )
    return arrays


def written_for(path: Path) -> str:
    """The name of the card that a file was written for, as it says itself; empty where it says none."""
    try:
        with _opened(path) as (file, size):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size, _LONGEST_HEADER)))
        return str(header["__metadata__"]["card"])
    except (CardError, ValueError, RecursionError, LookupError, TypeError):
        return ""


def _entries(path: Path, mapped: mmap.mmap) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """{name: (type, shape, first byte)}, checked to cover the file's data exactly."""
    length = int.from_bytes(mapped[:8], "little")
    if length > min(len(mapped) - 8, _LONGEST_HEADER):
        what = mistaken(mapped[:256]) or f"its header of {length} bytes does not fit in {len(mapped)}"
        raise CardError(f"{path}: not a safetensors file: {what}")
    try:
        header = json.loads(mapped[8 : 8 + length].decode(), object_pairs_hook=_unique)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError: of JSON, of UTF-8, of a number too long to read
        raise CardError(f"{path}: its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise CardError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    entries, spans, available = {}, [], len(mapped) - 8 - length
    for name, entry in header.items():
        dtype, shape, start, end = _entry(path, name, entry)
        if end > available:
            raise CardError(f"{path}: array {name!r} ends at byte {end} of {available}")
        spans.append((start, end, name))
        entries[name] = (dtype, shape, 8 + length + start)
    position = 0
    for start, end, name in sorted(spans):
        if start != position:
            raise CardError(
                f"{path}: array {name!r} begins at byte {start}, the one before it ends at {position}"
            )
        position = end
    if position != available:
        raise CardError(f"{path}: arrays take {position} bytes, the file has {available}")
    return entries


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(type, shape, start, end) of one entry of the header; start and end count from the end of the
    header."""
    where = f"{path}: array {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CardError(f"{where} is not described by dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _CODES:
        raise CardError(f"{where} has dtype {code!r}, known are {sorted(_CODES)}{nearest(str(code), _CODES)}")
    if not _counts(shape) or len(shape) > _MOST_AXES or math.prod(filter(None, shape)) >= 2**40:
        raise CardError(
            f"{where} has shape {shape!r}, expected at most {_MOST_AXES} sizes and 2**40 elements"
        )
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CardError(f"{where} has data_offsets {offsets!r}, expected a start and an end")
    size = math.prod(shape) * _CODES[code].itemsize
    if size != offsets[1] - offsets[0]:
        raise CardError(
            f"{where}: {code} {shape} takes {size} bytes, its data_offsets {offsets} span another number"
        )
    return _CODES[code], tuple(shape), offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    """Is this a list of natural numbers?"""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def write(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """Writes arrays (float32, bfloat16 or float16) under their names; returns the file's sha256 and size in
    bytes.

    `path` holds the old file or the whole new one at any instant. Raises CardError if it cannot be written.
    """
    return write_each(path, arrays, lambda name: [arrays[name]], metadata)


def write_each(
    path: Path,
    kinds: Mapping[str, Any],
    pieces: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[str, int]:
    """As `write`, of arrays that are made while they are written: `kinds` tells each one's `shape` and
    `dtype`, `pieces` gives it part after part, row-major. Raises CardError, too, where the parts are not the
    whole."""
    codes = {dtype: code for code, dtype in _CODES.items() if dtype in FLOATS.values()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    # Wide types first, so that every array stands at a multiple of its item size; then by name: same arrays,
    # same file.
    ordered = sorted(kinds, key=lambda name: (-kinds[name].dtype.itemsize, name))
    for name in ordered:
        kind = kinds[name]
        if kind.dtype not in codes:
            raise CardError(
                f"{path}: array {name!r} has dtype {kind.dtype}, weights are written as {sorted(FLOATS)}"
            )
        header[name] = {
            "dtype": codes[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [position, position + _size(kind)],
        }
        position += _size(kind)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with replacing(path) as file:
        for piece in (len(encoded).to_bytes(8, "little"), encoded):
            digest.update(piece)
            file.write(piece)
        for name in ordered:
            written = 0
            for part in pieces(name):
                piece = np.ascontiguousarray(part, kinds[name].dtype).reshape(-1).view(np.uint8).data
                written += piece.nbytes
                digest.update(piece)
                file.write(piece)
            if written != _size(kinds[name]):
                raise CardError(
                    f"{path}: array {name!r} takes {_size(kinds[name])} bytes, its parts have {written}"
                )
    return digest.hexdigest(), 8 + len(encoded) + position


def _size(kind: Any) -> int:
    return math.prod(kind.shape) * kind.dtype.itemsize


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends well, and leaves nothing behind when
    not."""
    with files.refusing(CardError, path), files.replacing(path) as file:
        yield file
