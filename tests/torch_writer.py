"""Writes PyTorch's zip format without PyTorch: as `torch.save` would, or as an attacker would."""

import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype("f4"): "FloatStorage",
    np.dtype("f2"): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype("f8"): "DoubleStorage",
    np.dtype("i8"): "LongStorage",
}


class Pickle:
    """Emits protocol 2, as `torch.save` does; `storages` are the arrays behind the tensors, an entry each."""

    def __init__(self):
        self.storages: list[np.ndarray] = []
        self.known: dict[int, int] = {}

    def dumps(self, value) -> bytes:
        return b"\x80\x02" + self.emit(value) + b"."

    def emit(self, value) -> bytes:
        if isinstance(value, dict):
            body = b"".join(self.emit(key) + self.emit(item) for key, item in value.items())
            return b"ccollections\nOrderedDict\n)R(" + body + b"u"
        if isinstance(value, np.ndarray):
            return self.tensor(value)
        if isinstance(value, str):
            text = value.encode()
            return b"X" + len(text).to_bytes(4, "little") + text
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.emit, value)) + b"t"
        if isinstance(value, bytes):  # ready-made instructions
            return value
        raise TypeError(type(value))

    def tensor(self, array: np.ndarray) -> bytes:
        """An array or a view of one: views of one base share a storage, as PyTorch's do."""
        base = array if array.base is None else array.base
        if id(base) not in self.known:
            self.known[id(base)] = len(self.storages)
            self.storages.append(base)
        offset = (
            array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        ) // array.itemsize
        strides = tuple(step // array.itemsize for step in array.strides)
        return rebuilt(array.dtype, str(self.known[id(base)]), base.size, offset, array.shape, strides)


def rebuilt(dtype, key: str, count: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """The instructions that describe a tensor."""
    plain = Pickle()
    storage = (
        b"X\x07\x00\x00\x00storage",
        b"ctorch\n" + STORAGES[np.dtype(dtype)].encode() + b"\n",
        key,
        "cpu",
        count,
    )
    outside = plain.emit(storage) + b"Q"
    arguments = (outside, offset, shape, strides, False, b"ccollections\nOrderedDict\n)R")
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + plain.emit(arguments) + b"R"


def save(path: Path, value, *, root: str = "archive", compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes `value` (nested dicts of arrays, texts and numbers) as `torch.save` would."""
    pickle = Pickle()
    data = pickle.dumps(value)
    arrays = {str(number): array for number, array in enumerate(pickle.storages)}
    return write(path, data, arrays, root=root, compression=compression)


def write(path: Path, data: bytes, storages=None, *, root="archive", compression=zipfile.ZIP_STORED) -> Path:
    """An archive of a ready pickle and storages (arrays or bytes) by name."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", data)
        archive.writestr(f"{root}/byteorder", "little")
        for name, array in (storages or {}).items():
            with archive.open(f"{root}/data/{name}", "w", force_zip64=True) as entry:
                entry.write(array if isinstance(array, bytes) else np.asarray(array).tobytes("A"))
        archive.writestr(f"{root}/version", "3\n")
    return path
