"""Bundles: a network to carry to a machine without a network: every module's card and weights, the tokenizer
and the lock, in one folder or one tar. What it computes there is what it computes here, bit for bit.

A bundle is a directory of cards with a lock beside them, so whatever reads cards reads it too. Trained
modules are written as float32, which is what they were trained as; others are their card's own file.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from mplug2 import files, hub
from mplug2.card_wording import questions_of, wording_of, wording_of_cards
from mplug2.data.tokens import Tokenizer
from mplug2.data.wording import Wording
from mplug2.errors import CardError
from mplug2.hub import archive, lock, publishing
from mplug2.hub.card import Card, Trained
from mplug2.hub.card_tokenizer import carried, opened
from mplug2.hub.fit import differences
from mplug2.hub.lock import Lock, Part
from mplug2.network import Network, Parameters
from mplug2.recipe import Recipe

LARGEST_LOCK = 1_000_000  # bytes


@dataclass(frozen=True)
class Bundle:
    """What was opened. `wording` is what the cards state, so that it answers alike wherever it is opened."""

    lock: Lock
    network: Network
    params: Parameters
    tokenizer: Tokenizer
    wording: Wording | None


def write(
    folder: Path,
    locked: Lock,
    recipe: Recipe,
    trained: Parameters,
    *,
    facts: Trained | None = None,
) -> None:
    """Into `folder`, which must be empty or absent: `trained` modules from their parameters, the others of
    `recipe` from the cards it loads. `locked` is the recipe's lock, `facts` how the trained ones came about.
    Raises CardError, and leaves nothing behind then."""
    family = recipe.name.replace(".", "-").replace(" ", "-")
    loaded = {module: hub.card_of(recipe, module) for module in recipe.parts if module not in trained}
    _check_apart(locked, family, loaded, trained)
    with _new_folder(folder) as fresh:
        _write(fresh, locked, recipe, trained, facts, family, loaded)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    if not files.is_free(folder):
        raise CardError(f"{folder} is there already: give another place for the bundle")
    with files.refusing(CardError, folder), files.new_folder(folder) as fresh:
        yield fresh


def _write(
    folder: Path,
    locked: Lock,
    recipe: Recipe,
    trained: Parameters,
    facts: Trained | None,
    family: str,
    loaded: Mapping[str, Card],
) -> None:
    parts: dict[str, Part] = {}
    questions = questions_of(wording_of(recipe))
    for module, config in recipe.parts.items():
        if module in trained:
            states = module in ("vision", "temporal")
            card = publishing.write(
                folder,
                f"{module}-{family}",
                module,
                config,
                trained[module],
                trained=facts,
                preprocessing=recipe.preprocessing if states else None,
                tokenizer=locked.tokenizer if hasattr(config, "vocabulary") else None,
                questions=questions if module == "text" else None,
                base=hub.base_sha256(recipe, module),
            )
        else:
            card = loaded[module]
            if module == "text":  # this network's questions are worded as its recipe words them
                card = dataclasses.replace(card, questions=questions)
            files.copy(hub.located(card), folder / card.file.path)
            card = dataclasses.replace(card, folder=folder)
            card.write()
        parts[module] = Part(config=config, mode="full", source=card.name, card=card.name, file=card.file)
    carried(recipe.tokenizer, folder)
    dataclasses.replace(locked, modules=parts).write(folder / lock.FILE)


def _check_apart(locked: Lock, family: str, loaded: Mapping[str, Card], trained: Iterable[str]) -> None:
    """Raises CardError where two files of a bundle would have one name."""
    written = {module: publishing.files_of(card) for module, card in loaded.items()}
    for module in trained:
        name = f"{module}-{family}"
        written[module] = {f"{name}.json": "", f"{name}.safetensors": ""}
    own = {lock.FILE: "", locked.tokenizer.file: locked.tokenizer.sha256}
    publishing.check_apart([*written.items(), ("the bundle", own)])


def pack(write: Callable[[Path], None], path: Path) -> None:
    """The tar `path` of the bundle that `write` makes in a folder. Raises CardError, and leaves nothing
    behind then."""
    if os.path.lexists(path):
        raise CardError(f"{path} is there already: give another place for the bundle")
    with files.refusing(CardError, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            with files.named(Path(folder), path):
                write(Path(folder) / "bundle")
                archive.pack(Path(folder) / "bundle", path)


def unpack(tar: Path, folder: Path) -> int:
    """All files of a bundle's tar into `folder`, which must be empty or absent, or none; how many. Raises
    CardError; so it does where the tar holds a file that its lock does not list."""
    with _new_folder(folder) as fresh:
        _unpack(tar, fresh)
        return len(list(fresh.iterdir()))


def _unpack(tar: Path, folder: Path) -> None:
    text = archive.content(tar, lock.FILE, LARGEST_LOCK)
    locked = lock.decoded(text, f"lock {tar}/{lock.FILE}", folder)
    _check_listed(locked, list(archive.held(tar)), f"bundle {tar}")
    archive.unpack(tar, folder)
    _inside(locked, folder)


def load(path: Path, mesh: jax.sharding.Mesh | None = None) -> Bundle:
    """The network of a bundle, verified, on a mesh or this process's first device; a tar is unpacked for as
    long as it takes. Raises CardError."""
    if path.suffix != ".tar":
        return _load(path, mesh)
    with tempfile.TemporaryDirectory(prefix="mplug2-") as folder, files.named(Path(folder), path):
        _unpack(path, Path(folder))
        return _load(Path(folder), mesh)


def _load(folder: Path, mesh: jax.sharding.Mesh | None) -> Bundle:
    locked = lock.read(folder / lock.FILE)
    try:
        cards = _inside(locked, folder)
        tokenizer = opened(locked.tokenizer, folder)
    except CardError as error:
        raise CardError(f"bundle {folder}: {error}") from None
    network, params = lock.compose(locked, mesh)
    return Bundle(locked, network, params, tokenizer, wording_of_cards(cards.values()))


def _inside(locked: Lock, folder: Path) -> dict[str, Card]:
    """The cards of a bundle's modules. Raises CardError unless all are in its folder with their weights, and
    nothing else is: it comes from strangers, so nothing is read or fetched from elsewhere, no array is made
    that no file of theirs holds, and there is nothing that anybody else might take for a run or a program."""
    for module, part in locked.modules.items():
        if part.file is None:
            raise CardError(f"module {module} has no file; a bundle holds the weights of every module")
    there = list(os.scandir(folder))
    _check_listed(locked, [entry.name for entry in there], "it")
    for entry in there:
        if not entry.is_file(follow_symlinks=False):
            raise CardError(f"{entry.name} is no regular file; a bundle holds no others")
    for module, part in locked.modules.items():
        for name in (f"{part.card}.json", part.file.path if part.file else ""):
            if not (folder / name).is_file():
                raise CardError(f"module {module}: {name} is not in the bundle, which holds all its files")
    cards = lock.check(locked)
    for module, card in cards.items():
        part = locked.modules[module]
        if part.file is not None and card.file.path != part.file.path:
            raise CardError(
                f"module {module} was locked with the file {part.file.path}; card {card.name} names "
                f"{card.file.path}"
            )
    return cards


def _check_listed(locked: Lock, names: list[str], where: str) -> None:
    """Raises CardError that names whatever a bundle, called `where`, holds and its lock does not list."""
    parts = [part for part in locked.modules.values() if part.file]
    listed = {lock.FILE, locked.tokenizer.file}
    listed |= {name for part in parts if part.file for name in (f"{part.card}.json", part.file.path)}
    if foreign := sorted(set(names) - listed):
        told = ", ".join(foreign[:8]) + (f" and {len(foreign) - 8} more" if len(foreign) > 8 else "")
        raise CardError(
            f"{where} holds {told}, which its lock does not list: a bundle with other files is not opened"
        )


def check_recipe(bundle: Bundle, recipe: Recipe) -> None:
    """Raises CardError, with both sides, unless a recipe found by the bundle's lock has the bundle's
    modules."""
    theirs: Mapping[str, object] = recipe.parts
    if theirs != bundle.network.configs:
        differing = [
            difference
            for module in {**bundle.network.configs, **theirs}
            for difference in differences(
                bundle.network.configs.get(module), theirs.get(module), f"modules.{module}"
            )
        ]
        raise CardError(
            f"recipe {bundle.lock.recipe} is not the one that was bundled: {', '.join(differing[:8])}"
        )
