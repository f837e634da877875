"""`mplug2 plan RECIPE --topology v5p:8x8x4 --mesh fsdp=64,tensor=4`: compiles a train step for devices that
are not here and reports memory, FLOPs, communication and the time of a step."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mplug2 import files, plan, recipes
from mplug2.arguments import Parser, at_least
from mplug2.console import Console, bold, console
from mplug2.errors import RecipeError
from mplug2.network import Network
from mplug2.overrides import apply
from mplug2.plan import Plan, machines, search, textbook
from mplug2.plan.search import Search
from mplug2.recipe import Recipe
from mplug2.sharding import Mesh, mesh_of
from mplug2.tools.show import count


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="mplug2 plan",
        description="Compile a recipe's train step for devices that are not here: memory, FLOPs, "
        "communication, time of a step. Exit status 1: it does not fit.",
        epilog="example: mplug2 plan msrvtt_caption.large accumulate=1 --topology v5p:8x8x4 "
        "--mesh fsdp=64,tensor=4 --batches-times 4",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe: NAME, NAME.SIZE or FILE.py:FUNCTION")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="change the recipe first")
    parser.add_argument(
        "--topology",
        metavar="KIND:SHAPE",
        default="cpu:8",
        help=f"of {', '.join(machines.CHIPS)}: v5p:8x8x4, v6e:16x16, h100:256, cpu:8 (default)",
    )
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="devices along data, fsdp, sequence, tensor (default: the recipe's)",
    )
    parser.add_argument(
        "--batches-times", type=float, default=1.0, metavar="N", help="N times the recipe's batches"
    )
    parser.add_argument(
        "--search", action="store_true", help="compare meshes and remat policies, recommend one"
    )
    parser.add_argument(
        "--compile",
        type=at_least(1),
        default=3,
        metavar="N",
        help="of a search, compile until N fit (default 3)",
    )
    parser.add_argument(
        "--weak-scaling",
        metavar="N,N,...",
        help="on paper only: the mesh grown or shrunk to N devices, as many examples a device",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON as well")
    given = parser.parse_intermixed_args(argv)
    if given.search and given.mesh:
        raise RecipeError("--search looks for the mesh itself: leave --mesh out")
    recipe = apply(recipes.find(given.recipe), given.overrides)
    recipe = textbook.with_batches(recipe, given.batches_times)
    if given.mesh:
        recipe = replace(recipe, mesh=mesh_of(given.mesh))
    if given.weak_scaling:
        return _scale(recipe, given.weak_scaling, given.json)
    topology = machines.find(given.topology)
    if given.search:
        with _progress(f"planning {recipe.name} for {topology.name}") as say:
            found = search.search(recipe, topology, compiled=given.compile, say=say)
        show_search(found, console())
        _write(given.json, search_json(found))
        return 0 if found.best else 1
    with _progress(f"compiling {recipe.name} for {topology.name}, mesh {recipe.mesh}"):
        made = plan.make(recipe, topology)
    show_plan(made, console())
    _write(given.json, made.as_json())
    return 1 if made.fits is False else 0


@contextmanager
def _progress(task: str) -> Iterator[search.Say]:
    """On a terminal a line that moves, with what is being done; nothing elsewhere."""
    screen = Console(stderr=True)
    with screen.status(task, spinner="line") as status:
        yield lambda doing: status.update(f"{task}: {doing}")


def _write(path: str | None, report: object) -> None:
    if path:
        files.write_text(Path(path), json.dumps(report, indent=1) + "\n")


# ------------------------------------------------------------------------------------------------------------
# One plan


def show_plan(made: Plan, screen: Console) -> None:
    devices = math.prod(made.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in made.mesh.items())
    screen.print(bold(made.recipe), f"on {made.topology} ({devices} devices; {mesh})")
    screen.print(
        f"batch {made.batch} (all feeds), remat {made.remat}, compiled in {made.compile_seconds:.0f} s"
    )
    _show_memory(made, screen)
    _show_flows(made, screen)
    _show_times(made, devices, screen)
    screen.print("Assumed: " + "; ".join(plan.ASSUMPTIONS) + ".")
    screen.print(f"Rates of a device: {made.chip.source or 'none is published for CPUs'}.")


def _show_memory(made: Plan, screen: Console) -> None:
    table = _table("Memory of a device", "what", "bytes")
    for name, size in made.state.items():
        if size:
            table.add_row(name, said(size))
    table.add_row("temporary", said(made.temporary))
    table.add_row("  of it activations kept for the backward pass, at most", said(made.activations))
    if made.code:
        table.add_row("program", said(made.code))
    table.add_row(bold("at most"), bold(said(made.total)))
    screen.print(table)
    if made.memory is None:
        screen.print("A CPU device has what its machine has: whether this fits is not said.")
    else:
        share = made.total / made.memory
        verdict = ("fits", "green") if made.fits else ("does not fit", "red")
        screen.print(Text.assemble(verdict, f": {share:.0%} of {said(made.memory)}"))


def _show_flows(made: Plan, screen: Console) -> None:
    table = _table(
        "Sent by a device in a step", "collective", "along", "runs", "bytes", "textbook", "seconds", text=2
    )
    for flow in made.flows:
        seconds = "" if flow.seconds is None else f"{flow.seconds:.2g}"
        table.add_row(flow.kind, flow.axes, str(flow.runs), said(flow.sent), said(flow.paper), seconds)
    sent, paper = (sum(getattr(flow, kind) for flow in made.flows) for kind in ("sent", "paper"))
    table.add_row(bold("all"), "", "", said(sent), said(paper), "")
    screen.print(table)


def _show_times(made: Plan, devices: int, screen: Console) -> None:
    screen.print(
        f"FLOPs of a step: {count(made.model_flops)} of the model, {count(made.flops)} with what remat "
        f"computes again, {count(made.flops / devices)} a device; memory traffic of a device "
        f"{said(made.memory_traffic)}"
    )
    times, used = made.times, made.utilization
    if times.best is None or times.worst is None or times.bound is None or used is None:
        screen.print("Time of a step: not estimated, no rates are published for such devices.")
        return
    screen.print(
        f"Time of a step: {times.best:.3g} s at best, {times.worst:.3g} s if nothing overlaps "
        f"(computing {times.compute:.3g} s, memory {times.memory:.3g} s, communication "
        f"{times.communication:.3g} s); the model's FLOPs alone: {times.bound:.3g} s, so its FLOPs "
        f"utilization is {used[0]:.0%} to {used[1]:.0%}"
    )


# ------------------------------------------------------------------------------------------------------------
# Several


def show_search(found: Search, screen: Console) -> None:
    table = _table(
        "On paper, the best first", "mesh and policy", "bytes, at least", "sent", "step, no overlap"
    )
    for it in found.candidates[:10]:
        worst = "" if it.times.worst is None else f"{it.times.worst:.3g} s"
        sent = said(sum(it.paper.traffic.values()))
        table.add_row(search.said(it.recipe), said(it.least), sent, worst)
    screen.print(table)
    dropped = "; ".join(f"{number} where {reason}" for reason, number in found.dropped.items())
    screen.print(f"{len(found.candidates)} candidates; dropped: {dropped or 'none'}")
    table = _table("Compiled", "mesh and policy", "bytes", "sent", "step at best", "no overlap", "fits")
    for candidate, it in found.plans:
        name = search.said(candidate.recipe)
        if isinstance(it, str):
            table.add_row(name, "", "", "", "", "no")
            continue
        best, worst = ("" if time is None else f"{time:.3g} s" for time in (it.times.best, it.times.worst))
        fits = {None: "not known", True: "yes", False: "no"}[it.fits]
        table.add_row(name, said(it.total), said(sum(flow.sent for flow in it.flows)), best, worst, fits)
    screen.print(table)
    for _, it in found.plans:
        if isinstance(it, str):
            screen.print(it)
    if found.best is None:
        screen.print("Nothing that was compiled fits: a smaller batch, or more parts (accumulate), may.")
        return
    mesh = Mesh(**found.best.mesh)
    screen.print(f"Recommended: --mesh {mesh} execution.remat={found.best.remat}")


def search_json(found: Search) -> dict[str, object]:
    plans = [
        {"said": search.said(candidate.recipe), "plan": it if isinstance(it, str) else it.as_json()}
        for candidate, it in found.plans
    ]
    candidates = [
        {
            "mesh": asdict(it.recipe.mesh),
            "remat": it.recipe.execution.remat,
            "memory": it.paper.memory,
            "sent": sum(it.paper.traffic.values()),
            "seconds": it.times.worst,
        }
        for it in found.candidates
    ]
    best = found.best.as_json() if found.best else None
    return {"recommended": best, "plans": plans, "candidates": candidates, "dropped": found.dropped}


def _scale(recipe: Recipe, asked: str, path: str | None) -> int:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", asked):
        raise RecipeError(f'--weak-scaling: expected numbers of devices as in 8,64,512, got "{asked}"')
    sizes = [int(word) for word in asked.split(",")]
    bigger = [textbook.scaled(recipe, size) for size in sizes]
    work = textbook.study(recipe)
    before = math.prod(asdict(recipe.mesh).values())
    network = Network(recipe.parts, recipe.execution)
    rows = []
    for size, grown in zip(sizes, bigger, strict=True):
        paper = textbook.on_paper(grown, work.times(size / before), network)
        sent = {f"{kind} {axes}": amount for (kind, axes), amount in paper.traffic.items()}
        rows.append({"devices": size, "mesh": asdict(grown.mesh), "memory": paper.memory, "sent": sent})
    show_scaling(rows, console())
    _write(path, rows)
    return 0


def show_scaling(rows: list[dict[str, Any]], screen: Console) -> None:
    axes = [field.name for field in dataclasses.fields(Mesh)]
    axes = [axis for axis in axes if any(_along(row, axis) for row in rows)]
    table = _table(
        "Weak scaling on paper: bytes that a device holds, and sends in a step along each axis",
        *("devices", "mesh", "state", "gradients", "kept", *axes, "all sent"),
        text=2,
    )
    for row in rows:
        memory, sent = row["memory"], [_along(row, axis) for axis in axes]
        state = sum(memory.values()) - memory["activations"] - memory["gradients"]
        sizes = (state, memory["gradients"], memory["activations"], *sent, sum(sent))
        table.add_row(str(row["devices"]), str(Mesh(**row["mesh"])), *map(said, sizes))
    screen.print(table)
    screen.print(
        "Kept: activations for the backward pass, at most. What is sent along several axes is the first's."
    )


def _along(row: dict[str, Any], axis: str) -> float:
    return sum(size for kind, size in row["sent"].items() if kind.split()[1].split("+")[0] == axis)


def _table(title: str, *columns: str, text: int = 1) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[text:]:
        column.justify = "right"
    return table


def said(size: float) -> str:
    """Bytes in powers of 1000: `1.88 GB`."""
    return f"{count(size)}B" if size >= 1000 else f"{size:.0f} B"
