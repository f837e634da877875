"""A plan: the recipe's own train step, compiled for devices that are not here, and what that tells.

Memory is the compiler's; FLOPs are counted in the jaxpr; collectives and memory traffic are read off the
compiled program (mplug2.plan.program) and stand beside what the textbook asks for (mplug2.plan.textbook). The
time of a step lies between two bounds: computing, memory and communication all at once, or one after the
other, each at its published rate.
"""

import re
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import numpy as np

from mplug2.errors import RecipeError
from mplug2.network import Network
from mplug2.plan import textbook
from mplug2.plan.machines import Chip, Topology
from mplug2.plan.program import Collective, Program
from mplug2.plan.textbook import Paper, Work
from mplug2.recipe import Recipe
from mplug2.sharding import Mesh
from mplug2.step import Trainer

ASSUMPTIONS = (
    "FLOPs are matrix products and convolutions, two a multiply-add, shared evenly by the devices; model"
    " FLOPs leave out what remat computes again",
    "at best computing, memory and communication overlap wholly, at worst not at all; each runs at its"
    " published peak, so that a real step takes longer than the best",
    "memory traffic: every operation of the compiled program reads its operands and writes its results once",
    "collectives are rings; on a torus a group uses both links of each dimension that it lies along, among"
    " GPUs NVLink within a node and a network card a GPU beyond",
)


class NoRoomError(RecipeError):
    """A step that the compiler cannot fit into the device's memory."""


@dataclass(frozen=True)
class Flow:
    """Collectives of a kind among devices along the same mesh axes: `runs` and bytes that a device sends a
    step, `paper` the bytes that the textbook asks for, `seconds` at the published rate (None: none is)."""

    kind: str
    axes: str
    runs: int
    sent: float
    paper: float
    seconds: float | None


@dataclass(frozen=True)
class Times:
    """Seconds of a step by what takes them, None where no rate is published; `bound`: the model's FLOPs at
    the devices' peak."""

    bound: float | None
    compute: float | None
    memory: float | None
    communication: float | None

    @property
    def best(self) -> float | None:
        return max(self._parts) if self._parts else None

    @property
    def worst(self) -> float | None:
        return sum(self._parts) if self._parts else None

    @property
    def _parts(self) -> list[float]:
        parts = [self.compute, self.memory, self.communication]
        return [part for part in parts if part is not None] if None not in parts else []


@dataclass(frozen=True)
class Plan:
    """Of one device: `state` bytes of what a step is given, by what it is; `temporary`: bytes that the
    compiled step takes beside it, of which `activations` (at most) are kept from the forward to the backward
    pass; `code`; `total` of it all; `memory`: what the device has (None: not published). `flops` of the
    whole step, over all devices."""

    recipe: str
    topology: str
    mesh: dict[str, int]
    remat: str
    batch: int
    chip: Chip
    state: dict[str, int]
    activations: int
    temporary: int
    code: int
    total: int
    memory: int | None
    model_flops: float
    flops: float
    memory_traffic: float
    flows: tuple[Flow, ...]
    times: Times
    compile_seconds: float
    versions: dict[str, str]

    @property
    def fits(self) -> bool | None:
        return None if self.memory is None else self.total <= self.memory

    @property
    def utilization(self) -> tuple[float, float] | None:
        """Model FLOPs utilization at worst and at best."""
        times = self.times
        if times.bound is None or times.best is None or times.worst is None:
            return None
        return times.bound / times.worst, times.bound / times.best

    def as_json(self) -> dict[str, Any]:
        times = asdict(self.times) | {"best": self.times.best, "worst": self.times.worst}
        return asdict(self) | {
            "times": times,
            "fits": self.fits,
            "utilization": self.utilization,
            "assumptions": ASSUMPTIONS,
        }


def check_devices(mesh: Mesh, topology: Topology) -> None:
    """Raises RecipeError unless the mesh has as many devices as the topology."""
    there = len(topology.devices)
    if mesh.size != there:
        raise RecipeError(
            f"mesh {mesh} has {mesh.size} device(s), {topology.name} has {there}; say --mesh with axes whose "
            f"product is {there}, as --mesh fsdp={there}, or --search"
        )


