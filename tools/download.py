"""`mplug2 download CARD|RECIPE|RELEASE ...`: fetch the files that cards name, verified, into the cache; what
others released becomes cards."""

import argparse
from pathlib import Path

from mplug2 import hub, recipes
from mplug2.errors import CardError
from mplug2.hub import release
from mplug2.hub.meter import Bar


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mplug2 download",
        description="Fetch the files that cards name, verified, into the cache. What is there already is not "
        "fetched again; what broke off is continued. A released checkpoint is converted into a folder of "
        f"cards and verified, too: {', '.join(release.releases())}.",
        epilog="MPLUG2_CACHE names the folder; MPLUG2_OFFLINE=1 forbids the network.",
    )
    parser.add_argument(
        "what",
        nargs="+",
        metavar="CARD|RECIPE|RELEASE",
        help="names, files or directories of cards, recipes, or releases",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where a release's cards go (default: data/RELEASE)"
    )
    parser.add_argument(
        "--vocabulary", type=Path, metavar="FILE", help="BERT's vocab.txt, to travel with a release's cards"
    )
    asked = parser.parse_args(argv)
    released = [what for what in asked.what if what in release.releases()]
    if asked.out is not None and len(asked.what) != len(released) == 1:
        raise CardError(f"--out is the folder of one release, given are {', '.join(asked.what)}")
    with Bar() as bar:
        for what in asked.what:
            if what in released:
                install(what, asked.out or Path("data") / what, asked.vocabulary, bar)
            else:
                download(what, asked.vocabulary, bar)
    return 0


def download(what: str, vocabulary: Path | None, bar: Bar) -> None:
    """The files of the cards at a place, or of those that a recipe loads; releases are installed where it
    looks for them. Raises CardError."""
    if what.partition(".")[0] not in recipes.RECIPES and ".py" not in what:
        places: dict[str, str] = {}
        cards = list(hub.cards(what).values())
    else:
        places = dict(recipes.find(what).cards)
        for place in dict.fromkeys(places.values()):
            if not Path(place).exists() and release.hint(place):
                install(Path(place).name, Path(place), vocabulary, bar)
        cards = [hub.find(place, module) for module, place in places.items()]
    if not cards:
        print(f"{what}: names no cards, its modules begin afresh: there is nothing to download")
    for card in cards:
        was = hub.is_here(card)
        print(f"{card.name}  {hub.located(card, bar)}  {'was here' if was else 'downloaded'}", flush=True)


def install(name: str, folder: Path, vocabulary: Path | None, bar: Bar) -> None:
    wanted = release.find(name)
    said, file = release.install(wanted, folder, vocabulary=vocabulary, meter=bar)
    print(f"{said}\n{name}: cards are in {folder}, every file and array verified")
    print(f"{file.path}: sha256 {file.sha256}, {file.bytes} bytes", flush=True)
    if wanted.sha256 is None:
        print(f"{wanted.file}: its authors state no sha256; this one was recorded, and no other is taken now")
