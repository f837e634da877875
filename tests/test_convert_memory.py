"""The released model's 3 GB convert in the memory of one tensor. Two minutes: `make test-slow`."""

import subprocess
import sys
from pathlib import Path

import pytest

WRITE = """
import re, sys, zipfile
import numpy as np
sys.path[:0] = [{tests!r}]
from torch_writer import Pickle, rebuilt
from converting import released

# 2**20 numbers over and over, so that tied tensors are equal; positions count.
numbers, body = np.random.default_rng(0).normal(size=1 << 20).astype("f2").tobytes(), b""
with zipfile.ZipFile({path!r}, "w") as archive:
    for place, (key, shape) in enumerate(released().items()):
        size, counts = int(np.prod(shape)), key.endswith("position_ids")
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        body += Pickle().emit(key) + rebuilt("i8" if counts else "f2", str(place), size, 0, shape, strides)
        with archive.open(f"archive/data/{{place}}", "w", force_zip64=True) as entry:
            if counts:
                entry.write(np.arange(size).tobytes())
            for first in range(0, 0 if counts else 2 * size, len(numbers)):
                entry.write(numbers[: 2 * size - first])
    archive.writestr("archive/data.pkl", b"\\x80\\x02}}(X\\x05\\x00\\x00\\x00model}}(" + body + b"uu.")
"""

CONVERT = """
import resource
from pathlib import Path
from mplug2.convert import conversion
from mplug2.convert.families import mplug2
from mplug2.network import Network

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tensors, _ = conversion.read_checkpoint(Path({path!r}))
shapes = {{key: tensor.shape for key, tensor in tensors.items()}}
Network(mplug2(shapes).configs).shapes  # what JAX needs by itself
before = peak()
report = conversion.convert(Path({path!r}), "mplug2", Path({out!r}), conversion.Options(name="large"))
print(len(report["keys"]), max(tensor.nbytes for tensor in tensors.values()), before, peak())
"""


@pytest.mark.slow
def test_three_gigabytes_convert_in_the_memory_of_one_tensor(tmp_path):
    places = {
        "path": str(tmp_path / "large.pth"),
        "out": str(tmp_path / "out"),
        "tests": str(Path(__file__).parent),
    }
    subprocess.run([sys.executable, "-c", WRITE.format(**places)], check=True)
    assert (tmp_path / "large.pth").stat().st_size > 3e9
    done = subprocess.run(
        [sys.executable, "-c", CONVERT.format(**places)], check=True, capture_output=True, text=True
    )
    keys, largest, before, after = map(int, done.stdout.split())
    print(
        f"{keys} keys, largest tensor {largest / 1e6:.0f} MB, peak {before / 1e6:.0f} -> {after / 1e6:.0f} MB"
    )
    assert keys == 2223
    assert after - before < 1.3 * largest + 32e6
