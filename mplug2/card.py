"""Module cards: what a published module is, where its weights lie, what it reads and writes. JSON, one card a
module.

A card comes from strangers. Its `config` names a dataclass by import path (`"mplug2.modules.vision:Config"`);
only dataclasses of the zoo's own `mplug2.modules` are ever imported, so reading a card runs no code of its
author's. Every field is checked against its type here; checkpoints/card.schema.json says the same to other
programs.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError, Mplug2Error, nearest
from mplug2.remote import SCHEMES
from mplug2.roles import Config, base_of
from mplug2.weights import FLOATS, replacing

ZOO = "mplug2.modules"
_LARGEST_CARD = 1_000_000  # bytes; a real one has about 2,000
_LARGEST_NUMBER = 2**31 - 1  # sizes are indices of arrays
_LARGEST_FILE = 2**53  # bytes; every JSON reader knows whole numbers up to here

# module -> (streams it reads, streams it writes), as in mplug2.routes; other modules say their own
STREAMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vision": (("clips",), ("vision",)),
    "temporal": (("vision",), ("vision",)),
    "connector": (("vision",), ("vision",)),
    "text": (("ids",), ("text",)),
    "universal": (("vision", "text"), ("vision", "text")),
    "fusion": (("vision", "text"), ("vision", "text")),
    "decoder": (("ids", "vision", "text"), ("words",)),
    "contrastive": (("vision", "text"), ("unit vectors",)),
    "matching": (("text",), ("classes",)),
    "text_classifier": (("text",), ("classes",)),
    "vision_classifier": (("vision",), ("classes",)),
    "unmasker": (("text",), ("words",)),
}


@dataclass(frozen=True, kw_only=True)
class File:
    """The weights: a file name beside the card, its content, and where else to get it, in order of
    preference."""

    path: str
    sha256: str
    bytes: Annotated[int, _LARGEST_FILE]
    urls: tuple[str, ...] = ()

    def __post_init__(self):
        _plain_name("path", self.path)
        _hash("sha256", self.sha256)
        _expect(self.bytes > 0, "bytes", self.bytes, "a positive number")
        for url in self.urls:
            _expect(url.startswith(SCHEMES), "urls", url, f"addresses that begin with one of {SCHEMES}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How the weights came about. `data` names the data set and its version, `machine` what it ran on and how
    long."""

    recipe: str
    commit: str
    steps: int
    seed: int
    data: str
    machine: str

    def __post_init__(self):
        _expect(self.steps >= 0, "steps", self.steps, "a number of optimizer steps")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measured value with its 95% interval over `n` examples."""

    metric: str
    value: float
    low: float
    high: float
    n: int

    def __post_init__(self):
        _expect(self.n > 0, "n", self.n, "a positive number of examples")
        _expect(self.low <= self.high, "low", self.low, f"at most high, {self.high}")


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a module is connected by: streams read and written, the width of its tokens, the number of words
    it knows (where it has any), and the type its weights are stored in (they are float32 once loaded)."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    width: int
    dtype: str
    vocabulary: int | None = None

    def __post_init__(self):
        _expect(self.width > 0, "width", self.width, "a positive number")
        _expect(
            self.dtype in FLOATS, "dtype", self.dtype, f"one of {sorted(FLOATS)}{nearest(self.dtype, FLOATS)}"
        )


TokenizerKind = Literal["sentencepiece", "wordpiece", "official_wordpiece"]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokenizer whose ids the module was trained on: a file beside the card (or shipped), its id table,
    and what reads the file (mplug2.card_tokenizer). `lowercase` is said of word pieces, `prompt`, which
    captions were trained to begin with, of official ones; both are None where they are not."""

    file: str
    sha256: str
    ids: Mapping[str, int]
    kind: TokenizerKind = "sentencepiece"
    lowercase: bool | None = None
    prompt: str | None = None

    def __post_init__(self):
        _plain_name("file", self.file)
        _hash("sha256", self.sha256)
        _expect(self.ids.get("pad") == 0, "ids", dict(self.ids), "a table in which pad is 0")
        pieces = self.kind != "sentencepiece"
        _expect(pieces or self.lowercase is None, "lowercase", self.lowercase, "nothing, for sentencepiece")
        official = self.kind == "official_wordpiece"
        _expect(official or self.prompt is None, "prompt", self.prompt, f"nothing, for {self.kind}")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A module that another one came from: its card's name, the sha256 of its file, and the coefficient it
    was taken with."""

    name: str
    sha256: str
    coefficient: float = 1.0

    def __post_init__(self):
        _plain_name("name", self.name)
        _hash("sha256", self.sha256)


@dataclass(frozen=True, kw_only=True)
class Parents:
    """What a module was merged from (mplug2.merge), or trained from: then `method` is "train" and only the
    base is stated. `settings` are the method's numbers, `take` the names of the arrays that a graft took."""

    method: str
    merged: tuple[Parent, ...] = ()
    base: Parent | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    take: tuple[str, ...] = ()

    def __post_init__(self):
        _plain_name("method", self.method)
        there = bool(self.merged) or self.base is not None
        _expect(there, "merged", self.merged, "at least one parent, where no base is stated")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One published module. `module` is its name in a network (`vision`); `base`, of a delta only
    (`vision_delta`), is the sha256 of the weights that it adapts; `folder` is where the card was found."""

    name: str
    module: str
    config: Config
    file: File
    interface: Interface
    licence: str
    source: str = ""
    paper: str = ""
    trained: Trained | None = None
    parents: Parents | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    tokenizer: Tokens | None = None
    base: str | None = None
    folder: Path = field(default=Path(), compare=False, repr=False)

    def __post_init__(self):
        _plain_name("name", self.name)
        _expect(self.module.isidentifier(), "module", self.module, "the name of a module in a network")
        if (of := base_of(self.module)) is None:
            _expect(self.base is None, "base", self.base, f"nothing, {self.module} is no delta")
        else:
            _expect(self.base is not None, "base", self.base, f"the sha256 of the {of} that it adapts")
            _hash("base", self.base or "")
        _expect(bool(self.licence), "licence", self.licence, "an SPDX name")
        for name in ("width", "vocabulary"):
            said, real = getattr(self.interface, name), getattr(self.config, name, None)
            _expect(real is None or said == real, f"interface.{name}", said, f"{real}, as the config has it")

    @property
    def weights(self) -> Path:
        return self.folder / self.file.path

    def write(self) -> Path:
        """Writes `<name>.json` into the card's folder, whole or not at all; returns its path."""
        path = self.folder / f"{self.name}.json"
        with replacing(path) as file:
            file.write(json.dumps(encode(self), indent=2, ensure_ascii=False).encode() + b"\n")
        return path


