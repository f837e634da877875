"""What a split held when a run began on it: enough to notice that it is another by now, and cheap to take.

Annotations are read whole; of videos the names and sizes are looked at. Of data that names no files, the
number of its examples and a few of them, unless it gives another one each time that it is asked.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mplug2.data.digest import add, spaced
from mplug2.data.examples import source_of
from mplug2.data.stream import Feed, shares
from mplug2.errors import DataError
from mplug2.mistakes import in_words

SEEN = 8


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """`annotations`: the sha256 of what each file says, by its name; `files`, `bytes` and `names`: how
    many others there are, their bytes together, and the sha256 of their names and sizes; `seen`: the sha256
    of a few examples."""

    examples: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    files: int = 0
    bytes: Annotated[int, 2**62] = 0
    names: str = ""
    seen: str = ""


def inventories(feeds: Mapping[str, Feed]) -> dict[str, tuple[Inventory, ...]]:
    """Of the train splits that a recipe's feeds read, one for each part of a mixture. Raises DataError."""
    return {
        name: tuple(inventory(data, "train", f"the data of {name}") for data, _ in shares(feed.data))
        for name, feed in feeds.items()
    }


def inventory(data: Any, split: str, name: str) -> Inventory:
    """Of one data set, called `name`; its `inventory(split)`, if it has one. Raises DataError."""
    if hasattr(data, "inventory"):
        return data.inventory(split)
    source = source_of(data, split, name)
    with in_words(name, kind=DataError):
        return Inventory(examples=len(source), seen=_seen(source))


def of_files(examples: int, annotations: Mapping[str, str], others: Mapping[str, Path | str]) -> Inventory:
    """Of data in files: the sha256 of what `annotations` say, by the file's name; `others` by the name that
    examples know them by. Raises DataError."""
    told, total = hashlib.sha256(), 0
    try:
        for name in sorted(others):
            size = Path(others[name]).stat().st_size
            told.update(f"{name}\n{size}\n".encode(errors="surrogateescape"))
            total += size
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror or error})") from None
    names = told.hexdigest() if others else ""
    return Inventory(examples=examples, annotations=annotations, files=len(others), bytes=total, names=names)


def changes(before: Inventory, now: Inventory) -> list[str]:
    """What is another, in words."""
    told = []
    for name in sorted({*before.annotations, *now.annotations}):
        if name not in now.annotations:
            told.append(f"{name} is no longer read")
        elif name not in before.annotations:
            told.append(f"{name} is new")
        elif before.annotations[name] != now.annotations[name]:
            told.append(f"{name} has another content")
    if before.examples != now.examples:
        told.append(f"it has {now.examples} examples, and had {before.examples}")
    if (before.files, before.bytes, before.names) != (now.files, now.bytes, now.names):
        told.append(
            f"its other files are {now.files} of {now.bytes} bytes, and were {before.files} of {before.bytes}"
            if (before.files, before.bytes) != (now.files, now.bytes)
            else "its other files have other names or sizes"
        )
    if before.seen and now.seen and before.seen != now.seen and not told:
        told.append(f"of {now.examples} examples some have another content")
    return told


def _seen(source: Any) -> str:
    """Empty where the first example differs when it is read again."""
    if not len(source) or _hash(source, [0]) != _hash(source, [0]):
        return ""
    return _hash(source, spaced(len(source), SEEN))


def _hash(source: Any, indices: Iterable[int]) -> str:
    found = hashlib.sha256()
    for index in indices:
        add(found, source[index])
    return found.hexdigest()
