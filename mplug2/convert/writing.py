"""Modules written from tensors that lie in another file: turned, stacked and checked block by block, never
held whole.

The safetensors file has the bytes that `mplug2.hub.publishing.publish` would write of the same arrays: its
card is an ordinary one.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from mplug2.convert.keys import KeyMap, Piece, Source
from mplug2.convert.layout import Same
from mplug2.convert.tensors import BLOCK, StoredTensor, Streamed, Tensors
from mplug2.hub.weights import replacing

CODES = {
    np.dtype("<f8"): "F64",
    np.dtype("<f4"): "F32",
    np.dtype("<f2"): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype("<i8"): "I64",
    np.dtype("<i4"): "I32",
    np.dtype("<i2"): "I16",
    np.dtype("i1"): "I8",
    np.dtype("u1"): "U8",
    np.dtype("?"): "BOOL",
}
ALIGNMENT = 64


def stream(path: Path, arrays: Mapping[str, Streamed], metadata: Mapping[str, str]) -> tuple[str, int]:
    """Writes a safetensors file, whole or not at all; its sha256 and size in bytes. Raises CardError."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    ordered = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in ordered:
        array = arrays[name]
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": CODES[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        position += array.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    digest = hashlib.sha256()
    with replacing(path) as file:

        def put(piece: bytes | memoryview) -> None:
            digest.update(piece)
            file.write(piece)

        put(len(encoded).to_bytes(8, "little"))
        put(encoded)
        for name in ordered:
            written = 0
            for piece in arrays[name].pieces():
                put(piece.reshape(-1).view(np.uint8).data)
                written += piece.nbytes
            if written != arrays[name].nbytes:
                raise AssertionError(f"{name}: {written} bytes were made of {arrays[name].nbytes}")
    return digest.hexdigest(), 8 + len(encoded) + position


@dataclass
class Finite:
    """Counts what is not a finite number, by key, while tensors pass through."""

    strange: dict[str, int] = field(default_factory=dict)

    def watch(self, key: str, block: np.ndarray) -> np.ndarray:
        if count := int(block.size - np.count_nonzero(np.isfinite(block))):
            self.strange[key] = self.strange.get(key, 0) + count
        return block


def turned(source: Source, shape: tuple[int, ...], tensors: Tensors, finite: Finite) -> Streamed:
    """One of our arrays, made of its pieces when it is written."""

    def pieces() -> Iterator[np.ndarray]:
        for piece in source.pieces:
            yield from _turned_blocks(piece, tensors[piece.key], finite)

    return Streamed(tensors[source.pieces[0].key].dtype, shape, pieces)


def _turned_blocks(piece: Piece, tensor: StoredTensor, finite: Finite) -> Iterator[np.ndarray]:
    if piece.third is None and piece.turn == Same():
        for block in tensor.blocks():
            yield np.ascontiguousarray(finite.watch(piece.key, block))
        return
    if piece.third is None:
        whole = tensor.read()
    else:
        rows = tensor.shape[0] // 3
        whole = tensor.read(piece.third * rows, (piece.third + 1) * rows)
    yield from _contiguous(piece.turn.to_ours(finite.watch(piece.key, whole)))


def _contiguous(view: np.ndarray) -> Iterator[np.ndarray]:
    """A view in row-major blocks: a whole copy of a turned tensor is never made."""
    if view.flags.c_contiguous or not view.ndim:
        yield np.ascontiguousarray(view)
        return
    rows = max(1, BLOCK // max(1, view.nbytes // len(view)))
    for first in range(0, len(view), rows):
        yield np.ascontiguousarray(view[first : first + rows])


def foreign_shape(piece: Piece, source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an official tensor must have, for an array of `shape` to be made of it."""
    one = shape[1:] if source.stacked else shape
    turned_back = piece.turn.to_foreign(np.broadcast_to(np.zeros((), np.int8), one)).shape
    return turned_back if piece.third is None else (3 * turned_back[0], *turned_back[1:])


def restored(keys: KeyMap, read: Callable[[str, str], StoredTensor]) -> dict[str, Streamed]:
    """The way back: official tensors by key, made of modules' arrays that `read(module, name)` gives."""
    made = {}
    for key, places in keys.places().items():
        arrays = [(read(*path), layer, piece) for path, layer, piece in places]
        shapes = [
            piece.turn.to_foreign(
                np.broadcast_to(np.zeros((), np.int8), array.shape if layer is None else array.shape[1:])
            ).shape
            for array, layer, piece in arrays
        ]
        shape = (sum(one[0] for one in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

        def pieces(arrays: list[tuple[StoredTensor, int | None, Piece]] = arrays) -> Iterator[np.ndarray]:
            for array, layer, piece in arrays:
                if layer is None and piece.turn == Same():
                    yield from map(np.ascontiguousarray, array.blocks())
                else:
                    one = array.read() if layer is None else array.read(layer, layer + 1)[0]
                    yield from _contiguous(piece.turn.to_foreign(one))

        made[key] = Streamed(arrays[0][0].dtype, shape, pieces)
    return made


def counting(length: int) -> Streamed:
    """BERT's buffer of positions, int64 `1 length`."""
    return Streamed(np.dtype("<i8"), (1, length), lambda: iter([np.arange(length, dtype="<i8")[None]]))


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