def make(recipe: Recipe, topology: Topology, work: Work | None = None) -> Plan:
    """Compiles the step of `recipe`, on its mesh, for `topology`; from seconds at tiny sizes to minutes at
    large ones. `work`: what `textbook.study` has found, if it was done before.

    Raises RecipeError where the mesh does not suit the topology or the recipe, NoRoomError where the
    compiler finds that it cannot fit."""
    check_devices(recipe.mesh, topology)
    network = Network(recipe.parts, recipe.execution)
    work = work or textbook.study(recipe)
    paper = textbook.on_paper(recipe, work, network)
    trainer = Trainer(recipe, network, recipe.mesh.build(topology.devices))
    lowered = trainer.lower(textbook.batches(recipe))
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _refused(error, recipe, topology, paper) from None
    seconds = time.perf_counter() - began
    program = Program(compiled.as_text() or "", len(topology.devices))
    sizes: Any = compiled.memory_analysis()
    # Outputs that take over an argument's buffer are not counted twice.
    outputs = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    given = sizes.argument_size_in_bytes + outputs
    traffic = program.memory_bytes()
    flows = _flows(program.collectives(), paper, topology, trainer.mesh)
    return Plan(
        recipe=recipe.name,
        topology=topology.name,
        mesh=asdict(recipe.mesh),
        remat=recipe.execution.remat,
        batch=sum(feed.batch for feed in recipe.feeds.values()),
        chip=topology.chip,
        state=textbook.state_bytes(trainer),
        activations=min(paper.memory["activations"], sizes.temp_size_in_bytes),
        temporary=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        total=given + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes,
        memory=topology.chip.memory,
        model_flops=work.model_flops,
        flops=work.flops,
        memory_traffic=traffic,
        flows=flows,
        times=_times(work, topology, traffic, flows),
        compile_seconds=seconds,
        versions=_versions(),
    )


def paper_times(recipe: Recipe, work: Work, paper: Paper, topology: Topology) -> Times:
    """The same from the textbook alone; memory traffic is then not known, and taken to be none."""
    mesh = recipe.mesh.build(topology.devices)
    flows = tuple(
        Flow(kind, axes, 0, sent, sent, _seconds(sent, topology.rate(along(mesh, axes), mesh)))
        for (kind, axes), sent in paper.traffic.items()
    )
    return _times(work, topology, 0.0, flows)


def along(mesh: jax.sharding.Mesh, axes: str) -> list[int]:
    """The places of the first group of devices along mesh axes joined by `+`, counted row by row."""
    places = np.arange(mesh.size).reshape(mesh.devices.shape)
    wanted = axes.split("+")
    return places[tuple(slice(None) if axis in wanted else 0 for axis in mesh.axis_names)].ravel().tolist()


def _flows(
    found: list[Collective], paper: Paper, topology: Topology, mesh: jax.sharding.Mesh
) -> tuple[Flow, ...]:
    """By kind and axes, the largest first; what the textbook asks for and nobody does is among them."""
    runs: dict[tuple[str, str], int] = dict.fromkeys(paper.traffic, 0)
    sent: dict[tuple[str, str], float] = dict.fromkeys(paper.traffic, 0.0)
    seconds: dict[tuple[str, str], float | None] = {
        key: None if topology.chip.link is None else 0.0 for key in paper.traffic
    }
    for it in found:
        places = np.array(np.unravel_index(it.members, mesh.devices.shape))
        varying = [name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row)) > 1]
        if not varying:  # a device and itself
            continue
        key = it.kind, "+".join(varying)
        bytes_sent = it.times * it.sent
        runs[key] = runs.get(key, 0) + it.times
        sent[key] = sent.get(key, 0.0) + bytes_sent
        taken = _seconds(bytes_sent, topology.rate(it.members, mesh))
        seconds[key] = None if taken is None else (seconds.get(key) or 0.0) + taken
    flows = [
        Flow(kind, axes, runs[kind, axes], sent[kind, axes], paper.traffic.get((kind, axes), 0.0), taken)
        for (kind, axes), taken in seconds.items()
    ]
    return tuple(sorted(flows, key=lambda flow: -max(flow.sent, flow.paper)))


def _seconds(sent: float, rate: float | None) -> float | None:
    return None if rate is None else sent / rate


def _times(work: Work, topology: Topology, traffic: float, flows: tuple[Flow, ...]) -> Times:
    chip, devices = topology.chip, len(topology.devices)
    known = [flow.seconds for flow in flows if flow.seconds is not None]
    return Times(
        bound=_seconds(work.model_flops / devices, chip.flops),
        compute=_seconds(work.flops / devices, chip.flops),
        memory=_seconds(traffic, chip.memory_rate),
        communication=sum(known) if len(known) == len(flows) else None,
    )


def _refused(error: Exception, recipe: Recipe, topology: Topology, paper: Paper) -> RecipeError:
    said = str(error)
    where = f"recipe {recipe.name} on {topology.name}, mesh {recipe.mesh}"
    room = re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", said)
    if room is None and "RESOURCE_EXHAUSTED" not in said:
        return RecipeError(f"{where}: the compiler refuses: {said.splitlines()[0]}")
    sizes = f"needs {room[1]}iB of a device that has {room[2]}iB" if room else said.splitlines()[0]
    state = sum(size for name, size in paper.memory.items() if name not in ("activations", "gradients"))
    return NoRoomError(
        f"{where}: does not fit: the step {sizes}; its state is {state / 1e9:.2f} GB, activations kept for "
        f"the backward pass at most {paper.memory['activations'] / 1e9:.2f} GB; what may help: "
        f"a smaller batch or more parts (accumulate), execution.remat=full, another mesh (--search)"
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
