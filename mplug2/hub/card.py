"""Module cards: what a published module is, where its weights lie, what it reads and writes. JSON, one card a
module.

A card comes from strangers: mplug2.hub.typed_json reads it, and what its fields must be is checked here.
checkpoints/card.schema.json says the same to other programs.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mplug2 import files
from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError, nearest
from mplug2.hub.remote import SCHEMES
from mplug2.hub.typed_json import decode, encode, expect, is_sha256, plain_name, read_json
from mplug2.hub.weights import FLOATS, replacing
from mplug2.roles import Config, base_of

COMMITTED = ".published"
"""A folder within a folder of cards, of cards that are to take their places there: see
mplug2.hub.publication."""

LARGEST_FILE = 2**53  # bytes; every JSON reader knows whole numbers up to here

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
    bytes: Annotated[int, LARGEST_FILE]
    urls: tuple[str, ...] = ()

    def __post_init__(self):
        plain_name("path", self.path)
        is_sha256("sha256", self.sha256)
        expect(self.bytes > 0, "bytes", self.bytes, "a positive number")
        for url in self.urls:
            expect(url.startswith(SCHEMES), "urls", url, f"addresses that begin with one of {SCHEMES}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How the weights came about. `data` names the data set and its version, `data_sha256` is of a sample of
    its train split (mplug2.data.digest), where it could be read; `machine`: what it ran on and how long."""

    recipe: str
    commit: str
    steps: int
    seed: int
    data: str
    machine: str
    data_sha256: str | None = None

    def __post_init__(self):
        expect(self.steps >= 0, "steps", self.steps, "a number of optimizer steps")
        if self.data_sha256 is not None:
            is_sha256("data_sha256", self.data_sha256)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A measured value with its 95% interval over `n` examples."""

    metric: str
    value: float
    low: float
    high: float
    n: int

    def __post_init__(self):
        expect(self.n > 0, "n", self.n, "a positive number of examples")
        expect(self.low <= self.high, "low", self.low, f"at most high, {self.high}")


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
        expect(self.width > 0, "width", self.width, "a positive number")
        expect(
            self.dtype in FLOATS, "dtype", self.dtype, f"one of {sorted(FLOATS)}{nearest(self.dtype, FLOATS)}"
        )


TokenizerKind = Literal["sentencepiece", "wordpiece", "official_wordpiece"]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokenizer whose ids the module was trained on: a file beside the card (or shipped), its id table,
    and what reads the file (mplug2.hub.card_tokenizer). `lowercase` is said of word pieces, `prompt`, which
    captions were trained to begin with, of official ones; both are None where they are not."""

    file: str
    sha256: str
    ids: Mapping[str, int]
    kind: TokenizerKind = "sentencepiece"
    lowercase: bool | None = None
    prompt: str | None = None

    def __post_init__(self):
        plain_name("file", self.file)
        is_sha256("sha256", self.sha256)
        expect(self.ids.get("pad") == 0, "ids", dict(self.ids), "a table in which pad is 0")
        pieces = self.kind != "sentencepiece"
        expect(pieces or self.lowercase is None, "lowercase", self.lowercase, "nothing, for sentencepiece")
        official = self.kind == "official_wordpiece"
        expect(official or self.prompt is None, "prompt", self.prompt, f"nothing, for {self.kind}")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """How the questions that a module was trained on were worded (mplug2.data.wording), after how many
    words they were cut."""

    kind: Literal["plain", "official"]
    words: int

    def __post_init__(self):
        expect(self.words > 0, "words", self.words, "a positive number")


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A module that another one came from: its card's name, the sha256 of its file, and the coefficient it
    was taken with."""

    name: str
    sha256: str
    coefficient: float = 1.0

    def __post_init__(self):
        plain_name("name", self.name)
        is_sha256("sha256", self.sha256)


@dataclass(frozen=True, kw_only=True)
class Parents:
    """What a module was merged from (mplug2.hub.merge), or trained from: then `method` is "train", or the
    form of the delta that was merged into its base ("lora"), whose card is stated where it began from one.
    `settings` are the method's numbers, `take` the names of the arrays that a graft took."""

    method: str
    merged: tuple[Parent, ...] = ()
    base: Parent | None = None
    settings: Mapping[str, float] = field(default_factory=dict)
    take: tuple[str, ...] = ()

    def __post_init__(self):
        plain_name("method", self.method)
        there = bool(self.merged) or self.base is not None
        expect(there, "merged", self.merged, "at least one parent, where no base is stated")


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
    questions: Questions | None = None
    base: str | None = None
    folder: Path = field(default=Path(), compare=False, repr=False)

    def __post_init__(self):
        plain_name("name", self.name)
        expect(self.module.isidentifier(), "module", self.module, "the name of a module in a network")
        if (of := base_of(self.module)) is None:
            expect(self.base is None, "base", self.base, f"nothing, {self.module} is no delta")
        else:
            expect(self.base is not None, "base", self.base, f"the sha256 of the {of} that it adapts")
            is_sha256("base", self.base or "")
        expect(bool(self.licence), "licence", self.licence, "an SPDX name")
        for name in ("width", "vocabulary"):
            said, real = getattr(self.interface, name), getattr(self.config, name, None)
            expect(real is None or said == real, f"interface.{name}", said, f"{real}, as the config has it")

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


def draft(
    name: str, module: str, config: Config, connects: Interface | None = None, base: str | None = None
) -> Card:
    """The card of a module whose file is still to be written."""
    return Card(
        name=name,
        module=module,
        config=config,
        file=File(path=f"{name}.safetensors", sha256="0" * 64, bytes=1),
        interface=connects or interface(module, config, "float32"),
        licence="Apache-2.0",
        base=base,
    )


def read_card(path: Path) -> Card:
    """The card in a JSON file. Raises CardError with the file and the field that is wrong."""
    value = _read(path)
    try:
        card = decode(Card, value, "")
    except CardError as error:
        raise CardError(f"card {path}: {error}") from None
    return dataclasses.replace(card, folder=path.parent)


def _read(path: Path) -> Any:
    """What is on its way into a folder by a publication that was committed counts before what lies there
    (mplug2.hub.publication)."""
    waiting = path.parent / COMMITTED / path.name
    if waiting.is_file():
        try:
            return read_json(waiting, "card")
        except CardError:
            if waiting.is_file():
                raise
    return read_json(path, "card")


def card_files(folder: Path) -> list[Path]:
    """The places of a folder's cards, sorted; a lock, a report or a schema that lies beside them is no
    card."""
    others = (".schema.json", ".release.json", ".lock.json", ".load_report.json")
    names = {path.name for place in (folder, folder / COMMITTED) for path in place.glob("*.json")}
    return [folder / name for name in sorted(names) if not f".{name}".endswith(others)]


def read_cards(folder: Path) -> list[Card]:
    """All cards of a folder, of one moment: no publication is seen in part. Raises CardError."""
    try:
        with files.locked(folder, exclusive=False):
            return [read_card(path) for path in card_files(folder)]
    except TimeoutError as error:
        raise CardError(f"{folder}: cannot be read ({error.strerror})") from None
