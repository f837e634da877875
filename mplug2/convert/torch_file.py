"""PyTorch's checkpoint files (.pth, .pt, .tar: the zip format since torch 1.6) without PyTorch.

A zip archive: `<root>/data.pkl` describes the structure (read by `pickles`), `<root>/data/<number>` are the
storages, stored uncompressed. TorchScript archives, as OpenAI's CLIP is one, also hold `<root>/code/`, which
is compressed, and neither unpacked nor run. Nothing in it is believed: entries are compared with the file
before any is read, and a storage with the tensors that use it. Tensors stay in the file (`tensors`).
"""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mplug2.convert.pickles import Scripted, Storage, Tensor, unpickle
from mplug2.convert.tensors import StoredTensor
from mplug2.errors import CheckpointError
from mplug2.hub.mistaken import mistaken

LEGACY = bytes.fromhex("80028a0a6cfc9c46f920")  # the first pickle of a file of torch < 1.6: its magic number
LARGEST_PICKLE = 256 << 20
MOST_TENSORS = 1_000_000
LARGEST_REPEATED = 1 << 20
"""Bytes of a tensor that shows its numbers more than once (`expand`)."""
MOST_UNFOLDED = 4
"""So many times the size of the file may all tensors have together, repeated numbers counted each time and
LARGEST_REPEATED more: without a bound a file of a few bytes could fill a disk."""
WRAPPERS = ("model", "module", "state_dict", "model_state_dict")
"""Under which of its keys a checkpoint may hold the state dict, in order of preference."""


def read_torch(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of a checkpoint's state dict by key, and where in the file they were ("model", "module", or
    ""). Raises CheckpointError, which names the file and the reason."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
            if head.startswith(LEGACY):
                raise CheckpointError(
                    "it has the legacy format of torch < 1.6; load and torch.save it again with a newer one"
                )
            if not head.startswith(b"PK\x03\x04"):
                what = f": it is {said}" if (said := mistaken(head)) else ""
                raise CheckpointError(f"it is not a torch checkpoint in zip format, nor safetensors{what}")
            entries = _entries(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (CheckpointError, zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: refused: {error}") from None
    try:
        structure, root = _structure(path, entries)
        found, wrapper = _state_dict(structure)
        tensors = {key: _tensor(path, entries, root, key, tensor) for key, tensor in found.items()}
        unfolded, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
        if unfolded > MOST_UNFOLDED * size + LARGEST_REPEATED:
            raise CheckpointError(f"its tensors unfold to {unfolded} bytes, the file has {size}")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: refused: {error}") from None
    return tensors, wrapper


Entries = dict[str, tuple[int, int]]
"""Of an archive: name -> first byte of its contents, and their number."""


def _entries(path: Path, file: Any) -> Entries:
    """Checked: none named twice, none over another, all within the file, none compressed but code, which is
    left out."""
    size = path.stat().st_size
    entries: Entries = {}
    places: Entries = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
            if not plain and not re.match(r"[^/]+/code/", info.filename):
                raise CheckpointError(
                    f"its entry {info.filename!r} is compressed ({info.file_size} bytes from "
                    f"{info.compress_size}); "
                    f"torch stores them plainly"
                )
            if info.flag_bits & 0x1 or info.filename in places:
                raise CheckpointError(f"its entry {info.filename!r} is encrypted, or there twice")
            if ".." in info.filename.split("/") or info.filename.startswith("/") or "\\" in info.filename:
                raise CheckpointError(f"its entry {info.filename!r} leads out of the archive")
            file.seek(info.header_offset)
            local = file.read(30)
            if len(local) < 30 or local[:4] != b"PK\x03\x04":
                raise CheckpointError(f"its entry {info.filename!r} does not begin where the directory says")
            names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            start = info.header_offset + 30 + names
            places[info.filename] = (start, info.compress_size)
            if plain:
                entries[info.filename] = (start, info.file_size)
    end = 0
    for name, (start, length) in sorted(places.items(), key=lambda entry: entry[1]):
        if start < end or start + length > size:
            raise CheckpointError(f"its entry {name!r} lies over another one, or past the file's end")
        end = start + length
    return entries


def _structure(path: Path, entries: Entries) -> tuple[Any, str]:
    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise CheckpointError(f"expected one entry ROOT/data.pkl, found {pickles or sorted(entries)[:5]}")
    root = pickles[0].removesuffix("data.pkl")
    start, length = entries[pickles[0]]
    if length > LARGEST_PICKLE:
        raise CheckpointError(f"its pickle has {length} bytes, more than {LARGEST_PICKLE}")
    order = entries.get(f"{root}byteorder")
    with path.open("rb") as file:
        if order is not None:
            file.seek(order[0])
            if file.read(min(order[1], 16)) != b"little":
                raise CheckpointError("its numbers are big-endian")
        file.seek(start)
        return unpickle(file.read(length)), root


def _state_dict(structure: Any) -> tuple[dict[str, Tensor], str]:
    """The tensors by key, without wrappers and without a prefix `module.` that all keys have."""
    wrapper = ""
    if isinstance(structure, dict):
        for name in WRAPPERS:
            if isinstance(structure.get(name), dict):
                structure, wrapper = structure[name], name
                break
    tensors = {}
    for key, tensor in _tensors(structure, ""):
        tensors[key] = tensor
        if len(tensors) > MOST_TENSORS:
            raise CheckpointError(f"it holds more than {MOST_TENSORS} tensors")
    if not tensors:
        raise CheckpointError("it holds no tensors by name, as a state dict does")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    if strange := [key for key in tensors if not re.fullmatch(r"[A-Za-z0-9_.\-]+", key)]:
        raise CheckpointError(f"its keys are no names of parameters: {strange[:3]}")
    return tensors, wrapper


def _tensors(structure: Any, prefix: str, seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Tensor]]:
    """Of a state dict, or of a scripted module and its parts; a part that holds itself is refused."""
    if id(structure) in seen or len(seen) > 32:
        raise CheckpointError("its modules hold one another, or lie too deep")
    parts = structure.attributes if isinstance(structure, Scripted) else structure
    if isinstance(parts, dict):
        for name, value in parts.items():
            if isinstance(value, Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, Scripted):
                yield from _tensors(value, f"{prefix}{name}.", seen | {id(structure)})


def _tensor(path: Path, entries: Entries, root: str, key: str, tensor: Tensor) -> StoredTensor:
    storage: Storage = tensor.storage
    dtype = np.dtype(ml_dtypes.bfloat16) if storage.dtype == "bfloat16" else np.dtype(storage.dtype)
    name = f"{root}data/{storage.key}"
    if not re.fullmatch(r"[0-9]+", storage.key) or name not in entries:
        raise CheckpointError(f"{key}: its storage {storage.key!r} is not in the archive")
    start, length = entries[name]
    if storage.count < 0 or length != storage.count * dtype.itemsize:
        raise CheckpointError(
            f"{key}: its storage of {storage.count} {storage.dtype} should have "
            f"{storage.count * dtype.itemsize} "
            f"bytes, the file has {length}"
        )
    stored = StoredTensor(path, dtype, tensor.shape, start + tensor.offset * dtype.itemsize, tensor.strides)
    reach = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.strides, strict=True))
    bomb = stored.size > storage.count and stored.nbytes > LARGEST_REPEATED
    if stored.size and (tensor.offset + reach > storage.count or bomb):
        raise CheckpointError(
            f"{key}: shape {tensor.shape} with strides {tensor.strides} from {tensor.offset} on needs "
            f"more than the "
            f"{storage.count} numbers of its storage"
        )
    return stored
