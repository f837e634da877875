"""`mplug2 bench step [field=value ...]`: how fast this machine takes a train step, and what it could do at
best. `mplug2 bench generate`: the same of captions by beam search, at the official base size. `mplug2 bench
load`: opening a published module, beside other ways and the disk.

Without `--recipe` the work is the one that the official PyTorch code was timed on: video captioning at base
size (one clip of 4 frames, 224 px, patches of 16, 20 words, dropout, AdamW without clipping, 256.9 M
trained parameters)."""

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mplug2.arguments import Parser, at_least

if TYPE_CHECKING:
    from mplug2.benchmark import StepReport
    from mplug2.benchmark_generate import GenerateReport
    from mplug2.recipe import Recipe

Batches = Mapping[str, Mapping[str, np.ndarray]]

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""XLA on CPU takes a step's buffers from malloc and page-faults them anew at each step; glibc reads this as
it starts."""

WORDS = 20


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # compiling is measured too
    parser = Parser(prog="mplug2 bench", description="Measure this machine at the zoo's work.")
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    step = subjects.add_parser(
        "step", help="a train step: time, memory, share of the matmul peak", description=__doc__
    )
    step.add_argument("overrides", nargs="*", metavar="field=value", help="change the recipe, by dotted path")
    step.add_argument(
        "--recipe", metavar="NAME", help="a recipe instead, on its own data (mplug2 recipes lists them)"
    )
    step.add_argument("--dtype", choices=("float32", "bfloat16"), help="short for execution.dtype=...")
    step.add_argument("--no-dropout", action="store_true", help="short for dropout=false")
    layers = step.add_mutually_exclusive_group()
    layers.add_argument("--scan", action="store_true", help="short for execution.scan=true")
    layers.add_argument("--unroll", action="store_true", help="short for execution.scan=false")
    step.add_argument(
        "--mesh", metavar="AXIS=N,...", help="short for mesh.AXIS=N: data, fsdp, sequence or tensor"
    )
    step.add_argument(
        "--remat", choices=("none", "dots", "offload", "full"), help="short for execution.remat=..."
    )
    step.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps (default: 10)")
    step.set_defaults(measure=measure_step)
    generate = subjects.add_parser(
        "generate",
        help="captions by beam search: time, share of the memory's speed",
        description="Time captions of exactly N tokens by beam search, from pixels to ids, at base size with "
        "random weights (4 frames, 224 px): the work that the official code was timed on.",
    )
    generate.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8], help="default: 1 4 8")
    generate.add_argument("--beams", type=at_least(1), default=5, help="default: 5")
    generate.add_argument("--tokens", type=at_least(1), default=WORDS, help=f"default: {WORDS}")
    generate.add_argument("--size", choices=("tiny", "small", "base", "large"), default="base")
    generate.add_argument("--steps", type=int, default=5, metavar="N", help="timed captions (default: 5)")
    generate.set_defaults(measure=measure_generate)
    load = subjects.add_parser(
        "load",
        help="opening a published module: time, memory, beside the disk's speed",
        description="Open a module from a file that is in the page cache, and beside it by "
        "safetensors.numpy.load_file and Orbax, in turns, with the disk's own speed. The file is made in a "
        "temporary folder and removed.",
    )
    load.add_argument("--megabytes", type=int, default=1000, metavar="N", help="default: 1000")
    load.add_argument("--steps", type=int, default=7, metavar="N", help="timed openings (default: 7)")
    load.set_defaults(measure=measure_load)
    for subject in (step, generate, load):
        subject.add_argument(
            "--threads", type=int, metavar="N", help="run on N CPUs (default: all that the process may use)"
        )
        subject.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    asked = parser.parse_args(words)
    if asked.steps < 1:
        parser.error(f"--steps is {asked.steps}, expected at least 1")
    if getattr(asked, "megabytes", 1) < 1:
        parser.error(f"--megabytes is {asked.megabytes}, expected at least 1")
    if min(getattr(asked, "batch", [1])) < 1:
        parser.error(f"--batch is {asked.batch}, expected at least 1")
    if asked.threads is not None:
        keep_to_threads(parser, asked.threads)
    ensure_huge_pages(words)
    return asked.measure(asked)


# ------------------------------------------------------------------------------------------------------------
# The process: both must be settled before JAX starts


def keep_to_threads(parser: Parser, count: int) -> None:
    """XLA starts as many threads as there are CPUs that its process may use."""
    if not hasattr(os, "sched_setaffinity"):
        parser.error("--threads needs Linux")
    there = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(there):
        parser.error(f"--threads is {count}, expected 1 to {len(there)}")
    os.sched_setaffinity(0, there[:count])


def ensure_huge_pages(words: list[str]) -> None:
    """Starts this command over with HUGE_PAGES, once, where the C library is glibc and nobody has set it."""
    set_before = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb" in set_before:
        return
    tunables = ":".join(filter(None, (set_before, HUGE_PAGES)))
    print(
        f"mplug2 bench: starting over with GLIBC_TUNABLES={tunables} (huge pages)",
        file=sys.stderr,
        flush=True,
    )
    command = [sys.executable, "-m", "mplug2.tools.main", "bench", *words]
    os.execve(sys.executable, command, {**os.environ, "GLIBC_TUNABLES": tunables})


# ------------------------------------------------------------------------------------------------------------
# bench step


def measure_step(asked: argparse.Namespace) -> int:
    from mplug2 import benchmark, overrides, recipes
    from mplug2.step import check_mesh

    recipe = recipes.find(asked.recipe) if asked.recipe else official_work()
    recipe = overrides.apply(recipe, [*asked.overrides, *shorthands(asked)])
    said = any(override.startswith("objectives.caption.batch") for override in asked.overrides)
    if not asked.recipe and not said:
        recipe = one_clip_a_share(recipe)
    check_mesh(recipe, recipe.mesh.build())
    batches = own_batches(recipe) if asked.recipe else official_batches(recipe.objectives["caption"].batch)
    batches = {
        name: {field: array for field, array in batch.items() if field != "index"}
        for name, batch in batches.items()
    }
    report = benchmark.measure_step(recipe, batches, steps=asked.steps)
    if asked.json:
        print(json.dumps({"recipe": recipe.name, "mfu": report.mfu, **dataclasses.asdict(report)}))
    else:
        show(recipe, report)
    return 0


def shorthands(asked: argparse.Namespace) -> list[str]:
    """The flags as the overrides that they stand for."""
    from mplug2.sharding import mesh_of

    return [
        *([f"execution.dtype={asked.dtype}"] if asked.dtype else []),
        *([f"execution.remat={asked.remat}"] if asked.remat else []),
        *([f"execution.scan={str(asked.scan).lower()}"] if asked.scan or asked.unroll else []),
        *(["dropout=false"] if asked.no_dropout else []),
        *([f"mesh.{said}" for said in str(mesh_of(asked.mesh)).split(",")] if asked.mesh else []),
    ]


def official_work() -> "Recipe":
    """What the official code was timed on. Its vision tower has the temporal branches in it, so they are
    here too."""
    from mplug2 import AdamW, Execution, Objective, Recipe, tasks
    from mplug2.data.pixels import Preprocessing
    from mplug2.modules import decoder, temporal, universal, vision

    return Recipe(
        name="official base caption",
        modules={
            "vision": vision.base(),
            "temporal": temporal.base(),
            "universal": universal.base(),
            "decoder": decoder.base(),
        },
        objectives={"caption": Objective(task=tasks.caption, data=None, batch=1)},
        preprocessing=Preprocessing(height=224, width=224, frames=4),
        optimizer=AdamW(learning_rate=2e-5, clip=0.0),
        execution=Execution(scan=True, remat="full"),
        # A large network's operations fill all cores by themselves: side by side they only cost memory.
        compiler={"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
    )


def one_clip_a_share(recipe: "Recipe") -> "Recipe":
    """The official work on a mesh: as many clips as it spreads examples over."""
    clips = dataclasses.replace(recipe.objectives["caption"], batch=recipe.mesh.data * recipe.mesh.fsdp)
    return dataclasses.replace(recipe, objectives={"caption": clips})


def official_batches(clips: int) -> Batches:
    """Clips of noise and captions of which WORDS words are learned; what they say costs no time."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (clips, 4, 224, 224, 3), np.uint8)
    return {"caption": {"clips": pixels, "caption": random.integers(1, 30522, (clips, WORDS + 1), np.int32)}}


