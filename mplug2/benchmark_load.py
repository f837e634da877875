"""How fast a module is opened from a file that the machine has just read, beside two other ways to the same
arrays and the disk itself.

Opening a mapped file costs next to nothing, because nothing is read before it is used. So every way is timed
twice: until its arrays are on the device, and until a computation has read all of them once.
"""

import mmap
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file

from mplug2.hub import weights
from mplug2.hub.placing import place

Arrays = Mapping[str, jax.Array]

_ARRAY = (1024, 4096)  # float32: 16.8 MB, the size of a large layer's matrix
_PIECE = 1 << 22


@dataclass(frozen=True)
class Way:
    """One way to open the file. Seconds by repeat: until the arrays are on the device (`opened`), and until
    all were read once as well (`used`); `memory`: bytes of the process's own that the arrays hold."""

    name: str
    opened: tuple[float, ...]
    used: tuple[float, ...]
    memory: int

    def median(self, kind: str) -> float:
        return statistics.median(getattr(self, kind))

    def spread(self, kind: str) -> tuple[float, float]:
        """The fastest and the slowest."""
        times = getattr(self, kind)
        return min(times), max(times)


@dataclass(frozen=True)
class LoadReport:
    """`bytes`: of the file; `disk`: seconds to read it past the page cache by repeat (empty where the file
    system cannot); `cached`: seconds to read it from the page cache into one small buffer."""

    bytes: int
    ways: tuple[Way, ...]
    disk: tuple[float, ...]
    cached: tuple[float, ...]


def measure_load(folder: Path, size: int, repeats: int) -> LoadReport:
    """Writes a module of about `size` bytes into `folder`, as safetensors and as an Orbax checkpoint, and
    opens both `repeats` times, the ways taking turns, so that a slow moment hits all of them."""
    path = folder / "module.safetensors"
    drawn = np.random.default_rng(0)
    count = max(1, round(size / (4 * _ARRAY[0] * _ARRAY[1])))
    arrays = {f"layer{at:03}.kernel": drawn.random(_ARRAY, np.float32) for at in range(count)}
    sha256, written = weights.write(path, arrays)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here) for name, array in arrays.items()
    }
    ocp.save(str(folder / "orbax"), {name: jnp.asarray(array) for name, array in arrays.items()})
    total = float(_total({name: jnp.asarray(array) for name, array in arrays.items()}))
    del arrays
    ways: dict[str, Callable[[], Arrays]] = {
        "mplug2, mapped": lambda: _placed(weights.read(path)),
        "mplug2, copied and verified by sha256": lambda: _placed(weights.read_own(path, sha256)),
        "safetensors.numpy.load_file": lambda: jax.device_put(load_file(path)),
        "Orbax": lambda: ocp.load(str(folder / "orbax"), shapes),
    }
    times: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
    disk, cached = [], []
    for _ in range(repeats):
        if (seconds := _read_disk(path)) is not None:
            disk.append(seconds)
        cached.append(_read(path, os.O_RDONLY))  # and with it the file is warm
        for name, way in ways.items():
            times[name].append(_timed(way, total))
    return LoadReport(
        bytes=written,
        ways=tuple(
            Way(name, tuple(a for a, _, _ in some), tuple(b for _, b, _ in some), max(m for *_, m in some))
            for name, some in times.items()
        ),
        disk=tuple(disk),
        cached=tuple(cached),
    )


def _placed(arrays: Mapping[str, np.ndarray]) -> Arrays:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return place(arrays, dict.fromkeys(arrays, here))


@jax.jit
def _total(arrays: Arrays) -> jax.Array:
    return sum((array.sum() for array in arrays.values()), jnp.float32(0))


def _timed(way: Callable[[], Arrays], total: float) -> tuple[float, float, int]:
    before, began = _own_memory(), time.perf_counter()
    arrays = jax.block_until_ready(way())
    opened = time.perf_counter() - began
    found = float(_total(arrays))
    used = time.perf_counter() - began
    if abs(found - total) > 1e-4 * total:
        raise AssertionError(f"the arrays sum to {found}, expected {total}")
    return opened, used, _own_memory() - before


def _own_memory() -> int:
    """Resident bytes that are no file's (Linux); 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def _read_disk(path: Path) -> float | None:
    """Seconds to read a file past the page cache; None where the file system does not offer it."""
    try:
        return _read(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):
        return None


def _read(path: Path, flags: int) -> float:
    buffer = mmap.mmap(-1, _PIECE)  # at a page's begin, as O_DIRECT wants it
    descriptor = os.open(path, flags)
    try:
        began = time.perf_counter()
        while os.readv(descriptor, [buffer]):
            pass
        return time.perf_counter() - began
    finally:
        os.close(descriptor)


def as_json(report: LoadReport) -> dict[str, Any]:
    """Plain values, for a machine to read."""
    ways = {way.name: {"opened": way.opened, "used": way.used, "memory": way.memory} for way in report.ways}
    return {"bytes": report.bytes, "ways": ways, "disk": report.disk, "cached": report.cached}
