"""How fast this machine takes a train step, beside what its matrix products could do at best.

What is timed is the very step of training (`mplug2.step.Trainer`), compiled once, on one batch that stays
on the device. FLOPs are those of the products in the step's jaxpr, forward and backward, two a
multiply-add; what `remat` computes again is not counted. CPU time is given beside wall time: on a machine
that others use it is the steadier of the two."""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mplug2 import sharding
from mplug2.flops import step_flops
from mplug2.network import Network
from mplug2.plan.machines import CHIPS
from mplug2.recipe import Recipe
from mplug2.roles import Array
from mplug2.step import State, Trainer

KNOWN_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": CHIPS["h100"].flops,
    "NVIDIA H200": CHIPS["h100"].flops,  # the same chip with other memory
}
"""What makers say of a device's products: FLOP/s in bfloat16 without sparsity, by JAX's `device_kind`.
Sources: mplug2.plan.machines; cloud.google.com/tpu/docs/v4; NVIDIA's A100 and H200 data sheets."""

MATMUL_SIDES = (1024, 2048, 4096)
"""Square products that the peak is sought among; which side is fastest depends on caches and threads."""

SECONDS_A_SIDE = 1.0
"""How long each side is tried."""


@dataclass(frozen=True)
class Times:
    """Seconds by the clock and of CPU time (all threads), one of each a repetition."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def best(self) -> float:
        return min(self.wall)

    @property
    def busy(self) -> float:
        """The share of this process's CPUs that it had while it was timed; well below 1: others had them."""
        return sum(self.cpu) / sum(self.wall) / threads()

    @property
    def quartiles(self) -> tuple[float, float]:
        """What the middle half of the repetitions lies between."""
        low, high = np.quantile(self.wall, (0.25, 0.75))
        return float(low), float(high)


@dataclass(frozen=True)
class Peak:
    """The machine's best matrix product: FLOP/s by the clock, FLOPs a second of CPU time, and the side that
    gave it."""

    rate: float
    rate_cpu: float
    side: int


@dataclass(frozen=True)
class StepReport:
    """What `measure_step` found. Bytes, seconds, FLOPs; `batch` examples a step; `temporary`: the bytes
    that the compiled step takes beside the state, as XLA plans them; `resident`: the process's high-water
    mark, `device`: the device's own, where it tells; `losses`: of the step that is not counted and of the
    last."""

    parameters: int
    trained: int
    batch: int
    flops: float
    compile_wall: float
    compile_cpu: float
    times: Times
    losses: tuple[float, float]
    temporary: int
    state: int
    resident: int
    device: int | None
    peaks: Mapping[str, Peak]
    threads: int
    device_kind: str
    devices: int

    @property
    def known_peak(self) -> float | None:
        """What the device's maker says (KNOWN_PEAKS), if that is known."""
        return KNOWN_PEAKS.get(self.device_kind.split(": ")[1])

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (arXiv:2204.02311, appendix B) of the median step, over all devices."""
        if self.known_peak is None:
            return None
        return self.flops / self.times.median / self.devices / self.known_peak

    def share(self, dtype: str) -> float:
        """The part of the matmul peak in `dtype`, of all devices, that the fastest step reaches. (Virtual
        devices of a CPU share the one peak.)"""
        separate = 1 if self.device_kind.startswith("cpu") else self.devices
        return self.flops / self.times.best / self.peaks[dtype].rate / separate

    def share_cpu(self, dtype: str) -> float:
        """The same by CPU time: what remains when other processes' turns are taken out."""
        return self.flops / min(self.times.cpu) / self.peaks[dtype].rate_cpu


