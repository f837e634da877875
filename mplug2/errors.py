"""What the zoo refuses, and how it says so: one sentence that names both sides and the nearest right name."""

import difflib
import os
import re
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


def cause(error: BaseException) -> str:
    """Why a file could not be read or written: in the system's words where the system refused it, also where
    a library tells of it in its own (`... [os_error_code='28']`, TensorStore) or raises another error."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, OSError) and one.errno:
            return one.strerror or os.strerror(one.errno)
        if found := re.search(r"os_error_code='(\d+)'|\bOS error (\d+)", str(one)):
            return os.strerror(int(found[1] or found[2]))
        one = one.__cause__ or one.__context__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean "x"?)` with the closest of `names`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