def interface(module: str, config: Config, dtype: str) -> Interface:
    """The interface of a module that STREAMS knows, or of its delta, which is its base's. Raises CardError
    for another: it must be stated."""
    module, config = base_of(module) or module, getattr(config, "of", config)
    if module not in STREAMS:
        raise CardError(
            f"module {module!r} is none of {sorted(STREAMS)}{nearest(module, STREAMS)}: "
            "state its interface yourself"
        )
    reads, writes = STREAMS[module]
    width, vocabulary = getattr(config, "width", 0), getattr(config, "vocabulary", None)
    return Interface(reads=reads, writes=writes, width=width, dtype=dtype, vocabulary=vocabulary)


def read_json(path: Path, what: str) -> Any:
    """The JSON of a small file, a `what`. Raises CardError that names both."""
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_CARD + 1)
    except OSError as error:
        raise CardError(f"{what} {path}: cannot be read ({error.strerror})") from None
    if len(text) > _LARGEST_CARD:
        raise CardError(f"{what} {path}: longer than {_LARGEST_CARD} bytes")
    try:
        return json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CardError(f"{what} {path}: not JSON ({error})") from None


def read_card(path: Path) -> Card:
    """The card in a JSON file. Raises CardError with the file and the field that is wrong."""
    value = read_json(path, "card")
    try:
        card = decode(Card, value, "")
    except CardError as error:
        raise CardError(f"card {path}: {error}") from None
    return dataclasses.replace(card, folder=path.parent)


# --- Dataclasses as JSON: the zoo's own configs carry their type, the parts of a card have known ones


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
        _expect(right, where, value, f"a whole number of at most {arguments[1]}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _decode_choice(arguments, value, where)
    if origin is tuple:
        _typed(value, list, "a list", where)
        hints = (arguments[0],) * len(value) if arguments[-1] is Ellipsis else arguments
        _expect(len(value) == len(hints), where, value, f"{len(hints)} values")
        return tuple(decode(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if origin is typing.Literal:
        _expect(
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
        _expect(
            type(value) is int and abs(value) <= _LARGEST_NUMBER, where, value, "a whole number of 32 bits"
        )
        return value
    if hint is float:
        right = type(value) in (int, float) and abs(value) <= _LARGEST_NUMBER and math.isfinite(value)
        _expect(right, where, value, "a finite number")
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
    _expect(not expected or kinds[name] in expected, place, path, f"one of {names}")
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
    _expect(isinstance(value, kind), where or "the card", value, name)
    return value


def _expect(right: bool, where: str, value: Any, expected: str) -> None:
    if not right:
        raise CardError(_refusal(where, value, expected))


def _refusal(where: str, value: Any, expected: str) -> str:
    said = repr(value)
    return f"{where}: is {said if len(said) <= 80 else said[:77] + '...'}, expected {expected}"


def _plain_name(where: str, name: str) -> None:
    right = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name, re.ASCII) is not None
    _expect(right, where, name, "a plain file name (letters, digits, dots, dashes)")


def _hash(where: str, value: str) -> None:
    _expect(re.fullmatch(r"[0-9a-f]{64}", value, re.ASCII) is not None, where, value, "64 hexadecimal digits")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
