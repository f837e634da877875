"""What a user's own code raises, as one sentence: the file and line that it went wrong in, and, where a value
of the zoo refused it, the field, what it was given and what was expected."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from mplug2 import fields
from mplug2.errors import Mplug2Error, RecipeError, nearest
from mplug2.source import is_of_recipe, readable

_UNKNOWN = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r"(\w+)\.__init__\(\) missing \d+ required .*arguments?: (.*)")


@contextmanager
def in_words(what: str, kind: type[Mplug2Error] = RecipeError) -> Iterator[None]:
    """Whatever the block raises becomes an error of `kind` that begins with `what` and the innermost line of
    a recipe file, or its neighbour, that was being run. A KeyboardInterrupt stays one."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = line_of(error)
        file, _, number = line.rpartition(", ")
        told = number if file and what.endswith(f'{file}"') else line  # a file is not named twice
        where = ", ".join(filter(None, (what, told)))
        raise kind(f"{where}: {sentence(error)}") from error


def sentence(error: BaseException) -> str:
    """What went wrong, without where."""
    if isinstance(error, Mplug2Error):
        return str(error)
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}" + (f": {error.text.strip()}" if error.text else "")
    if isinstance(error, SystemExit):
        return "it ends the program (SystemExit)"
    frame = _last_frame(error)
    if isinstance(error, TypeError) and frame is not None:
        text = str(error)
        if found := _UNKNOWN.search(text):
            name, field = found.groups()
            known = _fields_of(name, frame, without=field)
            listed = f"; known are {', '.join(known)}{nearest(field, known)}" if known else ""
            return f'{name} has no field "{field}"{listed}'
        if found := _MISSING.search(text):
            return f"{found[1]} needs a value for {found[2]}"
    if told := _mismatch(error):
        return told
    text = " ".join(str(error).split())
    return readable(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def line_of(error: BaseException) -> str:
    """`mine.py, line 3`; empty if no line of a recipe file was being run."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}"
    found = ""
    for trace in _traces(error):
        if is_of_recipe(str(trace.tb_frame.f_globals.get("__name__"))):
            found = f"{Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno}"
    return found


def _traces(error: BaseException) -> Iterator[TracebackType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _last_frame(error: BaseException) -> FrameType | None:
    return next((trace.tb_frame for trace in reversed(list(_traces(error)))), None)


def _mismatch(error: BaseException) -> str | None:
    """If it was raised while a value of the zoo was being made: the field that holds the wrong thing."""
    for trace in _traces(error):
        made = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name != "__post_init__" or not dataclasses.is_dataclass(made):
            continue
        if told := fields.mismatch(made):
            return f"{type(made).__name__}: {told}"
    return None


def _fields_of(name: str, frame: FrameType, without: str) -> list[str]:
    """The fields of the dataclass of that name that has no field `without`: seen from where it was called,
    else anywhere in the zoo."""
    modules = [frame.f_globals]
    modules += [vars(module) for key, module in list(sys.modules.items()) if key.startswith("mplug2.")]
    for names in modules:
        kind: Any = names.get(name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            known = [field.name for field in dataclasses.fields(kind) if field.init]
            if without not in known:
                return known
    return []
