"""`mplug2 recipes`: lists the recipes, what each teaches, and its sizes."""

from rich.table import Table
from rich.text import Text

from mplug2 import recipes
from mplug2.arguments import Parser
from mplug2.console import bold, console


def main(argv: list[str]) -> int:
    Parser(
        prog="mplug2 recipes",
        description="List the recipes, what each teaches, and its sizes.",
        epilog="`mplug2 show NAME.SIZE` explains one; `mplug2 train NAME.SIZE` trains it.",
    ).parse_args(argv)
    table = Table("recipe", "what it teaches", "sizes", "modules")
    for name, teaches in recipes.RECIPES.items():
        sizes = list(recipes.sizes(name))
        default = recipes.default_size(sizes)
        marked = [bold(f"{size}*") if size == default else Text(size) for size in sizes]
        table.add_row(name, teaches, Text(", ").join(marked), ", ".join(recipes.find(name).modules))
    console().print(table)
    console().print(
        "NAME alone means the size with a star; path/to/file.py:function is a recipe of your own."
    )
    return 0
