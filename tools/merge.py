"""`mplug2 merge METHOD CARD CARD ... --out DIR`: one module, or one network, of several of the same kind."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from mplug2 import files, hub, overrides, recipes
from mplug2.arguments import Parser
from mplug2.errors import CardError
from mplug2.hub import merge
from mplug2.hub.card import Card
from mplug2.hub.merge_methods import METHODS, GreedySoup, Method, method
from mplug2.hub.weights import FLOATS
from mplug2.kernels import available
from mplug2.network import Network
from mplug2.opening import CARDS, Kind, opened


def main(argv: list[str]) -> int:
    asked = _parser().parse_args(argv)
    settings = {name: getattr(asked, name) for name in ("density", "outliers", "scale", "seed")}
    chosen = method(asked.method, settings | {"take": tuple(asked.take) or None})
    for place in [*asked.cards, *([asked.base] if asked.base else [])]:
        opened(place, "merge", *CARDS, Kind.BUNDLE)  # whose folder is one of cards
    if not files.is_free(asked.out):
        raise CardError(f"{asked.out} is there already: give another place for the merge")
    said = {
        "modules": asked.module,
        "family": asked.family or chosen.name,
        "dtype": asked.dtype or "",
        "licence": asked.licence,
        "page": "",
    }
    if isinstance(chosen, GreedySoup):
        written = greedy(asked, said)
    else:
        if asked.score is not None:
            raise CardError(f"--score chooses the parents of a greedy soup, {chosen.name} takes all of them")
        written = merge.merge(
            asked.out, chosen, asked.cards, base=asked.base, coefficients=asked.coefficient, **said
        )
    for card in written.values():
        print(f"{card.weights}  {card.file.bytes / 1e6:.2f} MB  sha256 {card.file.sha256[:12]}")
    unstated(chosen, written, asked.cards)
    return 0


def greedy(asked: argparse.Namespace, said: dict) -> dict[str, Card]:
    """Greedy soup by a validation score, with what was measured printed."""
    if asked.score is None:
        raise CardError("greedy needs a validation score: --score NAME, one of the recipe's evaluations")
    for name, value in (("--base", asked.base), ("--coefficient", asked.coefficient)):
        if value is not None:
            raise CardError(f"{name}: a greedy soup has none, --score decides")
    written, trials = merge.greedy(asked.out, asked.cards, lambda cards: score(cards, asked), **said)
    for number, trial in enumerate(trials):
        alone, kept = number < len(asked.cards), "kept" if trial.kept else "left out"
        verdict = "alone" + (", begins the soup" if trial.kept else "") if alone else f"added: {kept}"
        print(f"{asked.cards[trial.parent]}  {asked.score} {trial.score:.4f}  {verdict}")
    return written


def score(cards: Mapping[str, Card], asked: argparse.Namespace) -> float:
    """A score of the recipe's on the validation split, with these modules and the shelf's others."""
    from mplug2.evaluate import evaluate  # heavy: after the arguments are known to be right

    recipe = overrides.apply(recipes.find(asked.recipe), asked.set)
    places = {module: str(card.folder / f"{card.name}.json") for module, card in cards.items()}
    recipe = hub.on_shelf(dataclasses.replace(recipe, cards={**recipe.cards, **places}))
    params, _ = hub.loaded(recipe)
    network, only = Network(recipe.modules, available(recipe.execution)), asked.score.partition("/")[0]
    results = evaluate(
        network, params, recipe, recipe.tokenizer, split="validation", only=[only], limit=asked.limit
    )
    if asked.score not in results.tasks:
        raise CardError(f'no score "{asked.score}", measured are {", ".join(results.tasks)}')
    return results.value(asked.score)


def unstated(chosen: Method, written: Mapping[str, Card], places: list[str]) -> None:
    """Says of which parents the base had to be believed."""
    if chosen.based:
        stating = [hub.cards(place)[module].parents for place in places for module in written]
        if silent := sum(one is None or one.base is None for one in stating):
            print(f"note: {silent} of {len(stating)} parents do not state what they were trained from")


def _parser() -> Parser:
    parser = Parser(
        prog="mplug2 merge",
        description="Merge cards of the same module and config, or directories of cards module by module, "
        "one tensor at a time. The merged cards name their parents.",
        epilog="example: mplug2 merge ties runs/a-cards runs/b-cards --base small --density 0.2 --out merged",
    )
    parser.add_argument("method", metavar="METHOD", help=f"one of {', '.join(METHODS)}")
    parser.add_argument("cards", metavar="CARD", nargs="+", help="a card, a directory of cards or a family")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where files and cards go")
    parser.add_argument("--base", metavar="CARD", help="what all parents were trained from")
    parser.add_argument(
        "--coefficient", type=float, nargs="+", metavar="X", help="one a parent (default: equal shares of 1)"
    )
    parser.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    parser.add_argument("--family", metavar="NAME", help="cards are called MODULE-NAME (default: the method)")
    parser.add_argument("--dtype", choices=list(FLOATS), help="default: the parents', if they agree")
    parser.add_argument("--licence", default="", help="SPDX name; default: the parents', if they agree")
    parser.add_argument("--density", type=float, help="ties, dare, breadcrumbs, graft: share of a delta kept")
    parser.add_argument("--outliers", type=float, help="breadcrumbs: share of the largest values dropped")
    parser.add_argument("--scale", type=float, help="ties: factor of the merged delta")
    parser.add_argument("--seed", type=int, help="dare: what is drawn from")
    parser.add_argument(
        "--take",
        action="append",
        default=[],
        metavar="PATTERN",
        help="graft: arrays, universal.*.query*",
    )
    parser.add_argument("--score", metavar="NAME", help="greedy: one of mplug2 eval's, on validation")
    parser.add_argument(
        "--recipe", default="pretrain", help="greedy: what measures the score (default: pretrain)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="greedy: a field of that recipe"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="greedy: only the first N examples")
    return parser
