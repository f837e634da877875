"""`mplug2 compose --vision CARD --universal CARD ... --out DIR`: one network of modules of different
origin."""

import dataclasses
from pathlib import Path

from mplug2 import files, hub
from mplug2.arguments import Parser, at_least
from mplug2.errors import CardError
from mplug2.hub import publishing
from mplug2.hub.card import STREAMS, Card, draft
from mplug2.hub.publication import publication
from mplug2.modules import connector
from mplug2.opening import CARDS, Kind, opened
from mplug2.run import write_json

NEW = "new"


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="mplug2 compose",
        description="Join modules of different origin into a directory of cards, which predict, eval and "
        "train take. Whether they fit is seen before anything is downloaded or compiled; a connector stands "
        "between different widths only where --connector asks for it.",
        epilog="example: mplug2 compose --vision vision-small --universal mine --decoder mine --out joined",
    )
    for module, (reads, writes) in STREAMS.items():
        said = f"card of {module} ({', '.join(reads)} → {', '.join(writes)})"
        if module == "connector":
            parser.add_argument(
                "--connector", nargs="?", const=NEW, metavar="CARD", help=f"{said}; without one, a fresh one"
            )
        else:
            parser.add_argument(f"--{module}", metavar="CARD", help=said)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of a fresh connector (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where files and cards go")
    asked = parser.parse_args(argv)
    places = {module: place for module in STREAMS if (place := getattr(asked, module)) is not None}
    fresh_connector = places.get("connector") == NEW
    by_module = {module: find(module, place) for module, place in places.items() if place != NEW}
    if not by_module:
        raise CardError(f"no card is given; modules are {', '.join('--' + module for module in STREAMS)}")
    if not files.is_free(asked.out):
        raise CardError(f"{asked.out} is there already: give another place for the network")
    fresh = {"connector": between(by_module)} if fresh_connector else {}
    written = {card.module: publishing.files_of(card) for card in by_module.values()}
    written |= {
        module: publishing.files_of(draft(f"{module}-new", module, config))
        for module, config in fresh.items()
    }
    written |= {"the network": {"load_report.json": "account", "README.md": "page"}}
    publishing.check_apart(written.items())
    _, params, report = hub.join(by_module, fresh, seed=asked.seed)
    with publication(asked.out, page="") as new:
        for card in by_module.values():
            copy(card, new.staged)
        for module, config in fresh.items():
            publishing.write(new.staged, f"{module}-new", module, config, params[module])
        write_json(new.staged / "load_report.json", report.json())
    print(report.table())
    return 0


def find(module: str, place: str) -> Card:
    """The card at a place. Raises CardError if it is one of another module."""
    opened(place, "compose", *CARDS, Kind.BUNDLE)  # whose folder is one of cards
    card = hub.find(place, module)
    if card.module != module:
        raise CardError(f"--{module} {place}: card {card.name} is one of {card.module!r}")
    return card


def between(by_module: dict[str, Card]) -> connector.Config:
    """A connector from vision's width to the others'. Raises CardError if there is nothing to connect."""
    others = [card for module, card in by_module.items() if module not in ("vision", "temporal")]
    if "vision" not in by_module or not others:
        raise CardError(f"--connector stands between vision and others; given are {', '.join(by_module)}")
    return connector.Config(inputs=by_module["vision"].interface.width, width=others[0].interface.width)


def copy(card: Card, folder: Path) -> None:
    """The card with its weights, and its tokenizer where that lies beside it."""
    there = dataclasses.replace(card, folder=folder)
    files.copy(hub.located(card), there.weights)
    if card.tokenizer is not None and (beside := card.folder / card.tokenizer.file).is_file():
        files.copy(beside, folder / card.tokenizer.file)
    there.write()
