"""The load gate: every array of a module is loaded, initialised by a rule, or an array of its file is skipped
by a rule; anything else is an error that lists both sides."""

import fnmatch
import functools
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from mplug2.errors import CardError, nearest
from mplug2.hub.card import Card
from mplug2.network import Network, flat
from mplug2.roles import Config

Rules = Mapping[str, Iterable[str]]
"""By module, patterns of array names (`fnmatch`), as exceptions to the gate."""

NONE: Mapping[str, Any] = MappingProxyType({})


class Passed(NamedTuple):
    """Names of arrays: together all there are on either side."""

    loaded: set[str]
    initialised: set[str]
    skipped: set[str]


def shapes(config: Config, who: str) -> Mapping[str, jax.ShapeDtypeStruct]:
    """A module's {array name: shape and type}, by tracing its config's own builder; no array is made. Raises
    CardError for a config that cannot be built."""
    try:
        return _traced(config)
    # The numbers are a stranger's, and any layer may be the one that cannot take them.
    except Exception as error:
        raise CardError(f"{who}: its config cannot be built ({type(error).__name__}: {error})") from None


@functools.lru_cache(maxsize=64)  # tracing a large config takes longer than opening its file
def _traced(config: Config) -> Mapping[str, jax.ShapeDtypeStruct]:
    return MappingProxyType(flat(Network({"": config}).shapes[""]))


def check(
    card: Card,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    arrays: Mapping[str, np.ndarray],
    *,
    initialise: Iterable[str] = (),
    skip: Iterable[str] = (),
) -> Passed:
    """What becomes of each array that the config expects and of each of the card's file. Raises CardError
    for one that is left over on either side, is of another shape, or for a rule that excuses none."""
    fresh = _matching(initialise, set(expected), card, "initialise", "the config")
    dropped = _matching(skip, set(arrays), card, "skip", "the file")
    missing = sorted(set(expected) - set(arrays) - fresh)
    extra = sorted(set(arrays) - set(expected) - dropped)
    loaded = set(expected) & set(arrays) - fresh - dropped
    missing += sorted(set(expected) & dropped - fresh)
    wrong = [
        f"{name} (config {expected[name].shape}, file {arrays[name].shape})"
        for name in sorted(loaded)
        if expected[name].shape != arrays[name].shape
    ]
    if missing or extra or wrong:
        raise CardError(
            f"card {card.name}: the config has {len(expected)} arrays, "
            f"the file {card.file.path} has {len(arrays)}"
            + (f"; only in the config: {listing(missing)}" if missing else "")
            + (f"; only in the file: {listing(extra)}" if extra else "")
            + (f"; of another shape: {listing(wrong)}" if wrong else "")
        )
    return Passed(loaded, fresh, set(arrays) - loaded)


def _matching(patterns: Iterable[str], names: set[str], card: Card, rule: str, side: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        if not (hits := set(fnmatch.filter(names, pattern))):
            raise CardError(
                f'card {card.name}: rule {rule} "{pattern}" matches no array of {side}'
                + nearest(pattern, names)
            )
        found |= hits
    return found


def listing(names: list[str], most: int = 12) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
