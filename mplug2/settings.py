"""The settings of a recipe: every field that decides what is computed, flat, as text; and where two recipes
differ in them.

Places (mplug2.places) are told, but do not decide: what lies there does, which a run knows by its digest and
its lock. A field that one side does not know, of an older version of the package, has its default there.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mplug2 import places, source
from mplug2.errors import RecipeError
from mplug2.network import flat
from mplug2.recipe import Recipe

OPERATION = ("evaluations", "mesh", "workers", "log_every", "checkpoint_every", "keep", "best")
"""Fields of a recipe that do not change what is learned: a run may be continued with others."""

_LONGEST = 4000  # letters of a value, as it is written into run.json


def settings(recipe: Recipe, *, operation: bool = False) -> dict[str, str]:
    """Every field of a recipe that decides what is computed, flat: `{"optimizer.learning_rate": "0.001",
    ...}`, places absolute. With `operation`, the others as well."""
    try:
        described = _described(places.fixed(recipe))
    except RecursionError:
        raise RecipeError(f"recipe {recipe.name} holds an object that holds itself") from None
    # The form of a delta decides something only where there is one.
    del described["delta"], described["deltas"]
    described |= {"deltas": _described(recipe.forms)} if recipe.forms else {}
    return flat({name: value for name, value in described.items() if operation or name not in OPERATION})


def fingerprint(recipe: Recipe) -> str:
    """sha256 of `settings`, links of places followed."""
    found = places.found(recipe)
    followed = places.put(recipe, {path: os.path.realpath(place) for path, place in found.items()})
    return hashlib.sha256(json.dumps(settings(followed), sort_keys=True).encode()).hexdigest()


def differences(theirs: Mapping[str, str], recipe: Recipe, *, operation: bool = False) -> list[str]:
    """The names of the settings in which a recipe differs from `theirs`, sorted."""
    ours = settings(recipe, operation=operation)
    aside = places.fields(recipe)
    names = {name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)} - aside
    new = names - {*theirs}
    return sorted(names - (new & set(_defaults(recipe, "")) if new else set()))


def in_words(names: list[str], theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Where two recipes' settings differ, in words: "there" and "here"."""
    told = [
        f"{name} is {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here" for name in names
    ]
    return "; ".join(told[:8]) + (f"; and {len(told) - 8} fields more" if len(told) > 8 else "")


def _defaults(value: Any, path: str) -> Iterator[str]:
    """The names of the settings that hold their default."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _defaults(inner, f"{path}.{key}" if path else str(key))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            inner, name = getattr(value, field.name), f"{path}.{field.name}" if path else field.name
            told = _described(inner)
            if _has_default(field) and told == _described(_default(field)):
                yield from (".".join((name, *key)) for key in _leaves(told))
            else:
                yield from _defaults(inner, name)


def _has_default(field: Any) -> bool:
    return not field.default is field.default_factory is dataclasses.MISSING


def _default(field: Any) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _leaves(described: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(described, dict):
        for key, inner in described.items():
            yield from ((key, *rest) for rest in _leaves(inner))
    else:
        yield ()


def _described(value: Any) -> Any:
    """Nested dicts of text. A callable is its import path; an array its shape and the hash of its content; an
    object is its type and what it holds."""
    if isinstance(value, Mapping):
        return _mapping(value) or "{}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: _described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"": _name(type(value)), **held} if not isinstance(value, Recipe) else held
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    if isinstance(value, functools.partial):
        return {"": _name(value.func), "args": _described(value.args), "keywords": _described(value.keywords)}
    if isinstance(value, (list, tuple)):
        return _short(repr([_described(inner) for inner in value]), value)
    if isinstance(value, set | frozenset):
        return _short(repr(sorted(str(_described(inner)) for inner in value)), value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if isinstance(value, str):
        return _short(repr(value), value)
    if isinstance(value, (int, float, bool, type(None))):
        return repr(value)
    if isinstance(value, np.ndarray | jax.Array):
        return _array(np.asarray(value))
    if isinstance(value, bytes | bytearray):
        return f"bytes {len(value)} {hashlib.sha256(value).hexdigest()}"
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    return {"": _name(type(value)), **_held(value)}


def _mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    if all(isinstance(key, str | int | float) for key in value) or not places.fields(value):
        told = {str(key): _described(inner) for key, inner in value.items()}
        return told if len(told) <= _LONGEST // 10 else {"": _short(json.dumps(told), value)}
    told = {}  # keys that hold places are told apart by their order, as places are
    for number, (key, inner) in enumerate(value.items()):
        described = _described(key)
        key_told = described if isinstance(described, dict) else {"": described}
        told[f"{number}"] = {**key_told, "share": _described(inner)}
    return told


def _short(text: str, value: Any) -> str:
    """A text that would fill pages is its hash."""
    if len(text) <= _LONGEST:
        return text
    content = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"{type(value).__name__} of {len(value)}, {content}"


def _array(value: np.ndarray) -> str:
    if value.dtype.hasobject:
        return f"array object {value.shape} {_described(value.tolist())}"
    content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return f"array {value.dtype} {value.shape} {content}"


def _held(value: Any) -> dict[str, Any]:
    """An object's attributes, what it has only computed of others (a cached property) left out."""
    computed = {
        name
        for base in type(value).__mro__
        for name, member in vars(base).items()
        if isinstance(member, functools.cached_property)
    }
    held = getattr(value, "__dict__", {})
    return {name: _described(inner) for name, inner in held.items() if name not in computed}


def _name(thing: Any) -> str:
    return f"{source.name_in_settings(thing.__module__)}.{thing.__qualname__}"
