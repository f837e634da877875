"""What the zoo refuses, and how it says so: one sentence that names both sides and the nearest right name."""

import difflib
from collections.abc import Iterable


class Mplug2Error(Exception):
    """Every refusal of the zoo; the command line prints it as one line and exits with status 2."""


class RecipeError(Mplug2Error):
    """A recipe, a field or an override that does not fit."""


class DataError(Mplug2Error):
    """An input file or a data set that cannot be read."""


class CheckpointError(Mplug2Error):
    """A run directory or a checkpoint that cannot be used, or could not be written."""


class CardError(Mplug2Error):
    """A module card, or the files it names, that cannot be trusted or does not fit."""


class DownloadError(Mplug2Error):
    """A file that cannot be had from any of its addresses, or a cache that cannot be used."""


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean "x"?)` with the closest of `names`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
