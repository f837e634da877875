"""What a word on a command line is: decided once, here, by what it must hold, for every command.

    word = opened("runs/mine", "predict", Kind.RUN, *BUNDLES, *CARDS)

What is on the disk comes before names, except names of cards on the shelf (`./vision-small` is the file).
A folder from outside may call itself anything: one whose lock lists cards that lie beside it is a bundle,
whatever else it holds, and is opened as one. Nothing is run to find that out.
"""

import enum
import importlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplug2 import hub, run
from mplug2.errors import CardError, RecipeError, nearest
from mplug2.hub import lock, release
from mplug2.hub.card import card_files
from mplug2.hub.typed_json import read_json


class Kind(enum.Enum):
    """What a word may be, and how that is called."""

    RUN = "a run directory"
    BUNDLE = "a bundle's folder"
    TAR = "a bundle's tar"
    CARD = "a card"
    DELTA = "the card of a delta"
    FOLDER = "a folder of cards"
    SHELF = "a card of the shelf"
    FAMILY = "a family of the shelf"
    RECIPE = "a recipe"
    LOCK = "a lock"
    RELEASE = "a released checkpoint"
    MODULE = "a module of the zoo"
    ADDRESS = "an address"


CARDS = (Kind.CARD, Kind.DELTA, Kind.FOLDER, Kind.SHELF, Kind.FAMILY)
BUNDLES = (Kind.BUNDLE, Kind.TAR)

_TAKEN = {
    Kind.RUN: '"mplug2 publish {0} --to DIR" makes cards of it; eval, predict, bundle, lock, show take it',
    Kind.BUNDLE: "predict, eval, compose, merge, show and download take it",
    Kind.TAR: 'predict and eval take it; "mplug2 bundle {0} --out DIR" makes a folder of it',
    Kind.CARD: "predict, eval, compose, merge, show and download take cards",
    Kind.DELTA: 'predict and eval take it beside the cards of what it adapts: "mplug2 predict CARDS {0}"',
    Kind.FOLDER: "predict, eval, compose, merge, show and download take cards",
    Kind.SHELF: "predict, eval, compose, merge, show and download take cards",
    Kind.FAMILY: "predict, eval, compose, merge, show and download take families",
    Kind.RECIPE: '"mplug2 train {0}" makes a run of it; eval, bundle, lock and show take it',
    Kind.LOCK: '"mplug2 lock {0}" checks it; a bundle is the folder that it lies in',
    Kind.RELEASE: '"mplug2 download {0}" makes cards of it',
    Kind.MODULE: '"mplug2 show {0}" explains it',
    Kind.ADDRESS: '"mplug2 publish RUN --to {0}" writes there; download what lies there first',
}


@dataclass(frozen=True)
class Word:
    """A word and what it is; `path`: where that is, if it lies on the disk."""

    text: str
    kind: Kind
    path: Path = Path()


class UnknownWord(RecipeError, CardError):
    """A word that is nothing of what a command takes, and nothing else either."""


def opened(text: str, command: str, *kinds: Kind) -> Word:
    """What a word is that a command takes `kinds` of. Raises RecipeError that says what it is instead and
    which command takes that, UnknownWord with the nearest name; CardError for a damaged file."""
    found = look(text)
    if isinstance(found, str):
        only_cards = Kind.RECIPE not in kinds
        what = f'no card "{text}"' if only_cards else f'"{text}" is no {_listed(kinds)[2:]}'
        known = [name for kind, names in _names().items() if kind in kinds for name in names]
        known += hub.shelf() if Kind.SHELF in kinds else []
        hints = nearest(text, known) + release.hint(text)
        raise UnknownWord(f"{what}, {found}{hints}; known are {', '.join(known) or 'none'}")
    if found.kind not in kinds:
        raise RecipeError(
            f"{text} is {found.kind.value}, mplug2 {command} takes {_listed(kinds)}: "
            f"{_TAKEN[found.kind].format(text)}"
        )
    return found


def look(text: str) -> Word | str:
    """What a word is, or a clause that says why it is nothing."""
    if "://" in text:
        return Word(text, Kind.ADDRESS)
    if text in hub.shelf():
        return Word(text, Kind.SHELF)
    path, why = Path(text), "and no file or folder has that name"
    if "\0" not in text and (os.path.lexists(path) or path in card_files(path.parent)):
        found = _on_disk(path)
        if isinstance(found, Kind):
            return Word(text, found, path)
        why = found
    if file := re.match(r"(.*\.py)(:|$)", text):
        return Word(text, Kind.RECIPE, Path(file[1]))
    for kind, names in _names().items():
        if text in names or (kind is Kind.RECIPE and text.partition(".")[0] in names):
            return Word(text, kind)
    return why


def _names() -> dict[Kind, Sequence[str]]:
    return {
        Kind.FAMILY: hub.families(),
        # By name: what makes recipes and modules knows more than what opens them.
        Kind.RECIPE: list(importlib.import_module("mplug2.recipes").RECIPES),
        Kind.RELEASE: release.releases(),
        Kind.MODULE: list(importlib.import_module("mplug2.modules").MODULES),
    }


def _on_disk(path: Path) -> Kind | str:
    """What a file or a folder is; a clause that says why it is nothing."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path in card_files(path.parent):  # on its way there
            return Kind.CARD
        return f"and {path} cannot be read ({error.strerror})"
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):
        return f"and {path} is neither a regular file nor a folder"
    if path.suffix == ".tar":
        return Kind.TAR
    return _json(path) if path.suffix == ".json" else f"and the file {path} is none by its name"


def _folder(path: Path) -> Kind | str:
    if (path / lock.FILE).is_file() and (_holds_its_cards(path) or not run.is_run(path)):
        return Kind.BUNDLE
    if run.is_run(path):
        return Kind.RUN
    if card_files(path):
        return Kind.FOLDER
    if (path / "checkpoints").is_dir():
        return f"and the folder {path} has checkpoints and no {run.FILE}, which a run needs"
    return f"and the folder {path} holds no {run.FILE}, {lock.FILE} or card"


def _holds_its_cards(path: Path) -> bool:
    """A run keeps a lock, too; the cards that it lists lie elsewhere."""
    try:
        parts = lock.read(path / lock.FILE).modules.values()
    except CardError:
        return False
    return any(os.path.lexists(path / f"{part.card}.json") for part in parts if part.file)


def _json(path: Path) -> Kind | str:
    value: Any = read_json(path, "file")
    keys = set(value) if isinstance(value, dict) else set()
    if {"fingerprint", "settings"} <= keys:
        return f"and {path} is a file of a run: name the folder {path.parent}"
    if {"modules", "tokenizer"} <= keys:
        return Kind.LOCK
    return Kind.DELTA if keys >= {"module", "base"} else Kind.CARD


def _listed(kinds: Sequence[Kind]) -> str:
    names = [kind.value for kind in kinds if kind not in CARDS]
    names += ["cards"] if Kind.CARD in kinds else []
    return ", ".join(names[:-1]) + (" or " if names[1:] else "") + names[-1]
