"""The seal of a checkpoint: `files.json`, which names the sha256 of its files; and what it says that it is,
in `metadata`.

A folder's name can be changed by anybody, so a checkpoint counts as the step and the run that it says itself.
"""

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from mplug2 import files
from mplug2.run import write_json

SEAL = "files.json"
METADATA = "metadata"
LARGEST_JSON = 100_000_000  # bytes; a line for each file of a checkpoint


class Damaged(Exception):
    """A checkpoint that cannot be read."""


class Misnamed(Damaged):
    """A checkpoint that is whole, but of another step or of another run than its place says."""


def write(path: Path) -> None:
    """The sha256 of every file, by its place; the checkpoint is complete with it."""
    sums = {str(file.relative_to(path)): _sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    write_json(path / SEAL, sums)


def remove(path: Path) -> None:
    """As far as it can be. The seal goes first: what a kill leaves of it then counts as no checkpoint."""
    with contextlib.suppress(OSError):
        (path / SEAL).unlink()
    shutil.rmtree(path, ignore_errors=True)


def verify(path: Path, recipe: str, items: Iterable[str]) -> None:
    """Orbax notices a missing file, not a changed byte. Raises Damaged if a file of `items` is not as it was
    sealed, Misnamed if the checkpoint is of another step than its name or of a run of another recipe than
    `recipe` (a fingerprint; an empty one is not compared)."""
    sums = _json(path / SEAL)
    for item in dict.fromkeys([METADATA, *items]):
        places = [place for place in sums if place.startswith(f"{item}/")]
        if not places:
            raise Damaged(f"it has no item {item}")
        for place in places:
            if not (path / place).is_file() or _sha256(path / place) != sums[place]:
                raise Damaged(f"{place} is not what was written")
    said = _metadata(path)
    if (step := said.get("step")) != int(path.name):
        raise Misnamed(f"its folder is named {path.name}, and it is of step {step}: name it so")
    if recipe and said.get("recipe", recipe) != recipe:
        raise Misnamed("it is of a run of another recipe")


def score(path: Path, name: str) -> float | None:
    """What the checkpoint says of itself by the score `name`; None if it does not, is another's, or says no
    finite number, which could be compared with none."""
    try:
        said = _metadata(path)
        value = said["scores"].get(name)
        finite = type(value) in (int, float) and math.isfinite(value)
    # Damaged, or of an older run.
    except (
        OSError,
        ValueError,
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        Damaged,
    ):
        return None
    return value if finite and said.get("step") == int(path.name) else None


def described(items: Mapping[str, Any], texts: Collection[str]) -> dict[str, Any]:
    """What can be told of each item without reading its arrays: their types and shapes, in no order
    (libraries differ in how they order a tree); of those named in `texts`, JSON, all."""
    told: dict[str, Any] = {}
    for name, item in items.items():
        if name in texts:
            told[name] = json.dumps(item, sort_keys=True)
        else:
            told[name] = sorted((str(leaf.dtype), tuple(leaf.shape)) for leaf in jax.tree.leaves(item))
    return told


def _metadata(path: Path) -> dict[str, Any]:
    said = _json(path / METADATA / "data.json")
    if not isinstance(said, dict):
        raise Damaged(f"{METADATA} is {type(said).__name__}, expected an object")
    return said


def _json(path: Path) -> Any:
    """Of a regular file: a run may be a stranger's, and a pipe would be waited for."""
    return json.loads(files.read_regular(path, LARGEST_JSON))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
