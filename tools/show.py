"""`mplug2 show NAME`: explains a recipe (routes, parameters, FLOPs, modes), a run's, a module (sizes) or a
card."""

import dataclasses
import math
import sys

from rich.padding import Padding
from rich.table import Table

from mplug2 import anatomy, composition, hub, modules, recipes
from mplug2.arguments import Parser
from mplug2.checkpoint import Checkpoints
from mplug2.console import Console, bold, console
from mplug2.data.stream import check_data
from mplug2.errors import CardError, DataError, RecipeError
from mplug2.hub import readme, release
from mplug2.hub.card import Card
from mplug2.network import Network
from mplug2.opening import CARDS, Kind, opened
from mplug2.overrides import apply
from mplug2.recipe import Recipe
from mplug2.recipes import runs
from mplug2.run import Run, read_run


def count(number: float) -> str:
    """`1234567` -> `1.23 M`."""
    for power, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g} {letter}"
    return f"{number:.3g}"


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="mplug2 show",
        description="Explain a recipe (NAME, NAME.SIZE or FILE.py:FUNCTION), a run, a module or a card.",
        epilog="example: mplug2 show video_qa.base modules.universal.depth=3",
    )
    parser.add_argument("name", metavar="NAME", help="a recipe, a run, a module or a card")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="change the recipe first, by dotted path"
    )
    runs.add_option(parser)
    given = parser.parse_args(argv)
    word = opened(given.name, "show", Kind.RECIPE, Kind.RUN, Kind.MODULE, Kind.BUNDLE, *CARDS)
    if word.kind in (Kind.RECIPE, Kind.RUN):
        if word.kind is Kind.RUN:
            show_run(read_run(word.path), given.overrides, console(), trusted=given.trust)
        else:
            show_recipe(apply(recipes.find(given.name), given.overrides), console())
        return 0
    if given.overrides:
        what = "a module" if word.kind is Kind.MODULE else "no recipe but cards"
        raise RecipeError(f"{given.name} is {what}; field=value changes recipes")
    if word.kind is Kind.MODULE:
        show_module(given.name, console())
    else:
        for card in hub.cards(given.name).values():
            show_card(card)
    return 0


def show_run(run: Run, changes: list[str], screen: Console, *, trusted: bool = False) -> None:
    recipe, steps = runs.recipe_of(run, changes, trusted=trusted), Checkpoints(run.path).steps
    kept = f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint yet"
    words = " ".join([run.recipe, *run.overrides])
    screen.print(f"{run.path}  a run of {words}: {kept}", soft_wrap=True)
    show_recipe(recipe, screen)


def show_module(name: str, screen: Console) -> None:
    config = modules.find(name)
    doc = sys.modules[config.__module__].__doc__ or ""
    screen.print(bold(name), f" {config.__module__}:{config.__name__}", soft_wrap=True)
    screen.print(Padding(doc.strip(), (1, 2)))
    fields = [field.name for field in dataclasses.fields(config)]
    table = Table("size", *fields, "parameters")
    for size, make in modules.sizes(name).items():
        values = [str(getattr(make(), field)) for field in fields]
        table.add_row(size, *values, count(anatomy.parameters(Network({name: make()}))[name]))
    if table.rows:
        screen.print(table)
    else:
        screen.print(
            f"A head: {', '.join(fields)} follow from the network and the task; each recipe states them."
        )
    users = [recipe for recipe in recipes.RECIPES if name in recipes.find(recipe).modules]
    screen.print(f"Used by: {', '.join(users) or 'no recipe'}")


def show_card(card: Card) -> None:
    print("\n".join(readme.section(card)))
    if path := hub.is_here(card):
        print(f"Its weights are {path}\n")
    elif card.file.urls:
        print(
            f'Its weights are not here yet: "mplug2 download {card.folder / card.name}.json" fetches them\n'
        )
    else:
        hint = release.hint(str(card.folder))
        print(f"Its weights are not at {card.weights}, and it gives no address{hint}\n")


def show_recipe(recipe: Recipe, screen: Console) -> None:
    missing = _missing(recipe)
    composition.check_modules(recipe)
    parts, sizes = anatomy.dissect(recipe), anatomy.parameters(Network(recipe.parts))
    execution, optimizer = recipe.execution, recipe.optimizer
    screen.print(bold(recipe.name), f" {count(sum(sizes.values()))} parameters")
    screen.print(
        f"{recipe.steps} steps of AdamW, rate {optimizer.learning_rate:g} after {optimizer.warmup} warm-up; "
        f"{execution.dtype}, remat {execution.remat}, {math.prod(dataclasses.astuple(recipe.mesh))} device(s)"
    )

    table = Table(
        "module", "mode", "rate", "parameters", "FLOP a step", title="Modules", title_justify="left"
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for module in recipe.parts:
        work = sum(
            part.flops.get(module, 0.0) * recipe.objectives[name].batch for name, part in parts.items()
        )
        rate = f"{recipe.learning_rates.get(module, 1.0):g}"
        table.add_row(module, recipe.mode(module), rate, count(sizes[module]), count(work))
    screen.print(table)
    screen.print(
        "FLOP: matrix products and convolutions of the forward pass; the backward pass takes twice as many."
    )

    for name, part in parts.items():
        objective = recipe.objectives[name]
        screen.print(
            bold(f"\n{name}"),
            f" task {objective.task.__name__}, weight {objective.weight:g}, "
            f"batch {objective.batch} of {objective.data}",
            soft_wrap=True,
        )
        screen.print(Padding(anatomy.diagram(part), (0, 2)))
        work = sorted(part.flops.items(), key=lambda item: -item[1])
        said = ", ".join(f"{owner} {count(flops)}" for owner, flops in work)
        screen.print(Padding(f"FLOP an example: {count(sum(part.flops.values()))} ({said})", (0, 2)))

    screen.print(f"\nEvaluations: {', '.join(recipe.evaluations) or 'none'}")
    for reason in missing:
        screen.print(f"Not here yet: {reason}", soft_wrap=True)


def _missing(recipe: Recipe) -> list[str]:
    """What training would refuse to begin without, a sentence each: vocabulary, data, cards."""

    def load() -> None:
        for module, card in recipe.cards.items():
            try:
                hub.find(card, module)
            except CardError as error:
                raise CardError(f"{error}{release.hint(card)}") from None

    reasons = []
    for needed in (lambda: composition.check_vocabularies(recipe), lambda: check_data(recipe.feeds), load):
        try:
            needed()
        except (DataError, CardError) as error:
            reasons.append(str(error))
    return reasons
