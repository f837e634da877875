"""Tensors that stay in their file until they are asked for, row by row: what every reader gives and every
writer takes.

Files are read with plain reads, never mapped: what was read is given back to the system, so memory stays that
of one block whatever the file's size.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mplug2.errors import CheckpointError
from mplug2.hub import weights

BLOCK = 4 << 20
"""Bytes that are read, turned, checked and written at a time, where a tensor can be cut."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor at byte `start` of `path`; `strides` count elements."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, path: Path, dtype: np.dtype, shape: tuple[int, ...], start: int) -> "StoredTensor":
        """One stored row-major."""
        return cls(path, dtype, shape, start, row_major(shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Rows `first` to `last` (all axes of a scalar count as one row)."""
        shape = self.shape
        if shape:
            last = shape[0] if last is None else last
            shape = (last - first, *shape[1:])
        begin = self.start + (first * self.strides[0] * self.dtype.itemsize if self.shape else 0)
        if not math.prod(shape):
            return np.empty(shape, self.dtype)
        reach = 1 + sum((side - 1) * stride for side, stride in zip(shape, self.strides, strict=True))
        flat = np.fromfile(self.path, self.dtype, reach, offset=begin)
        if len(flat) != reach:
            raise CheckpointError(f"{self.path}: ends before byte {begin + reach * self.dtype.itemsize}")
        if self.strides == row_major(self.shape):
            return flat.reshape(shape)
        steps = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps)

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in order, about BLOCK bytes at a time."""
        if not self.shape:
            yield self.read()
            return
        rows = max(1, BLOCK // max(1, self.nbytes // max(1, self.shape[0])))
        for first in range(0, self.shape[0], rows):
            yield self.read(first, min(first + rows, self.shape[0]))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, in elements, of an array stored row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def same(one: StoredTensor, other: StoredTensor) -> bool:
    """Do two tensors hold the same bits? Nothing is read where they are one place of one file."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one == other:
        return True
    return all(
        np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
        for left, right in zip(one.blocks(), other.blocks(), strict=True)
    )


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file. Raises CardError unless its header is in order and fits the file."""
    checked = weights.read(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: StoredTensor.whole(path, array.dtype, array.shape, 8 + length + header[name]["data_offsets"][0])
        for name, array in checked.items()
    }


@dataclass(frozen=True)
class Streamed:
    """An array to be written: its type, shape and contents in row-major pieces, made when they are asked
    for."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored(tensor: StoredTensor) -> Streamed:
    """A tensor as it is."""
    return Streamed(tensor.dtype, tensor.shape, lambda: map(np.ascontiguousarray, tensor.blocks()))


Tensors = Mapping[str, StoredTensor]
