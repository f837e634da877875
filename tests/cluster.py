"""Several processes on loopback, each with virtual CPU devices of its own, that run one program of the tests.

The program is Python: `cluster.py` calls `MODULE.FUNCTION(*words)` in a process that has joined the others.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = 600  # the machines that run tests are slow, and stop at times


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environ(devices: int) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # As in conftest.py, and what the tests themselves were given.
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_cpu_collective_call_terminate_timeout_seconds=900",
    }


def start(function: str, *words: object, count: int, devices: int) -> list[subprocess.Popen[str]]:
    """`count` processes of `devices` devices that call `function` ("module.name") with `words` as strings."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(HERE / "cluster.py"), address, str(count)]
    return [
        subprocess.Popen(
            [*command, str(process), function, *map(str, words)],
            env=environ(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(count)
    ]


def finish(started: list[subprocess.Popen[str]], timeout: float = 3600) -> list[tuple[int, str]]:
    """(exit status, what it said) of each. Where one does not end within `timeout` seconds, none is left, and
    the error holds what they said."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
        texts = "\n".join(process.communicate()[0] for process in started)
        raise AssertionError(f"not ended within {timeout} s:\n{texts}") from None
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def call(function: str, *words: object, count: int, devices: int) -> list[str]:
    """What each process said; all must end well."""
    ended = finish(start(function, *words, count=count, devices=devices))
    for process, (status, text) in enumerate(ended):
        assert status == 0, f"process {process} ended with {status}:\n{text}"
    return [text for _, text in ended]


if __name__ == "__main__":
    import importlib

    from mplug2 import processes

    address, count, process, function, *words = sys.argv[1:]
    with processes.joined(address, int(count), int(process), PATIENCE):
        module, _, name = function.rpartition(".")
        getattr(importlib.import_module(module), name)(*words)
