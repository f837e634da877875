"""Overrides: `optimizer.learning_rate=3e-4` changes a recipe from the command line, as `dataclasses.replace`
does.

A path walks fields of dataclasses and keys of mappings; the value is read by the field's annotation (int,
float, bool, str, tuples as `32,32`, one of a Literal, `none` where a field may be None). `none` for an entry
of a mapping removes it. All overrides take effect at once, so that a recipe which checks itself sees the
final state only.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from mplug2.errors import RecipeError, nearest

T = TypeVar("T")
_LEAVES = (bool, int, float, str)


def apply(recipe: T, overrides: Iterable[str]) -> T:
    """`recipe` (any dataclass) with `field.field=value` overrides. Raises RecipeError on an unknown field or
    a wrong type."""
    changes: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise RecipeError(
                f'override "{override}" is not of the form field=value, e.g. optimizer.learning_rate=3e-4'
            )
        *parents, leaf = path.strip().split(".")
        node = changes
        for parent in parents:
            node = node.setdefault(parent, {})
            if isinstance(node, str):
                raise RecipeError(f'override "{override}" goes into a field that another override replaces')
        if isinstance(node.get(leaf), dict):
            raise RecipeError(f'override "{override}" replaces a field that another override goes into')
        node[leaf] = text.strip()
    return _changed(recipe, type(recipe), changes, ()) if changes else recipe


def _changed(value: Any, hint: Any, change: Any, path: tuple[str, ...]) -> Any:
    """`value`, annotated `hint`, with a change: the text of a new value, or changes of its own fields by
    name."""
    if isinstance(change, str):
        return _parse(change, hint, value, path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        known = [field.name for field in dataclasses.fields(value) if field.init]
        for name in change:
            if name not in known:
                known_names = f"known are {', '.join(known)}{nearest(name, known)}"
                raise RecipeError(f"{_said((*path, name))}: no such field; {known_names}")
        fields = {
            name: _changed(getattr(value, name), hints[name], inner, (*path, name))
            for name, inner in change.items()
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        return _changed_mapping(value, hint, change, path)
    name = next(iter(change))
    raise RecipeError(f"{_said((*path, name))}: {_said(path)} is {value!r}, which has no fields")


def _changed_mapping(
    value: Mapping[Any, Any], hint: Any, change: Mapping[str, Any], path: tuple[str, ...]
) -> Any:
    entry = (*typing.get_args(hint), Any, Any)[1]
    changed = dict(value)
    for name, inner in change.items():
        # A new entry is a plain value (a mode, a card, a length); a module or an objective cannot be spelled
        # here.
        if name not in value and not (isinstance(inner, str) and _plain(entry)):
            known = [str(key) for key in value]
            known_names = f"known are {', '.join(known) or 'none'}{nearest(name, known)}"
            raise RecipeError(f"{_said((*path, name))}: no such entry; {known_names}")
        if inner == "none" and name in value:
            del changed[name]
        else:
            changed[name] = _changed(value.get(name), entry, inner, (*path, name))
    return changed


def _parse(text: str, hint: Any, value: Any, path: tuple[str, ...]) -> Any:
    """The value that `text` spells for a field annotated `hint` that holds `value`."""
    if not _plain(hint):
        if not isinstance(value, _LEAVES):
            fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
            fields = fields or (list(map(str, value)) if isinstance(value, Mapping) else [])
            inside = f"; set one of its fields: {', '.join(fields)}" if fields else ""
            raise RecipeError(
                f"{_said(path)} holds a {type(value).__name__}, which text cannot spell{inside}"
            )
        hint = type(value)
    try:
        return _read(text, hint)
    except ValueError:
        options = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        raise RecipeError(
            f"{_said(path)} expects {_expected(hint)}, got {text!r}{nearest(text, map(str, options))}"
        ) from None


def _read(text: str, hint: Any) -> Any:
    """Text by type; ValueError where it does not fit."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {str(option): option for option in options}[_one_of(text, map(str, options))]
    if origin in (types.UnionType, typing.Union):
        for option in options:
            try:
                return _read(text, option)
            except ValueError:
                continue
        raise ValueError
    if origin is tuple:
        words = [word.strip() for word in text.strip("()[]").split(",") if word.strip()]
        kinds = [options[0]] * len(words) if options[1:] == (...,) else options
        return tuple(_read(word, kind) for word, kind in zip(words, kinds, strict=True))
    if hint is types.NoneType:
        return {"none": None}[_one_of(text, ["none"])]
    if hint is bool:
        return {"true": True, "false": False}[_one_of(text, ["true", "false"])]
    return hint(text)


def _one_of(text: str, options: Iterable[str]) -> str:
    if text not in set(options):
        raise ValueError
    return text


def _plain(hint: Any) -> bool:
    """Whether text can spell a value of this annotation."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal or hint is types.NoneType or hint in _LEAVES:
        return True
    if origin in (types.UnionType, typing.Union, tuple):
        return all(option is ... or _plain(option) for option in options)
    return False


def _expected(hint: Any) -> str:
    """An annotation in words."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, options))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_expected, options))
    if origin is tuple:
        if options[1:] == (...,):
            return f"{_expected(options[0])}s with commas between"
        return f"{len(options)} values with commas between ({', '.join(map(_expected, options))})"
    words = {bool: "true or false", int: "an int", float: "a float", str: "a text", types.NoneType: "none"}
    return words[hint]


def _said(path: tuple[str, ...]) -> str:
    return ".".join(path)