def own_batches(recipe: "Recipe") -> Batches:
    # Not at the top: readers of data come with it, a hundred megabytes that the official work does not need.
    from mplug2 import train

    return next(train.data_stream(recipe))


def show(recipe: "Recipe", report: "StepReport") -> None:
    from rich.table import Table

    from mplug2.console import console

    times, execution = report.times, recipe.execution
    low, high = times.quartiles
    layers = "scanned" if execution.scan else "unrolled"
    table = Table(title=f"bench step: {recipe.name}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "parameters": f"{report.parameters / 1e6:.1f} M, {report.trained / 1e6:.1f} M trained",
        "run as": f"{execution.dtype}, layers {layers}, remat {execution.remat}, "
        f"dropout {'on' if recipe.dropout else 'off'}, batch {report.batch}, mesh {recipe.mesh}",
        "machine": f"{report.devices} x {report.device_kind}, {report.threads} threads, "
        f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '(unset)')}",
        "compile": f"{report.compile_wall:.1f} s ({report.compile_cpu:.1f} s of CPU time)",
        "step": f"median {times.median:.3f} s, minimum {times.best:.3f} s, "
        f"middle half {low:.3f} to {high:.3f} s ({len(times.wall)} steps)",
        "step, CPU time": f"minimum {min(times.cpu):.3f} s in all threads; "
        f"{times.busy:.0%} of {report.threads} CPUs was ours",
        "examples": f"{report.batch / times.median:.3g} a second",
        "memory": f"{report.resident / 1e9:.2f} GB resident at most (state {report.state / 1e9:.2f} GB, "
        f"a step's temporaries {report.temporary / 1e9:.2f} GB)"
        + (f", device at most {report.device / 1e9:.2f} GB" if report.device else ""),
        "work": f"{report.flops / 1e9:.1f} GFLOP a step: {report.flops / times.best / 1e9:.1f} GFLOP/s",
    }
    for dtype, peak in report.peaks.items():
        rows[f"matmul peak {dtype}"] = (
            f"{peak.rate / 1e9:.0f} GFLOP/s (side {peak.side}); "
            f"{peak.rate_cpu / 1e9:.0f} GFLOP a second of CPU time"
        )
    rows["share of the peak"] = (
        f"{report.share(execution.dtype):.0%} by the clock, "
        f"{report.share_cpu(execution.dtype):.0%} by CPU time"
    )
    rows["MFU"] = (
        f"{report.mfu:.1%} of {report.devices} x {report.known_peak / 1e12:.0f} TFLOP/s in bfloat16"
        if report.mfu is not None and report.known_peak is not None
        else f"the peak of {report.device_kind} is not known"
    )
    rows["loss"] = f"{report.losses[0]:.3f}, then {report.losses[1]:.3f} after {len(times.wall)} steps more"
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)


