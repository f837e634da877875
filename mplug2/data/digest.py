"""What a split holds, as one sha256: data sets with the same one have as many examples, and the same at
the places that were looked at."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mplug2.data.examples import example_of, source_of
from mplug2.data.stream import shares

SEEN = 16
READ = 1000


def digest(data: Any, split: str = "train") -> str:
    """sha256 of a split of a data set, or of all that a Mixture mixes: the number of its examples, the texts
    of READ of them and, with their pixels, SEEN of them, evenly spaced. Raises DataError where it cannot be
    read."""
    found = hashlib.sha256()
    for part, _ in shares(data):
        source = source_of(part, split, "the data")
        found.update(f"{len(source)}\n".encode())
        if hasattr(source, "texts"):
            for index in spaced(len(source), READ):
                add(found, source.texts(index))
        for index in spaced(len(source), SEEN):
            add(found, example_of(source, index, "the data"))
    return found.hexdigest()


def spaced(count: int, most: int) -> list[int]:
    return sorted({place * (count - 1) // max(1, min(most, count) - 1) for place in range(min(most, count))})


def add(found: Any, example: Mapping[str, Any]) -> None:
    for name in sorted(example):
        value = example[name]
        found.update(f"{name}\n".encode())
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype.str} {value.shape}\n".encode())
            found.update(np.ascontiguousarray(value).tobytes())
        else:
            found.update(f"{value!r}\n".encode())
