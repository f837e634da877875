"""`mplug2 modules`: lists the modules, what each does, and its parameters at each size."""

from rich.table import Table

from mplug2 import anatomy, modules
from mplug2.arguments import Parser
from mplug2.console import console
from mplug2.network import Network
from mplug2.tools.show import count


def main(argv: list[str]) -> int:
    Parser(
        prog="mplug2 modules",
        description="List the modules, what each does, and its parameters at each size.",
        epilog="`mplug2 show NAME` explains one.",
    ).parse_args(argv)
    table = Table("module", "what it does", *modules.SIZES)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, (_, does) in modules.MODULES.items():
        sizes = modules.sizes(name)
        counts = {size: anatomy.parameters(Network({name: make()}))[name] for size, make in sizes.items()}
        table.add_row(name, does, *(count(counts[size]) if size in counts else "" for size in modules.SIZES))
    console().print(table)
    console().print("Heads have no sizes of their own: their width follows from what they read.")
    return 0
