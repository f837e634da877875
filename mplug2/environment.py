"""What the environment hands over to a command, before JAX reads it: by then a mistake in it is a traceback,
or the end of the process without a word of ours."""

import os
import re
import subprocess
import sys

from mplug2.errors import Mplug2Error

FILES = 128
"""So many files a process must be able to hold open: a checkpoint and its readers take about a hundred."""

HOLDING = ("train", "quickstart", "eval", "predict", "publish", "bundle")
"""Commands that write or read checkpoints."""


class SettingError(Mplug2Error):
    """A variable or a limit under which a command cannot work."""


def check(command: str) -> None:
    """Raises SettingError for what would stop `command` later, and lets it open as many files as the
    system allows."""
    devices = os.environ.get("JAX_NUM_CPU_DEVICES", "1").strip()
    if not devices.isascii() or not devices.isdigit() or int(devices) < 1:
        raise SettingError(f'JAX_NUM_CPU_DEVICES is "{devices}", expected a number of devices, 1 or more')
    if "jax" not in sys.modules and os.environ.get("XLA_FLAGS", "").strip():
        _check_flags()
    if command in HOLDING:
        _check_files()


def _check_flags() -> None:
    """XLA ends its process for a flag that it does not know, so another one tries them: half a second."""
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    if tried.returncode:
        # "F1128 18:22:28.1 30619 parse_flags_from_env.cc:234] Unknown flag in XLA_FLAGS: --nonsense"
        said = re.findall(r"^F.*?\] (.*)", tried.stderr, re.M) or tried.stderr.splitlines() or ["no reason"]
        raise SettingError(f"XLA refuses XLA_FLAGS={os.environ['XLA_FLAGS']}: {said[0]}")


def _check_files() -> None:
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = 4096 if hard == unlimited else min(hard, 4096)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != unlimited and soft < FILES:
        raise SettingError(f"{soft} files may be open at once, expected {FILES} or more: see ulimit -n")


def said_by_jax(error: Exception) -> str:
    """The sentence of an error that JAX raises for one of its variables; empty for another error."""
    said = " ".join(str(error).split())
    if found := re.search(r"JAX flag (\w+)|environment '(\w+)'", said):
        name = (found[1] or found[2]).upper()
        return f"JAX refuses {name}={os.environ.get(name, '')}: {said}"
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    platforms = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
    if said.startswith("Unable to initialize backend"):
        return f"JAX cannot use {platforms}: {said}"
    if isinstance(error, AssertionError) and place == "jax._src.xla_bridge":
        return f"JAX cannot use {platforms}: it finds no such device here"
    return ""