# ------------------------------------------------------------------------------------------------------------
# bench generate


def measure_generate(asked: argparse.Namespace) -> int:
    import jax

    from mplug2 import benchmark_generate, modules
    from mplug2.data.pixels import Preprocessing
    from mplug2.network import Network

    names = ("vision", "temporal", "universal", "decoder")
    network = Network({name: modules.sizes(name)[asked.size]() for name in names})
    params = jax.jit(network.init, static_argnums=0)(0)
    height, width = network.configs["vision"].image  # pyright: ignore[reportAttributeAccessIssue]
    preprocessing = Preprocessing(height=height, width=width, frames=4)
    speed = benchmark_generate.read_speed()
    reports = []
    for batch in asked.batch:
        report = benchmark_generate.measure_generate(
            network,
            params,
            preprocessing,
            batch=batch,
            beams=asked.beams,
            tokens=asked.tokens,
            repeats=asked.steps,
        )
        reports.append(report)
    if asked.json:
        found = [dataclasses.asdict(report) for report in reports]
        print(json.dumps({"size": asked.size, "read_bytes_a_second": speed, "reports": found}))
        return 0
    show_generated(asked, reports, speed)
    return 0


def show_generated(asked: argparse.Namespace, reports: "list[GenerateReport]", speed: float) -> None:
    from rich.table import Table

    from mplug2 import benchmark
    from mplug2.console import console

    table = Table(
        title=f"bench generate: {asked.size}, beam {asked.beams}, {asked.tokens} tokens, "
        f"{benchmark.threads()} threads, memory read at {speed / 1e9:.1f} GB/s",
        title_justify="left",
    )
    columns = ("batch", "pixels to ids", "minimum", "search alone", "tokens/s", "memory's speed", "compile")
    for column in columns:
        table.add_column(column, justify="right")
    for report in reports:
        low, high = report.whole.quartiles
        table.add_row(
            str(report.batch),
            f"{report.whole.median:.2f} s ({low:.2f} to {high:.2f})",
            f"{report.whole.best:.2f} s",
            f"{report.loop.median:.2f} s",
            f"{report.batch * report.tokens / report.whole.median:.1f}",
            f"{report.rate / speed:.0%} ({report.rate / 1e9:.1f} GB/s)",
            f"{report.compile:.0f} s",
        )
    console().print(table)
    console().print(f"resident memory at most {max(report.resident for report in reports) / 1e9:.2f} GB")


# ------------------------------------------------------------------------------------------------------------
# bench load


def measure_load(asked: argparse.Namespace) -> int:
    import tempfile
    from pathlib import Path

    from rich.table import Table

    from mplug2 import benchmark_load
    from mplug2.console import console

    with tempfile.TemporaryDirectory(prefix="mplug2-") as folder:
        report = benchmark_load.measure_load(Path(folder), asked.megabytes * 1_000_000, asked.steps)
    if asked.json:
        print(json.dumps(benchmark_load.as_json(report)))
        return 0
    table = Table(title=f"bench load: {report.bytes / 1e6:.0f} MB, page cache warm", title_justify="left")
    for column in ("way", "on the device", "and read once", "GB/s", "own memory"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way in report.ways:
        cells = []
        for kind in ("opened", "used"):
            low, high = way.spread(kind)
            cells.append(f"{way.median(kind):.3f} s ({low:.3f} to {high:.3f})")
        speed = f"{report.bytes / way.median('used') / 1e9:.2f}"
        table.add_row(way.name, *cells, speed, f"{way.memory / 1e6:.0f} MB")
    reads = {"read() from the page cache": report.cached, "read() past it: the disk": report.disk}
    for name, seconds in reads.items():
        if seconds:
            middle = float(np.median(seconds))
            said = f"{middle:.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
            table.add_row(name, "", said, f"{report.bytes / middle / 1e9:.2f}", "")
    console().print(table)
    return 0
