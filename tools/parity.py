"""`mplug2 parity DIR`: compare the modules with recorded tensors of the official code, stage by stage."""

from pathlib import Path

from rich.table import Table

from mplug2.arguments import Parser
from mplug2.console import console


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="mplug2 parity",
        description="Compare the modules with tensors that the official code recorded, stage by stage.",
        epilog="Gradients are relative to the largest of a tensor, AdamW to the rate; of ids, wrong texts "
        "are counted. Exit status 1: a miss.",
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="CASE.json, CASE.params.safetensors, CASE.io.safetensors ..."
    )
    parser.add_argument(
        "--atol", type=float, default=1e-4, help="allowed of stages, logits and losses (default: %(default)g)"
    )
    parser.add_argument(
        "--each", action="store_true", help="one line for each case and stage, not for all cases together"
    )
    asked = parser.parse_args(argv)

    # After the arguments are known to be right: these take seconds to import.
    from mplug2.convert.parity import compare
    from mplug2.convert.recorded import Check
    from mplug2.modules.vision import resize_positions

    result = compare(asked.folder, asked.atol, resize_positions)
    worst: dict[tuple[str, str], Check] = {}
    for check in result.checks:
        name = (check.case, check.stage) if asked.each else ("", check.stage.split(" (")[0])
        if name not in worst or check.excess >= worst[name].excess:
            worst[name] = check
    table = Table("case", "stage", "worst error", "allowed", "")
    for (_, stage), check in worst.items():
        verdict = "[green]same[/green]" if check.passed else "[red]MISS[/red]"
        table.add_row(check.case, stage, f"{check.error:.1e}", f"{check.allowed:.0e}", verdict)
    screen = console()
    screen.print(table)
    for case, what, why in result.unused:
        screen.print(f"not compared: {case}, {what}: {why}", soft_wrap=True)
    misses = len(result.misses)
    screen.print(f"{len(result.checks) - misses} of {len(result.checks)} comparisons hold")
    return 1 if misses else 0