def measure_step(
    recipe: Recipe, batches: Mapping[str, Mapping[str, np.ndarray]], *, steps: int
) -> StepReport:
    """Times `steps` train steps of `recipe` on one batch an objective (`{feed: batch}`, clips uint8),
    after one step that is not counted. The state is made here, from the recipe's seed, whatever its modes
    and cards say."""
    network = Network(recipe.parts, recipe.execution)
    trainer = Trainer(recipe, network)
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), dict(batches))
    flops = step_flops(recipe, shapes)

    # Compiled before the state exists: the compiler's own memory is then no part of the peak.
    clock = Clock()
    compiled = trainer.lower(shapes).compile()
    compile_wall, compile_cpu = clock.lap()
    _give_back_freed_memory()

    places = None
    if trainer.shardings is not None:
        places = sharding.shardings(trainer.mesh, network.axes, network.shapes)
    params = jax.jit(network.init, static_argnums=0, out_shardings=places)(recipe.seed)
    frozen = trainer.place_frozen(params)
    state = _begin(trainer, params)
    del params
    placed = jax.tree.map(trainer.place_batch, dict(batches))
    jax.block_until_ready((state, frozen, placed))
    _give_back_freed_memory()  # nor is what drawing the state took

    state, metrics = compiled(state, frozen, placed)
    first = float(jax.block_until_ready((state, metrics))[1]["metrics"]["loss"])
    walls, cpus = [], []
    for _ in range(steps):
        clock = Clock()
        state, metrics = compiled(state, frozen, placed)
        jax.block_until_ready((state, metrics))
        wall, cpu = clock.lap()
        walls.append(wall)
        cpus.append(cpu)
    resident = peak_resident_bytes()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    last = float(metrics["metrics"]["loss"])
    del state

    device = jax.devices()[0]
    plan = compiled.memory_analysis()
    return StepReport(
        parameters=_count(network.shapes),
        trained=_count({name: network.shapes[name] for name in trainer.names}),
        batch=sum(feed.batch for feed in recipe.feeds.values()),
        flops=flops,
        compile_wall=compile_wall,
        compile_cpu=compile_cpu,
        times=Times(tuple(walls), tuple(cpus)),
        losses=(first, last),
        temporary=plan.temp_size_in_bytes if plan else 0,
        state=state_bytes,
        resident=resident,
        device=(device.memory_stats() or {}).get("peak_bytes_in_use"),
        peaks={dtype: matmul_peak(dtype, MATMUL_SIDES, SECONDS_A_SIDE) for dtype in ("float32", "bfloat16")},
        threads=threads(),
        device_kind=f"{device.platform}: {device.device_kind}",
        devices=trainer.mesh.size,
    )


def matmul_peak(dtype: str, sides: tuple[int, ...], seconds: float) -> Peak:
    """The best rate of square products in `dtype` with float32 results, `seconds` of trying for each side."""

    @jax.jit
    def multiply(left: Array, right: Array) -> Array:
        return lax.dot_general(left, right, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    found = []
    for side in sides:
        left = jnp.ones((side, side), dtype)
        jax.block_until_ready(multiply(left, left))
        wall, cpu = _best_of(lambda left=left: multiply(left, left), seconds)
        found.append(Peak(2 * side**3 / wall, 2 * side**3 / cpu, side))
    fastest = max(found, key=lambda peak: peak.rate)
    return replace(fastest, rate_cpu=max(peak.rate_cpu for peak in found))


def _best_of(work: Callable[[], Any], seconds: float) -> tuple[float, float]:
    laps, end = [], time.perf_counter() + seconds
    while len(laps) < 3 or time.perf_counter() < end:
        clock = Clock()
        jax.block_until_ready(work())
        laps.append(clock.lap())
    walls, cpus = zip(*laps, strict=True)
    return min(walls), min(cpus)


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


# ------------------------------------------------------------------------------------------------------------
# The machine


def threads() -> int:
    """The CPUs that this process may use, which is the number of XLA's threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_resident_bytes() -> int:
    """The high-water mark of this process's resident memory."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _give_back_freed_memory() -> None:
    """What has been freed goes back to the system, where the C library knows how: glibc would keep it."""
    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def _begin(trainer: Trainer, params: Any) -> State:
    """A state to time: parameters as given, the rest zero. Unlike `Trainer.begin` it takes the parameters
    over."""
    rest = {name: tree for name, tree in trainer.abstract.items() if name != "params"}
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), rest)
    return {**zeros, "params": {name: params[name] for name in trainer.names}}


def _count(shapes: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
