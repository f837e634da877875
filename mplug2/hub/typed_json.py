"""Dataclasses as JSON, and JSON from strangers as dataclasses.

A module's config carries its type by import path (`"mplug2.modules.vision:Config"`); only dataclasses of the
zoo's own `mplug2.modules` are ever imported, so reading a file runs no code of its author's. The parts of a
card have known types and carry none. Every value is checked against its field's type.
"""

import dataclasses
import errno
import importlib
import importlib.util
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from mplug2 import files
from mplug2.errors import CardError, Mplug2Error, nearest
from mplug2.roles import Config

ZOO = "mplug2.modules"
_LARGEST_FILE = 1_000_000  # bytes; a real card has about 2,000
_LARGEST_NUMBER = 2**31 - 1  # sizes are indices of arrays
_DEEPEST = 20  # values within values; a delta in a lock has 7, and whatever walks a config calls itself


def read_json(path: Path, what: str) -> Any:
    """The JSON of a small regular file, a `what`, whose texts are UTF-8. Raises CardError that names both."""
    try:
        text = files.read_regular(path, _LARGEST_FILE)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise CardError(f"{what} {path}: {error.strerror}") from None
        raise CardError(f"{what} {path}: cannot be read ({error.strerror})") from None
    return parsed(text, f"{what} {path}")


def parsed(text: bytes, who: str) -> Any:
    """The value that JSON from strangers spells. Raises CardError that begins with `who`."""
    try:
        value = json.loads(text.decode(), parse_constant=_no_constant)
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # half a character can be read, and never written
    except (ValueError, RecursionError) as error:
        raise CardError(f"{who}: not JSON ({error})") from None
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        inner = (
            one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)
        )
        if not (level := [part for parts in inner for part in parts]):
            return
    raise ValueError(f"nested too deeply, more than {_DEEPEST} values within each other")


