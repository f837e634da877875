"""A recipe as JSON, so that a run holds all of it and needs no file to find it again.

A dataclass is `{"type": "mplug2.recipe:AdamW", ...}`, a function `{"function": "mplug2.tasks:caption"}`, a
mapping whose keys are no texts `{"pairs": [[key, value], ...]}`. What is read may be a stranger's: it names
dataclasses and functions of the files below and no others, and reading them runs no code of its author's.
"""

import dataclasses
import importlib
import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from mplug2.errors import Mplug2Error, RecipeError, nearest
from mplug2.recipe import Recipe

DATACLASSES = (
    "mplug2.caption_scores",
    "mplug2.data",
    "mplug2.evaluations",
    "mplug2.generate",
    "mplug2.modules",
    "mplug2.official_search",
    "mplug2.ranking",
    "mplug2.recipe",
    "mplug2.roles",
    "mplug2.sharding",
)
FUNCTIONS = ("mplug2.metrics", "mplug2.tasks")
_KEYS = ("type", "function", "pairs")
_PATH = re.compile(r"mplug2(\.[a-z][a-z0-9_]*)+:[A-Za-z][A-Za-z0-9_]*", re.ASCII)


class NotOursError(RecipeError):
    """A recipe that holds something which only its own code can make."""


def encode(recipe: Recipe) -> Any:
    """JSON that `decode` makes an equal recipe of. Raises NotOursError."""
    told = _encoded(recipe)
    try:
        same = decode(told) == recipe
    except Mplug2Error as error:
        raise NotOursError(str(error)) from None
    if not same:
        raise NotOursError(f"recipe {recipe.name} is not equal to what is written of it")
    return told


def decode(value: Any) -> Recipe:
    """Raises RecipeError that names the field which is wrong."""
    recipe = _decoded(value, "")
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"expected a Recipe, got a {type(recipe).__name__}")
    return recipe


def _encoded(value: Any) -> Any:
    if isinstance(value, bool | str | type(None)) or type(value) is int:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is tuple:
        return [_encoded(one) for one in value]
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and not any(key in value for key in _KEYS):
            return {key: _encoded(one) for key, one in value.items()}
        return {"pairs": [[_encoded(key), _encoded(one)] for key, one in value.items()]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _encoded(getattr(value, field.name)) for field in _fields(type(value))}
        return {"type": _import_path(type(value), DATACLASSES), **fields}
    if inspect.isfunction(value):
        return {"function": _import_path(value, FUNCTIONS)}
    raise NotOursError(f"a {type(value).__name__} cannot be written down")


def _decoded(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(one, f"{where}[{place}]") for place, one in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "function" in value:
        return _imported(value["function"], FUNCTIONS, where, inspect.isfunction, "function")
    if "pairs" in value:
        pairs = [(_decoded(key, where), _decoded(one, where)) for key, one in _pairs(value["pairs"], where)]
        try:
            return dict(pairs)
        except TypeError as error:
            raise RecipeError(f"{where}.pairs: {error}") from None
    fields = {key: _decoded(one, f"{where}.{key}" if where else key) for key, one in value.items()}
    if "type" not in fields:
        return fields
    kind = _imported(fields.pop("type"), DATACLASSES, where, _is_dataclass, "dataclass")
    known = {field.name: field for field in _fields(kind)}
    for name in fields:
        if name not in known:
            raise RecipeError(f"{where}.{name}: {kind.__name__} has no such field{nearest(name, known)}")
    try:
        return kind(**fields)
    except Mplug2Error as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from None
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        raise RecipeError(f"{where}: {kind.__name__} refuses these values ({error})") from None


def _pairs(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise RecipeError(f"{where}.pairs: expected pairs of a key and a value")
    return value


def _fields(kind: Any) -> list[Any]:
    return [field for field in dataclasses.fields(kind) if field.init]


def _is_dataclass(thing: Any) -> bool:
    return isinstance(thing, type) and dataclasses.is_dataclass(thing)


def _import_path(thing: Any, rooms: tuple[str, ...]) -> str:
    path = f"{thing.__module__}:{thing.__qualname__}"
    if not _allowed(path, rooms):
        raise NotOursError(f"{path} is not the zoo's")
    return path


def _allowed(path: Any, rooms: tuple[str, ...]) -> bool:
    if not isinstance(path, str) or _PATH.fullmatch(path) is None:
        return False
    module = path.partition(":")[0]
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def _imported(path: Any, rooms: tuple[str, ...], where: str, right: Any, what: str) -> Any:
    if not _allowed(path, rooms):
        raise RecipeError(f"{where}: {path!r} is not a {what} of {', '.join(rooms)}")
    module, _, name = path.partition(":")
    try:
        thing = getattr(importlib.import_module(module), name, None)
    except ImportError:
        thing = None
    if not right(thing) or thing.__module__ != module:
        raise RecipeError(f"{where}: this version of mplug2 has no {what} {path!r}")
    return thing
