"""Publications: cards, their files and their page come into a folder together, or not at all.

    with publication(folder) as staged: ...     # whatever is written into `staged`

`staged` is a folder within `folder`. First its weights and tokenizers move out of it, under names that were
never anybody's there: no file is ever replaced by other content, so a card names the file that it was written
with for ever. Then the rest, the cards, becomes the folder COMMITTED by one rename: from that instant on
whoever reads a card reads those (mplug2.hub.card.read_card), and before it none. Then they take their places,
and what the replaced ones named is removed. Whoever publishes there next finishes what was cut off.
"""

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mplug2 import files
from mplug2.errors import CardError
from mplug2.hub import readme, weights
from mplug2.hub.card import COMMITTED, Card, card_files, read_card

_STAGED = ".publishing-"
_DIGITS = 16  # of a sha256: what tells a file's content in its name


@dataclass(frozen=True)
class Publication:
    """`staged`: the folder to write into; `cards`: by name, as they are in their folder in the end."""

    staged: Path
    cards: dict[str, Card] = field(default_factory=dict)


@contextmanager
def publication(folder: Path, *, overwrite: bool = True, page: str | None = None) -> Iterator[Publication]:
    """A folder to write cards into, which are in `folder` when the block has ended well. `page`: README.md is
    written, too, of all cards that are there then, as the page of that address ("": of `folder`). Raises
    CardError; so it does where something of that name is there, unless `overwrite`."""
    made, new = not folder.exists(), None
    try:
        with files.refusing(CardError, folder), ExitStack() as stack:
            folder.mkdir(parents=True, exist_ok=True)
            with files.locked(folder, exclusive=False):  # so that nobody takes it for a dead one's
                new = Publication(Path(tempfile.mkdtemp(dir=folder, prefix=_STAGED)))
                stack.enter_context(_held(new.staged))
            stack.enter_context(files.named(new.staged, folder))
            yield new
            with files.locked(folder, exclusive=True):
                _commit(new, folder, overwrite, page)
    finally:
        if new is not None:
            shutil.rmtree(new.staged, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came


def check_free(folder: Path, names: Collection[str], page: str | None = None) -> None:
    """Raises CardError that names what is there of the cards `names`, or a README.md that is not the page of
    `folder`'s cards: what `publication` would refuse after the work."""
    there = [path.name for path in card_files(folder) if path.stem in names]
    path = folder / readme.NAME
    if page is not None and os.path.lexists(path) and not _is_page(path, folder, page):
        there.append(f"{readme.NAME}, which is not the page of its cards")
    if there:
        raise CardError(
            f"{folder} holds {', '.join(there)} already: give another folder or other names, or --overwrite "
            "to replace what is there"
        )


def _is_page(path: Path, folder: Path, page: str) -> bool:
    """Is that page what we would write of the cards that are there?"""
    try:
        written = files.read_regular(path, readme.LARGEST).decode()
    except (OSError, ValueError):
        return False
    cards = [read_card(one) for one in card_files(folder)]
    return bool(cards) and written == readme.text(cards, page or folder.name)


@contextmanager
def _held(staged: Path) -> Iterator[None]:
    """While it is entered, others know that somebody writes there."""
    descriptor = os.open(staged, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _commit(new: Publication, folder: Path, overwrite: bool, page: str | None) -> None:
    _finish(folder)
    cards = _written(new.staged)
    if not overwrite:
        check_free(folder, [card.name for card in cards], page)
    replaced = [card for card in _readable(folder) if card.name in {one.name for one in cards}]
    for path in new.staged.iterdir():
        if (there := folder / path.name).is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(there))
    moved: dict[str, str] = {}
    fresh: list[Path] = []
    try:
        for name, sha256 in {name: sha256 for card in cards for name, sha256 in _files(card).items()}.items():
            if (new.staged / name).is_file():
                place = folder / (
                    _name_of(name, sha256) if replaced or os.path.lexists(folder / name) else name
                )
                fresh += [] if os.path.lexists(place) else [place]
                os.rename(new.staged / name, place)
                moved[name] = place.name
        for card in cards:
            renamed = _renamed(card, moved)
            if renamed != card:
                renamed.write()
            new.cards[card.name] = dataclasses.replace(renamed, folder=folder)
        if page is not None:
            every = {card.name: card for card in map(read_card, card_files(folder))} | new.cards
            readme.write(new.staged, [every[name] for name in sorted(every)], page or folder.absolute().name)
        files.sync(new.staged)
        files.sync(folder)
        new.staged.chmod(0o755)  # a temporary folder is its owner's alone
        os.rename(new.staged, folder / COMMITTED)
    except BaseException:
        if os.path.lexists(new.staged):  # a Ctrl-C may come when it is committed already
            for path in fresh:
                with contextlib.suppress(OSError):
                    path.unlink()
        raise
    try:
        files.sync(folder)
    finally:  # it is there, whether or not it would survive a loss of power
        _finish(folder)
        _sweep(folder, cards, replaced)


def _written(staged: Path) -> list[Card]:
    """The cards that were written, whatever they are called."""
    cards = [read_card(path) for path in card_files(staged)]
    for path in set(staged.glob("*.json")) - set(card_files(staged)):
        with contextlib.suppress(CardError):
            cards.append(read_card(path))
    return cards


def _readable(folder: Path) -> list[Card]:
    """Cards that are there; a damaged one is no reason not to replace it."""
    found = []
    for path in card_files(folder):
        with contextlib.suppress(CardError):
            found.append(read_card(path))
    return found


def _files(card: Card) -> dict[str, str]:
    """The files that a card names, and the sha256 of each."""
    named = {card.file.path: card.file.sha256}
    return named if card.tokenizer is None else named | {card.tokenizer.file: card.tokenizer.sha256}


def _name_of(name: str, sha256: str) -> str:
    """A name that tells the content, and so never means another."""
    path = Path(name)
    return f"{path.stem}.{sha256[:_DIGITS]}{path.suffix}"


def _renamed(card: Card, moved: Mapping[str, str]) -> Card:
    name = moved.get(card.file.path, card.file.path)
    urls = tuple(_other_end(url, card.file.path, name) for url in card.file.urls)
    card = dataclasses.replace(card, file=dataclasses.replace(card.file, path=name, urls=urls))
    if card.tokenizer is None or card.tokenizer.file not in moved:
        return card
    tokens = dataclasses.replace(card.tokenizer, file=moved[card.tokenizer.file])
    return dataclasses.replace(card, tokenizer=tokens)


def _other_end(url: str, name: str, other: str) -> str:
    return url.removesuffix(name) + other if url.endswith(f"/{name}") else url


def _finish(folder: Path) -> None:
    """What was committed takes its places. Raises OSError."""
    committed = folder / COMMITTED
    if not committed.is_symlink() and committed.is_dir():
        for path in committed.iterdir():
            os.replace(path, folder / path.name)
        committed.rmdir()


def _sweep(folder: Path, new: Collection[Card], replaced: Collection[Card]) -> None:
    """Away with what the replaced cards named and no card names now, and with what publications that were
    killed have left. Nothing depends on it: what cannot be removed stays, and all stays where a card cannot
    be read, which may name it."""
    try:
        named = {name for path in card_files(folder) for name in _files(read_card(path))}
    except CardError:
        return
    old = {name for card in replaced for name in _files(card)}
    names = {name for card in new for name in _files(card)}
    of_ours = "|".join(
        rf"{re.escape(Path(name).stem)}\.[0-9a-f]{{{_DIGITS}}}{re.escape(Path(name).suffix)}"
        for name in names
    )
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.name.startswith(_STAGED) and not path.is_symlink() and not _is_held(path):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in named and (
                path.name in old
                or re.fullmatch(of_ours, path.name)
                or (path.name in names and weights.written_for(path) == path.stem)
            ):
                path.unlink()


def _is_held(staged: Path) -> bool:
    descriptor = os.open(staged, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
