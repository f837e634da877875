"""Whether the fields of a recipe hold what their annotations say, and where not, in words.

Values of the zoo's own dataclasses are checked, at any depth. Those of a user's classes are the user's
business: only that they have the methods that their place asks for is looked at.
"""

import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from mplug2.errors import nearest

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "None",
}
_KINDS = {bool: (bool, np.bool_), int: numbers.Integral, float: numbers.Real, str: str}


def mismatch(value: Any) -> str | None:
    """Of a dataclass, the first field at any depth that holds something else than its annotation says, with
    what it holds and what was expected; None if all are right."""
    return _in_fields(value, "")


def _in_fields(value: Any, where: str) -> str | None:
    for name, hint in _hints(type(value)).items():
        if name not in vars(value):  # not yet set: the value is being made
            continue
        if told := _wrong(vars(value)[name], hint, f"{where}.{name}" if where else name):
            return told
    return None


def _wrong(value: Any, hint: Any, where: str) -> str | None:
    if not fits(value, hint):
        return f"{where} is {said(value)}, expected {expected(hint, value)}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        ours = type(value).__module__.partition(".")[0] == "mplug2"
        return _in_fields(value, where) if ours else None
    inner = _inner(hint, value)
    if isinstance(value, Mapping):
        told = (_wrong(one, inner[-1] if inner else Any, f"{where}.{key}") for key, one in value.items())
        return next(filter(None, told), None)
    if isinstance(value, tuple | list):
        hints = inner if inner and len(inner) == len(value) else [inner[0] if inner else Any] * len(value)
        told = (
            _wrong(one, kind, f"{where}[{place}]")
            for place, (one, kind) in enumerate(zip(value, hints, strict=True))
        )
        return next(filter(None, told), None)
    return None


def _inner(hint: Any, value: Any) -> list[Any]:
    """The annotations of what a mapping, a tuple or a list holds."""
    if typing.get_origin(hint) is Annotated:
        return _inner(typing.get_args(hint)[0], value)
    if _is_union(hint):
        return next((_inner(one, value) for one in typing.get_args(hint) if fits(value, one)), [])
    return [one for one in typing.get_args(hint) if one is not ...]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated kind; what it holds is not looked at, the length of a tuple is."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return fits(value, options[0])
    if _is_union(hint):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return any(value is option or (type(value) is type(option) and value == option) for option in options)
    if origin is tuple:
        return isinstance(value, tuple) and (options[1:] == (...,) or len(value) == len(options))
    if origin is Callable:
        return callable(value)
    kind = origin or hint
    if kind in _KINDS:
        return isinstance(value, _KINDS[kind]) and (kind is bool or not isinstance(value, bool | np.bool_))
    if kind is Any or not isinstance(kind, type):
        return True
    if getattr(kind, "_is_protocol", False) and kind.__module__.partition(".")[0] == "mplug2":
        return not missing(value, kind)
    if kind in (list, Sequence, Iterable):
        return isinstance(value, kind) and not isinstance(value, str)
    return isinstance(value, kind)


def missing(value: Any, protocol: type) -> list[str]:
    """The methods of a protocol that a value lacks; properties are not read."""
    wanted = [
        name
        for base in protocol.__mro__
        if getattr(base, "_is_protocol", False)
        for name in {**vars(base), **vars(base).get("__annotations__", {})}
        if name == "__call__" or not name.startswith("_")
    ]
    return [name for name in dict.fromkeys(wanted) if not _has(value, name)]


def _has(value: Any, name: str) -> bool:
    try:
        inspect.getattr_static(value, name)
    except AttributeError:
        return hasattr(type(value), "__getattr__")
    return True


def said(value: Any) -> str:
    """A value, short enough for a sentence."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if dataclasses.is_dataclass(value):
        return f"a {type(value).__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    if isinstance(value, np.ndarray):
        return f"an array {value.dtype} {value.shape}"
    if isinstance(value, str | int | float | bool | types.NoneType | tuple | list | dict | Mapping):
        text = " ".join(repr(value).split())
        return text if len(text) <= 80 else f"{text[:77]}... (a {type(value).__name__})"
    return f"a {type(value).__name__}"


def expected(hint: Any, value: Any = None) -> str:
    """An annotation in words; where `value` could be meant for one of a Literal's, with the nearest."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return expected(options[0], value)
    if _is_union(hint):
        return " or ".join(expected(option, value) for option in options)
    if origin is Literal:
        close = nearest(value, map(str, options)) if isinstance(value, str) else ""
        return f"one of {', '.join(map(repr, options))}{close}"
    if origin is tuple:
        inner = [expected(option) for option in options if option is not ...]
        return (
            f"a tuple of {inner[0]} each"
            if options[1:] == (...,)
            else f"a tuple of {len(inner)}: {', '.join(inner)}"
        )
    kind = origin or hint
    if origin is Callable:
        return "a function"
    if kind in _WORDS:
        return _WORDS[kind]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping" + (f" of {expected(options[1])}" if options and options[1] is not Any else "")
    if getattr(kind, "_is_protocol", False):
        lacks = missing(value, kind)
        return f"a {kind.__name__} (it has no {', '.join(lacks)})" if lacks else f"a {kind.__name__}"
    return f"a {getattr(kind, '__name__', kind)}"


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields; none where they cannot be resolved."""
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name in hints}
