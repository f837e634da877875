"""`mplug2 download CARD|RECIPE ...`: fetch the files that cards name, verified, into the cache."""

import argparse

from mplug2 import hub, recipes
from mplug2.card import Card
from mplug2.meter import Bar


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mplug2 download",
        description="Fetch the files that cards name, verified, into the cache. What is there already is not "
        "fetched again; what broke off is continued.",
        epilog="MPLUG2_CACHE names the folder; MPLUG2_OFFLINE=1 forbids the network.",
    )
    parser.add_argument(
        "what",
        nargs="+",
        metavar="CARD|RECIPE",
        help="names, files or directories of cards, or recipes",
    )
    with Bar() as bar:
        for card in [card for what in parser.parse_args(argv).what for card in chosen(what)]:
            print(f"{card.name}  {hub.located(card, bar)}", flush=True)
    return 0


def chosen(what: str) -> list[Card]:
    """The cards that a recipe loads, or those at a place where cards are found. Raises CardError."""
    if what.partition(".")[0] in recipes.RECIPES or ".py" in what:
        recipe = recipes.find(what)
        return [hub.find(place, module) for module, place in recipe.cards.items()]
    return list(hub.cards(what).values())
