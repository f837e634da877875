"""Machines to plan for: `v5p:8x8x4` -> devices that are not there, and what their makers say of one.

TPU devices come from libtpu (the extra `plan-tpu`), GPUs from JAX's CUDA plugin and a description of the GPU
(the extra `plan-gpu`; neither needs a driver), CPUs are virtual ones of this process.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from mplug2.errors import RecipeError, nearest

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """Published facts of one device, None where its maker states none: bfloat16 FLOP/s without sparsity,
    bytes of memory that JAX may take, memory bytes a second; `link`: bytes a second that it sends to its
    neighbours, over all links together; `torus`: the dimensions that those links span (0: a switch);
    `network`: bytes a second that it sends beyond `domain` devices, the links' reach."""

    maker: str
    flops: float | None = None
    memory: int | None = None
    memory_rate: float | None = None
    link: float | None = None
    torus: int = 0
    network: float | None = None
    domain: int | None = None
    source: str = ""


_TPU = "cloud.google.com/tpu/docs"
CHIPS = {
    "cpu": Chip(maker="cpu"),
    "v5e": Chip(
        maker="tpu",
        flops=197e12,
        memory=16 * GIB,
        memory_rate=819e9,
        link=200e9,
        torus=2,
        source=f"{_TPU}/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, ICI 400 GB/s both ways",
    ),
    "v5p": Chip(
        maker="tpu",
        flops=459e12,
        memory=95 * GIB,
        memory_rate=2765e9,
        link=600e9,
        torus=3,
        source=f"{_TPU}/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, ICI 1200 GB/s both ways",
    ),
    "v6e": Chip(
        maker="tpu",
        flops=918e12,
        memory=32 * GIB,
        memory_rate=1600e9,
        link=400e9,
        torus=2,
        source=f"{_TPU}/v6e: 918 TFLOP/s, 32 GB, 1600 GB/s, ICI 800 GB/s both ways",
    ),
    "h100": Chip(
        maker="gpu",
        flops=989.4e12,
        memory=int(0.75 * 84_942_979_072),
        memory_rate=3352e9,
        link=450e9,
        network=50e9,
        domain=8,
        source="NVIDIA H100 SXM5 and DGX H100 data sheets: 989.4 TFLOP/s dense, 80 GB, 3.35 TB/s, NVLink 900"
        " GB/s both ways, one 400 Gb/s network card a GPU; JAX takes 75% of a GPU's memory unless"
        " XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise",
    ),
}

# XLA's description of a GPU (GpuTargetConfigProto): the facts of the device that its compiler asks for.
_TARGETS = {
    "h100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
runtime_version { major: 13 } platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
}

_FORMS = {"cpu": "cpu:8", "gpu": "h100:8", "tpu": "v5e:16x16 or v5p:8x8x4"}


@dataclass(frozen=True)
class Topology:
    """`name` as it was asked for, what one of its devices is, and the devices."""

    name: str
    chip: Chip
    devices: Sequence[Any]

    def rate(self, members: Sequence[int], mesh: jax.sharding.Mesh) -> float | None:
        """Bytes a second that a device sends in a collective among these places of the mesh, counted row by
        row; None where nobody states it. On a torus: over the two links of each dimension that the members
        lie along."""
        chip, devices = self.chip, mesh.devices.flat
        if chip.link is None:
            return None
        if chip.domain is not None:
            nodes = {devices[place].id // chip.domain for place in members}
            return chip.link if len(nodes) == 1 else chip.network
        places = np.array([devices[place].coords for place in members])
        along = sum(len(np.unique(column)) > 1 for column in places.T)
        return chip.link * max(along, 1) / chip.torus


def find(name: str) -> Topology:
    """The devices of `KIND:SHAPE`. Raises RecipeError for a kind or a shape that there is not, with the
    nearest right name, and for an extra that is not installed."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise RecipeError(
            f'topology "{name}": there is no "{kind}"; known are {", ".join(CHIPS)}{nearest(kind, CHIPS)}'
        )
    chip = CHIPS[kind]
    pattern = r"[1-9]\d*(x[1-9]\d*){1,2}" if chip.maker == "tpu" else r"[1-9]\d*"
    if not re.fullmatch(pattern, shape):
        raise RecipeError(f'topology "{name}": expected {kind}:SHAPE as in {_FORMS[chip.maker]}')
    make = {"cpu": _cpus, "gpu": _gpus, "tpu": _tpus}[chip.maker]
    return Topology(name, chip, make(kind, shape))


def _cpus(_: str, shape: str) -> Sequence[Any]:
    count = int(shape)
    _trace_on_cpus(count)
    if len(jax.devices("cpu")) < count:
        raise RecipeError(
            f"topology cpu:{count}: this process has begun with {len(jax.devices('cpu'))} CPU device(s); "
            f"start it with JAX_NUM_CPU_DEVICES={count}"
        )
    return jax.devices("cpu")[:count]


def _tpus(kind: str, shape: str) -> Sequence[Any]:
    _need("libtpu", "plan-tpu", kind)
    # libtpu would ask the cloud where it runs, and warn that nobody answers.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-256",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    os.environ.update({name: value for name, value in quiet.items() if name not in os.environ})
    return _described(f"{kind}:{shape}", platform="tpu", topology_name=f"{kind}:{shape}")


def _gpus(kind: str, shape: str) -> Sequence[Any]:
    _need("jax_cuda13_plugin", "plan-gpu", kind)
    count, node = int(shape), CHIPS[kind].domain or 1
    if count > node and count % node:
        raise RecipeError(f"topology {kind}:{count}: expected at most {node} or a multiple of {node}")
    nodes = math.ceil(count / node)
    return _described(
        f"{kind}:{count}",
        platform="cuda",
        topology_name=f"{kind}:{count}",
        target_config=_TARGETS[kind],
        topology=f"1x{nodes}x{count // nodes}",
    )


def _described(name: str, **described: str) -> Sequence[Any]:
    _trace_on_cpus()
    try:
        return topologies.get_topology_desc(**described).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        raise RecipeError(f'topology "{name}": {str(error).splitlines()[0]}') from None


def _trace_on_cpus(count: int = 1) -> None:
    """Has this process trace on `count` CPU devices, unless JAX has begun: it would seek devices of its own
    for minutes where a plugin is installed and its hardware is not there."""
    try:
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))  # type: ignore[attr-defined]
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:  # JAX has begun
        return


def _need(package: str, extra: str, kind: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RecipeError(
            f'planning for {kind} needs its compiler, which is not installed: pip install "mplug2[{extra}]"'
        )
