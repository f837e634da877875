"""How fast this machine generates text, beside how fast it can read memory.

A generated token reads every weight of the decoder once, whatever the number of rows that share it: at small
batches the decoding loop is as fast as memory is read, and no faster.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mplug2.benchmark import Clock, Times, peak_resident_bytes, threads
from mplug2.data.pixels import Preprocessing
from mplug2.generate import Beam, decode
from mplug2.inference import Compiled, Writer, captions
from mplug2.network import Network, Parameters
from mplug2.roles import Array
from mplug2.routes import see

BEGIN, END = 101, 102
READ_BYTES = 1 << 29
"""What is read to find the speed of memory; no cache holds it."""


@dataclass(frozen=True)
class GenerateReport:
    """What `measure_generate` found for one batch size. Seconds and bytes. `whole`: from uint8 pixels to ids
    on the host; `loop`: the search alone, with vision's tokens ready but not
    their keys and values; `step_bytes`: what a step of the loop
    must read, weights and caches; `tokens`: generated to a row."""

    batch: int
    beams: int
    tokens: int
    compile: float
    whole: Times
    loop: Times
    step_bytes: int
    resident: int

    @property
    def rate(self) -> float:
        """Bytes a second that the fastest loop read."""
        return self.step_bytes * self.tokens / self.loop.best


def measure_generate(
    network: Network,
    params: Parameters,
    preprocessing: Preprocessing,
    *,
    batch: int,
    beams: int,
    tokens: int,
    repeats: int,
) -> GenerateReport:
    """Times captions of exactly `tokens` ids by beam search, for `batch` clips of noise."""
    # `end` may not come before all are generated, so that every repeat does the same work.
    search = Beam(rows=beams, length=tokens, least=tokens)
    shape = (batch, preprocessing.frames, preprocessing.height, preprocessing.width, 3)
    clips = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    pixels = {"clips": clips, "index": np.zeros(batch, np.int32)}
    write = Compiled(network, params, preprocessing)(captions, Writer(search, BEGIN, END))
    clock = Clock()
    ids = write(pixels)
    compile_seconds, _ = clock.lap()
    if not (ids[:, 1:] > 0).all():
        raise AssertionError(f"expected {tokens} ids to a text, got {ids}")
    whole = _timed(lambda: write(pixels), repeats)

    @jax.jit
    def tokens_of(params: Parameters, clips: Array) -> Array:
        parts = network.bind({name: tree for name, tree in params.items() if name != "decoder"})
        return see(preprocessing.to_float(clips), **parts)

    @jax.jit
    def loop(params: Parameters, memory: Array) -> Array:
        decoder = network.bind({"decoder": params})["decoder"]
        return decode(decoder, memory, None, search, begin=BEGIN, end=END).ids

    memory = jax.block_until_ready(tokens_of(params, clips))
    jax.block_until_ready(loop(params["decoder"], memory))
    looped = _timed(lambda: jax.block_until_ready(loop(params["decoder"], memory)), repeats)
    cached = _cache_bytes(network.configs["decoder"], memory, batch * beams, tokens)
    return GenerateReport(
        batch=batch,
        beams=beams,
        tokens=tokens,
        compile=compile_seconds,
        whole=whole,
        loop=looped,
        step_bytes=_weights_of_a_step(params["decoder"]) + cached,
        resident=peak_resident_bytes(),
    )


def read_speed(seconds: float = 2.0) -> float:
    """Bytes a second at which all threads together read memory: the best of what `seconds` allow."""
    parts = np.array_split(np.zeros(READ_BYTES // 4, np.float32), threads())
    best, end = float("inf"), Clock()
    with ThreadPoolExecutor(len(parts)) as pool:
        while end.lap()[0] < seconds:
            clock = Clock()
            list(pool.map(np.max, parts))
            best = min(best, clock.lap()[0])
    return READ_BYTES / best


def _timed(work: Callable[[], Any], repeats: int) -> Times:
    laps = []
    for _ in range(repeats):
        clock = Clock()
        work()
        laps.append(clock.lap())
    walls, cpus = zip(*laps, strict=True)
    return Times(walls, cpus)


def _weights_of_a_step(params: Any) -> int:
    """Bytes of the decoder's weights that each step reads. Keys and values of the memory are computed before
    the loop; positions and types are looked up, not read through."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.nbytes for path, leaf in leaves}
    unread = ("layers.cross.key", "layers.cross.value", "embedding.positions", "embedding.types")
    return sum(size for name, size in names.items() if not any(part in name for part in unread))


def _cache_bytes(config: Any, memory: Array, rows: int, tokens: int) -> int:
    """Keys and values that a step reads: the memory's, once an input, and on average half of the past."""
    context = 2 * config.depth * memory.nbytes
    past = 2 * config.depth * rows * tokens * config.width * memory.dtype.itemsize
    return context + past // 2
