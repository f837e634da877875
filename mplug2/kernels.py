"""Which devices have the kernels that `Execution.attention` names."""

from dataclasses import replace

import jax

from mplug2.roles import Execution


def needed(execution: Execution, platform: str) -> str:
    """What its attention needs, in words, where devices of `platform` lack it; else nothing."""
    if execution.attention == "cudnn" and (platform in ("cpu", "tpu") or execution.dtype != "bfloat16"):
        return "GPUs and execution.dtype=bfloat16"
    if execution.attention == "splash" and platform != "tpu":
        return "TPUs"
    return ""


def available(execution: Execution) -> Execution:
    """The same with XLA's attention where the devices here lack the kernels: what was trained elsewhere is
    used anywhere."""
    return replace(execution, attention="xla") if needed(execution, jax.default_backend()) else execution
