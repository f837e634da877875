"""Released checkpoints: files of other programs, downloaded, converted into cards and verified in one step.

    install(find("mplug2_pretrain"), Path("data/mplug2_pretrain"))

Their authors published addresses, and neither sha256 nor size. What can be had is this: the first download is
believed, from the host that they name and over https only, if it has the size that the server states and
converts into the modules that it should hold; its sha256 and size are then recorded in the cache (`pins/`),
and from there on no other file is taken for it. What was recorded is printed, to be compared with others. A
release that states its sha256 is held to it at once.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mplug2 import hub
from mplug2.convert import conversion
from mplug2.convert.shapes import Settings
from mplug2.data.wordpiece import WordPiece
from mplug2.errors import CardError, CheckpointError, DownloadError, nearest
from mplug2.hub.cache import Cache
from mplug2.hub.card import LARGEST_FILE, File
from mplug2.hub.download import fetch, fetched_first
from mplug2.hub.meter import Meter
from mplug2.hub.remote import SCHEMES, Patience
from mplug2.hub.typed_json import decode, encode, expect, is_sha256, plain_name, read_json

T = TypeVar("T")
SUFFIX = ".release.json"
NOTE = "release.json"
"""In the `conversion` folder of what was installed: the release, and the sha256 and size of its file."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """`family`: what `mplug2 convert --from` calls it; `file`: its name where it was published; `prompt`:
    what its captions began with; `sha256` and `bytes`: both, where they are known."""

    name: str
    family: str
    file: str
    urls: tuple[str, ...]
    source: str
    licence: str = "unknown"
    prompt: str = ""
    sha256: str | None = None
    bytes: Annotated[int, LARGEST_FILE] | None = None

    def __post_init__(self):
        plain_name("name", self.name)
        plain_name("file", self.file)
        expect(bool(self.urls), "urls", self.urls, "at least one address")
        for url in self.urls:
            expect(url.startswith(SCHEMES), "urls", url, f"addresses that begin with one of {SCHEMES}")
        both = (self.sha256 is None) == (self.bytes is None)
        expect(both, "bytes", self.bytes, "a size where a sha256 is stated, and none without")
        if self.sha256 is not None:
            is_sha256("sha256", self.sha256)


def _shelf() -> dict[str, Any]:
    folder = resources.files("mplug2.checkpoints")
    return {path.name.removesuffix(SUFFIX): path for path in folder.iterdir() if path.name.endswith(SUFFIX)}


def releases() -> list[str]:
    """The names of the releases that the package knows."""
    return sorted(_shelf())


def find(name: str) -> Release:
    """A release by its name. Raises CardError with the nearest one."""
    if name not in (known := _shelf()):
        raise CardError(f'no release "{name}": known are {sorted(known)}{nearest(name, known)}')
    return read(Path(str(known[name])))


def read(path: Path) -> Release:
    """Raises CardError with the file and the field that is wrong."""
    return _decoded(Release, path)


def _decoded(kind: type[T], path: Path) -> T:
    value = read_json(path, "release")
    try:
        return decode(kind, value, "")
    except CardError as error:
        raise CardError(f"release {path}: {error}") from None


def hint(place: str) -> str:
    """How to get the cards that belong at `place`, if it is called like a release; else nothing."""
    if (name := Path(place).name) not in _shelf():
        return ""
    release = find(name)
    return (
        f'; "mplug2 download {name} --out {place}" downloads and converts it, of the file: '
        f'"mplug2 convert {release.file} --from {release.family} --out {place}"'
    )


@contextmanager
def downloaded(
    release: Release, cache: Cache, *, patience: Patience = Patience(), meter: Meter | None = None
) -> Iterator[tuple[Path, File]]:
    """Gives (its file in the cache, what is known of it now). Where nothing was, the block's end says whether
    what came is believed (mplug2.hub.download.fetched_first). Raises DownloadError."""
    if release.sha256 is not None and release.bytes is not None:
        file = File(path=release.file, sha256=release.sha256, bytes=release.bytes, urls=release.urls)
        yield fetch(file, cache, patience=patience, meter=meter), file
        return
    pin = cache.pin_path(release.name)
    try:
        with fetched_first(
            release.file, release.urls, release.name, cache, patience=patience, meter=meter
        ) as known:
            file = File(path=release.file, sha256=known["sha256"], bytes=known["bytes"], urls=release.urls)
            yield fetch(file, cache, patience=patience, meter=meter), file
    except DownloadError as error:
        told = f"that sha256 was recorded in {pin} when it first came, remove that to take another; "
        raise DownloadError(
            f"{error}; {told if pin.exists() else ''}of a file that comes another way: "
            f'"mplug2 convert FILE --from {release.family} --out DIR"'
        ) from None


def install(
    release: Release,
    folder: Path,
    *,
    vocabulary: Path | None = None,
    settings: Settings | None = None,
    cache: Cache | None = None,
    patience: Patience = Patience(),
    meter: Meter | None = None,
) -> tuple[str, File]:
    """Downloads, converts into `folder`, and verifies every card there by sha256 and array by array; what is
    there already is verified. Returns (what was done in words, the file). Raises DownloadError,
    CheckpointError, CardError, DataError of the vocabulary."""
    words = WordPiece(str(vocabulary)).sha256 if vocabulary else None  # before gigabytes come
    if (folder / "conversion" / NOTE).is_file():
        said, file = f"{folder} is there already", _installed(release, folder, words)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: is there already, and not a folder of {release.name}")
    else:
        options = conversion.Options(
            name=release.name.replace("_", "-"),
            settings=settings,
            vocabulary=vocabulary,
            prompt=release.prompt,
            licence=release.licence,
        )
        with downloaded(release, cache or Cache.default(), patience=patience, meter=meter) as (path, file):
            note = json.dumps(encode(_Installed(release=release, file=file)), indent=1) + "\n"
            report = conversion.convert(path, release.family, folder, options, {NOTE: note})
        said = conversion.told(report)
    for card in hub.cards(folder).values():
        hub.stored(card)
    return said, file


@dataclass(frozen=True, kw_only=True)
class _Installed:
    release: Release
    file: File


def _installed(release: Release, folder: Path, words: str | None) -> File:
    """The file that a folder was converted from; `words`: the sha256 of the vocabulary asked for. Raises
    CardError, with both sides, where it was not of this release, or does not hold what the conversion
    wrote."""
    path = folder / "conversion" / NOTE
    kept = _decoded(_Installed, path)
    try:
        report = json.loads(path.with_name("report.json").read_text())
        wrote = {module: told["card"] for module, told in report["modules"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CardError(f"{path.with_name('report.json')}: does not say what was converted") from None
    # Addresses and licences may be written better one day, of the same file.
    facts = ("name", "family", "file", "prompt")
    differing = [
        f"{fact} {getattr(kept.release, fact)!r}, expected {getattr(release, fact)!r}"
        for fact in facts
        if getattr(kept.release, fact) != getattr(release, fact)
    ]
    if release.sha256 not in (None, kept.file.sha256):
        differing.append(f"a file of sha256 {kept.file.sha256}, expected {release.sha256}")
    if differing:
        raise CardError(f"{folder} holds {'; '.join(differing)}")
    cards = hub.cards(folder)
    if lost := {module: name for module, name in wrote.items() if module not in cards}:
        raise CardError(f"{folder}: cards {sorted(lost.values())} are gone; it holds {sorted(cards)}")
    held = {card.tokenizer.sha256 for card in cards.values() if card.tokenizer}
    if words is not None and {words} != held:
        had = f"a vocabulary of sha256 {min(held)}" if held else "no vocabulary"
        raise CardError(
            f"{folder} was converted with {had}, given is one of {words}; remove the folder to convert again"
        )
    return kept.file
