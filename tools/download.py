"""`mplug2 download CARD|RECIPE|RELEASE ...`: fetch the files that cards name, verified, into the cache; what
others released becomes cards."""

from pathlib import Path

from mplug2 import hub, recipes
from mplug2.arguments import Parser
from mplug2.errors import CardError
from mplug2.hub import release, weights
from mplug2.hub.cache import Cache
from mplug2.hub.card import Card
from mplug2.hub.meter import Bar
from mplug2.opening import CARDS, Kind, opened


def main(argv: list[str]) -> int:
    parser = Parser(
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
    kinds = {
        what: opened(what, "download", Kind.RECIPE, Kind.RELEASE, Kind.BUNDLE, *CARDS).kind
        for what in asked.what
    }
    released = [what for what in asked.what if kinds[what] is Kind.RELEASE]
    if asked.out is not None and not (len(released) == len(asked.what) == 1):
        raise CardError(f"--out is the folder of one release, given are {', '.join(asked.what)}")
    folders = {what: releases_of(what, kinds[what], asked.out) for what in kinds}
    if asked.vocabulary is not None and not any(folders.values()):
        raise CardError(
            f"--vocabulary {asked.vocabulary}: travels with a release's cards, and none is installed for "
            f"{', '.join(asked.what)}"
        )
    with Bar() as bar:
        for what, needed in folders.items():
            for name, folder in needed.items():
                install(name, folder, asked.vocabulary, bar)
            if what not in released:
                download(what, kinds[what], bar)
    return 0


def releases_of(what: str, kind: Kind, out: Path | None) -> dict[str, Path]:
    """The releases that are to be installed, and where: what is called so, or what a recipe loads and does
    not find. Raises RecipeError."""
    if kind is Kind.RELEASE:
        return {what: out or Path("data") / what}
    places = set(recipes.find(what).cards.values()) if kind is Kind.RECIPE else set()
    return {
        Path(place).name: Path(place)
        for place in sorted(places)
        if not Path(place).exists() and release.hint(place)
    }


def download(what: str, kind: Kind, bar: Bar) -> None:
    """The files of the cards at a place, or of those that a recipe loads. Raises CardError."""
    if kind is Kind.RECIPE:
        cards = [hub.find(place, module) for module, place in recipes.find(what).cards.items()]
    else:
        cards = list(hub.cards(what).values())
    if not cards:
        print(f"{what}: names no cards, its modules begin afresh: there is nothing to download")
    for card in cards:
        was = is_right(card)
        print(f"{card.name}  {hub.located(card, bar)}  {'was here' if was else 'downloaded'}", flush=True)


def is_right(card: Card) -> bool:
    """Are the card's weights here, by their content? What the cache has of another content is removed. Raises
    CardError for such a file beside the card, which is its owner's."""
    found = hub.is_here(card)
    if found is None:
        return False
    try:
        weights.read(found, card.file.sha256)
    except CardError:
        if found == card.weights:
            raise
        Cache.default().drop(card.file.sha256)
        return False
    return True


def install(name: str, folder: Path, vocabulary: Path | None, bar: Bar) -> None:
    wanted = release.find(name)
    said, file = release.install(wanted, folder, vocabulary=vocabulary, meter=bar)
    print(f"{said}\n{name}: cards are in {folder}, every file and array verified")
    print(f"{file.path}: sha256 {file.sha256}, {file.bytes} bytes", flush=True)
    if wanted.sha256 is None:
        print(f"{wanted.file}: its authors state no sha256; this one was recorded, and no other is taken now")
