"""The arrays of a card's file, verified: what was verified is what is used (the promise is in
mplug2.hub.weights). Where a card is published anew between the reading of it and that of its file, that is
said and not mixed (mplug2.hub.publication).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from mplug2.errors import CardError, Mplug2Error
from mplug2.hub import weights
from mplug2.hub.cache import Cache
from mplug2.hub.card import Card, read_card

T = TypeVar("T")


class Republished(CardError):
    """A card that was published anew between the reading of it and that of its file."""


def again(read: Callable[[], T]) -> T:
    """What `read` gives, which reads cards and then their files: once more where they were published anew
    meanwhile. Raises what it raises."""
    for _ in range(8):
        with contextlib.suppress(Republished):
            return read()
    return read()


@contextlib.contextmanager
def of_this_publication(card: Card) -> Iterator[None]:
    """Raises Republished for a refusal of what a card names, where the card in its folder is another by
    now."""
    try:
        yield
    except Mplug2Error:
        try:
            same = read_card(card.folder / f"{card.name}.json").file == card.file
        except CardError:
            same = True
        if same:
            raise
        told = f"card {card.name} was published anew while it was opened: open it again"
        raise Republished(told) from None


def arrays(card: Card, path: Path) -> dict[str, np.ndarray]:
    """The arrays of a card's file, at `path`, as it stores them, verified; they stay what they are whatever
    becomes of the file. What lies in the cache, where nobody writes into a file, is mapped, the rest copied.
    Raises CardError."""
    if path.is_relative_to(Cache.default().whole):
        return mapped(card, path)
    _check_size(card, path)
    return _floats(path, weights.read_own(path, card.file.sha256))


def mapped(card: Card, path: Path, verify: bool = True) -> dict[str, np.ndarray]:
    """The same as views of the mapped file; `verify=False` skips the sha256."""
    _check_size(card, path)
    return _floats(path, weights.read(path, card.file.sha256 if verify else None))


def _check_size(card: Card, path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CardError(f"{path}: cannot be read ({error.strerror})") from None
    if size != card.file.bytes:
        raise CardError(f"{path}: has {size} bytes, card {card.name} says {card.file.bytes}")


def _floats(path: Path, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if strange := sorted(name for name, array in found.items() if array.dtype not in weights.FLOATS.values()):
        raise CardError(
            f"{path}: {strange} are {found[strange[0]].dtype}, parameters are one of {sorted(weights.FLOATS)}"
        )
    return found
