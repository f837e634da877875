"""Places in a recipe: fields that name a file or a folder. A place says where something lies, not what it is.

A field is a place if it is annotated `Place` or `Path`, or, in a user's own class, if it holds a `Path` or is
called like one (`root`, `file`, `labels_path`) and names something that is there. What has the name of a
shipped file or card, and what is an address, is no place.
"""

import copy
import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from mplug2 import source

Place = Annotated[str, "place"]
"""The annotation of a text that names a file or a folder."""

_NAMES = ("root", "path", "file", "folder", "directory", "dir")


def found(recipe: Any, only: str = "") -> dict[str, str]:
    """The places of a recipe (those that begin with `only`) by dotted path, absolute: the same from any
    working folder."""
    told = ((path, text) for path, text in _places(recipe, "", "") if text.startswith(only))
    return {path: absolute(text) for path, text in told if _is_place(text)}


def fields(recipe: Any) -> set[str]:
    """The dotted paths of all fields that may hold a place."""
    return {path for path, _ in _places(recipe, "", "")}


def put(recipe: Any, places: Mapping[str, str]) -> Any:
    """The recipe with other places at these dotted paths; a path that it does not have is passed over."""
    return _put(recipe, "", places) if places else recipe


def fixed(recipe: Any) -> Any:
    """The recipe with all its places absolute."""
    return put(recipe, found(recipe))


def at_home(recipe: Any) -> Any:
    """The recipe with `~` in its places read as a shell reads it, which within `field=~/data` it does not."""
    return put(recipe, found(recipe, only="~"))


def nameless(recipe: Any) -> Any:
    """The recipe with the last name of each place alone: for what is published."""
    return put(recipe, {path: Path(place).name for path, place in found(recipe).items()})


def absolute(text: str) -> str:
    """Links are kept: what they point to may change with reason."""
    path = os.path.expanduser(text)
    return os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)


def _is_place(text: str) -> bool:
    if not text or "://" in text:
        return False
    if os.sep not in text and not text.startswith("~"):
        shelf = resources.files("mplug2.checkpoints")
        if (shelf / text).is_file() or (shelf / f"{text}.json").is_file():
            return False
        return os.path.exists(text)
    return True


def _places(value: Any, path: str, name: str, hint: Any = Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, os.PathLike):
        yield path, os.fspath(value)
    elif isinstance(value, str):
        if hint == Place or hint == "named" and _named(name) and os.path.exists(os.path.expanduser(value)):
            yield path, value
    else:
        for key, inner, kind in _held(value, hint):
            yield from _places(inner, f"{path}.{key}" if path else key, key, kind)


def _held(value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """What a value holds: (its step of a dotted path, itself, its annotation)."""
    inner = typing.get_args(hint)[-1] if typing.get_args(hint) else Any
    if isinstance(value, Mapping):
        for number, (key, one) in enumerate(value.items()):
            if not isinstance(key, str):
                yield f"{number}", key, Any
            yield (key if isinstance(key, str) else f"{number}.share"), one, inner
    elif isinstance(value, tuple | list):
        yield from ((f"{number}", one, inner) for number, one in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        ours = type(value).__module__.startswith("mplug2.")
        hints = _hints(type(value))
        for field in dataclasses.fields(value):
            kind = hints.get(field.name, Any)
            yield field.name, getattr(value, field.name), kind if ours or kind == Place else "named"
    elif source.is_of_recipe(type(value).__module__):
        yield from ((name, one, "named") for name, one in getattr(value, "__dict__", {}).items())


def _named(name: str) -> bool:
    return name in _NAMES or name.endswith(tuple(f"_{one}" for one in _NAMES))


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _put(value: Any, path: str, places: Mapping[str, str]) -> Any:
    if path in places and isinstance(value, str | os.PathLike):
        return places[path] if isinstance(value, str) else Path(places[path])
    start = f"{path}." if path else ""
    if not any(place.startswith(start) for place in places):
        return value
    held = {key: _put(one, f"{start}{key}", places) for key, one, _ in _held(value, Any)}
    if isinstance(value, Mapping):
        keys = [key if isinstance(key, str) else held[f"{n}"] for n, key in enumerate(value)]
        values = [held[key if isinstance(key, str) else f"{n}.share"] for n, key in enumerate(value)]
        return dict(zip(keys, values, strict=True))
    if isinstance(value, tuple | list):
        return type(value)(held.values())
    changed = {name: one for name, one in held.items() if one is not getattr(value, name)}
    if not changed:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **changed)
    other = copy.copy(value)
    for name, one in changed.items():
        setattr(other, name, one)
    return other