def encode(value: Any) -> Any:
    """A card, a config, or any part of one -> what JSON holds. Parts that are None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        typed = {"type": f"{kind.__module__}:{kind.__qualname__}"} if _of_zoo(kind) else {}
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name != "folder"}
        return typed | {name: encode(part) for name, part in fields.items() if part is not None}
    if isinstance(value, Mapping):
        return {name: encode(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [encode(part) for part in value]
    return value


def decode(hint: Any, value: Any, where: str) -> Any:
    """JSON -> a value of the type `hint`. Raises CardError that names the field `where`, both sides and the
    nearest name."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:  # a whole number and its bound
        right = type(value) is int and abs(value) <= arguments[1]
        expect(right, where, value, f"a whole number of at most {arguments[1]}")
        return value
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_choice(arguments, value, where)
    if origin is tuple:
        _typed(value, list, "a list", where)
        hints = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        expect(len(value) == len(hints), where, value, f"{len(hints)} values")
        return tuple(decode(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if origin is typing.Literal:
        expect(
            value in arguments,
            where,
            value,
            f"one of {list(arguments)}{nearest(str(value), map(str, arguments))}",
        )
        return value
    if origin is not None and issubclass(origin, Mapping):
        _typed(value, dict, "an object", where)
        return {name: decode(arguments[1], part, _inside(where, name)) for name, part in value.items()}
    if hint is Config:
        return _decode_zoo((), value, where)
    if dataclasses.is_dataclass(hint) and _of_zoo(hint):
        return _decode_zoo((hint,), value, where)
    if dataclasses.is_dataclass(hint):
        return _decode_fields(hint, _typed(value, dict, "an object", where), where)
    return _decode_plain(hint, value, where)


def _decode_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is str:
        return _typed(value, str, "a text", where)
    if hint is bool:
        return _typed(value, bool, "true or false", where)
    if hint is int:
        expect(
            type(value) is int and abs(value) <= _LARGEST_NUMBER, where, value, "a whole number of 32 bits"
        )
        return value
    if hint is float:
        right = type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER and math.isfinite(value)
        expect(right, where, value, "a finite number")
        return float(value)
    raise CardError(f"{where}: values of type {hint} cannot be read from a card")


def _decode_choice(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """`A | None`, or one of several dataclasses of the zoo, told apart by the type they carry."""
    if value is None and type(None) in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not type(None))
    if len(hints) == 1:
        return decode(hints[0], value, where)
    if all(dataclasses.is_dataclass(hint) for hint in hints):
        return _decode_zoo(hints, value, where)
    for hint in hints:
        try:
            return decode(hint, value, where)
        except CardError:
            continue
    raise CardError(_refusal(where, value, f"one of the types {[str(hint) for hint in hints]}"))


def _decode_zoo(expected: tuple[Any, ...], value: Any, where: str) -> Any:
    """A dataclass of mplug2.modules by the import path it carries; one of `expected`, if any are named."""
    _typed(value, dict, "an object", where)
    if "type" not in value:
        raise CardError(f'{where}: has no "type", expected one like "{ZOO}.vision:Config"')
    path, place = value["type"], _inside(where, "type")
    match = re.fullmatch(rf"{re.escape(ZOO)}\.([a-z][a-z0-9_]*):([A-Z][A-Za-z0-9_]*)", str(path), re.ASCII)
    if match is None:
        raise CardError(
            _refusal(place, path, f'a dataclass of the zoo, "{ZOO}.<file>:<Config>"; no other is imported')
        )
    file, name = match.groups()
    if importlib.util.find_spec(f"{ZOO}.{file}") is None:
        raise CardError(_refusal(place, path, f"a file of {ZOO}{nearest(file, _files())}"))
    found = importlib.import_module(f"{ZOO}.{file}")
    kinds = {
        n: kind
        for n, kind in vars(found).items()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type)
    }
    kinds = {n: kind for n, kind in kinds.items() if kind.__module__ == found.__name__}
    if name not in kinds:
        raise CardError(_refusal(place, path, f"one of {sorted(kinds)}{nearest(name, kinds)}"))
    names = [f"{kind.__module__}:{kind.__qualname__}" for kind in expected]
    expect(not expected or kinds[name] in expected, place, path, f"one of {names}")
    return _decode_fields(kinds[name], {n: part for n, part in value.items() if n != "type"}, where)


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init and f.name != "folder"}
    for name in value:
        if name not in fields:
            raise CardError(
                f"{_inside(where, name)}: no such field, known are {sorted(fields)}{nearest(name, fields)}"
            )
    for name, f in fields.items():
        if name not in value and f.default is f.default_factory is dataclasses.MISSING:
            raise CardError(f"{_inside(where, name)}: missing")
    decoded = {name: decode(hints[name], part, _inside(where, name)) for name, part in value.items()}
    try:
        return kind(**decoded)
    except CardError as error:  # of the part's own check, which names its field
        raise CardError(f"{where}.{error}" if where else str(error)) from None
    except (
        Mplug2Error,
        TypeError,
        ValueError,
        ArithmeticError,
    ) as error:  # of a config's own check or arithmetic
        raise CardError(f"{where}: {kind.__name__} refuses these values ({error})") from None


def _of_zoo(kind: Any) -> bool:
    return kind.__module__.startswith(f"{ZOO}.")


def _files() -> list[str]:
    folders = importlib.import_module(ZOO).__path__
    return [path.stem for folder in folders for path in Path(folder).glob("[a-z]*.py")]


def _inside(where: str, name: str) -> str:
    said = name if name.isprintable() and len(name) <= 80 else repr(name[:80])  # a refusal is one line
    return f"{where}.{said}" if where else said


def _typed(value: Any, kind: type, name: str, where: str) -> Any:
    expect(isinstance(value, kind), where or "the card", value, name)
    return value


def expect(right: bool, where: str, value: Any, expected: str) -> None:
    if not right:
        raise CardError(_refusal(where, value, expected))


def _refusal(where: str, value: Any, expected: str) -> str:
    said = repr(value)
    return f"{where}: is {said if len(said) <= 80 else said[:77] + '...'}, expected {expected}"


def plain_name(where: str, name: str) -> None:
    right = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name, re.ASCII) is not None
    expect(right, where, name, "a plain file name (letters, digits, dots, dashes)")


def is_sha256(where: str, value: str) -> None:
    expect(re.fullmatch(r"[0-9a-f]{64}", value, re.ASCII) is not None, where, value, "64 hexadecimal digits")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
