"""Several processes that train or evaluate one recipe together, each with devices of its own: how they join,
agree and part.

JAX itself finds the others where SLURM, Open MPI, GKE or a TPU pod has started them; elsewhere each is told
`--coordinator HOST:PORT --processes N --process I`. Process 0 alone writes what all share (`of_first`).
Alone, every function here does what it says for one process and communicates with nobody.
"""

import argparse
import atexit
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mplug2 import rollcall
from mplug2.errors import Mplug2Error
from mplug2.lifeline import GRACE, Lifeline
from mplug2.sharding import batch_sharding

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = 300
"""Seconds that the others may take to join, and to give a sign of life."""

ALONE = ("coordinator_address should be defined", "initialise the XLA backend")
"""What JAX says to a process of which nobody said anything: no cluster is there that it knows; a program that
uses its devices already has called us. Anything else is a job that it cannot join, not one process."""

FOUND = "the cluster that JAX found"
"""Where processes join that were told no coordinator."""

STATUS = {Mplug2Error: 2, KeyboardInterrupt: 130}
"""Exit statuses by what ended a process, as mplug2.tools.main has them; 1 for anything else."""


class ProcessError(Mplug2Error):
    """Processes that cannot work together, or one that is gone."""


# ------------------------------------------------------------------------------------------------------------
# Joining and parting


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `joined` reads."""
    group = parser.add_argument_group(
        "several processes", "the same command in each; on SLURM, GKE and TPU pods they find each other"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens for the others")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--patience",
        type=int,
        default=PATIENCE,
        metavar="SECONDS",
        help="how long to wait for the others to join, and for a sign of life of a machine that may be gone "
        f"(default: {PATIENCE})",
    )


@contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    patience: int = PATIENCE,
) -> Iterator[None]:
    """All processes of the job, together until the block ends. With nothing said, those of the cluster that
    JAX finds itself in, or this one alone.

    Must be entered before any device is used. A process that leaves by an error does not wait for the others;
    they end as well. Raises ProcessError.
    """
    if not _join(coordinator, processes, process, patience):
        yield
        return
    lifeline = Lifeline(jax.process_index(), exchange, coordinator and _host_port(coordinator)[0])
    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(GRACE + 1)  # if a collective broke because another process did, the lifeline says so
        lifeline.close(f"{type(error).__name__}: {error}")
        # At exit JAX would wait for the others, who wait for this one.
        atexit.register(_leave, next((STATUS[kind] for kind in STATUS if isinstance(error, kind)), 1))
        raise
    lifeline.close()
    jax.distributed.shutdown()


def _join(coordinator: str | None, processes: int | None, process: int | None, patience: int) -> bool:
    """Whether there is a job to be part of."""
    said = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in said.items() if value is None]
    if patience < 1:
        raise ProcessError(f"--patience is {patience}, expected at least 1 second")
    if len(missing) < len(said):
        if missing:
            raise ProcessError(
                f"{', '.join(said)} are given together; {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} missing"
            )
        assert coordinator is not None and processes is not None and process is not None
        _check(coordinator, processes, process)
        refused = _called(coordinator, processes, process, patience)
        if refused:
            raise ProcessError(f"the processes cannot be joined at {coordinator}: {refused}")
        if process:
            _reach(coordinator, patience, _connected)
    # JAX's own client would abort this process without a word to read.
    late = threading.Timer(patience, _too_late, [coordinator, patience])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=patience + 60,
            heartbeat_timeout_seconds=patience,
        )
    except Exception as error:
        if len(missing) == len(said) and any(reason in str(error) for reason in ALONE):
            return False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProcessError(
            f"the processes could not be joined at {coordinator or FOUND}: {reason}"
        ) from error
    finally:
        late.cancel()
    return True


def _too_late(coordinator: str | None, patience: int) -> None:
    print(
        f"mplug2: error: not all processes joined {coordinator or FOUND} within {patience} s (--patience): "
        "are they started, and do all name this address and this number of processes?",
        file=sys.stderr,
    )
    _leave(2)


def _check(coordinator: str, processes: int, process: int) -> None:
    host, port = _host_port(coordinator)
    if not host or not 0 < port < 65536:
        raise ProcessError(f'--coordinator is "{coordinator}", expected HOST:PORT such as 10.0.0.1:1234')
    if processes < 1:
        raise ProcessError(f"--processes is {processes}, expected at least 1")
    if not 0 <= process < processes:
        raise ProcessError(f"--process is {process}, expected from 0 to {processes - 1} (--processes less 1)")


def _host_port(address: str) -> tuple[str, int]:
    """`[::1]:80 -> ("::1", 80)`; port 0 if there is none."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port) if port.isdigit() else 0


def _called(coordinator: str, processes: int, process: int, patience: int) -> str:
    """The roll call: why these processes do not belong together, or nothing. Raises ProcessError where
    process 0 cannot listen or be reached: JAX's own service and client would end the process without a word
    to read."""
    port = _host_port(coordinator)[1]
    if process:
        return _reach(
            coordinator, patience, lambda address, left: rollcall.answer(address, process, processes, left)
        )
    try:
        with rollcall.listening(port) as server:
            if processes > 1:
                print(
                    f"process 0 of {processes}: waiting for the others, up to {patience} s", file=sys.stderr
                )
            return rollcall.take(server, processes, patience)
    except OSError as error:
        raise ProcessError(
            f"port {port} of --coordinator {coordinator} cannot be had here ({error.strerror or error}): "
            "does another process 0 or another program use it? Give another port to all processes"
        ) from None


def _connected(address: tuple[str, int], patience: float) -> None:
    socket.create_connection(address, timeout=patience).close()


def _reach(coordinator: str, patience: int, contact: Callable[[tuple[str, int], float], T]) -> T:
    """What `contact(address, seconds left)` gives when it first reaches process 0. Raises ProcessError."""
    until, reason = time.monotonic() + patience, ""
    while time.monotonic() < until:
        try:
            return contact(_host_port(coordinator), max(0.1, until - time.monotonic()))
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    raise ProcessError(
        f"process 0 cannot be reached at {coordinator} within {patience} s ({reason}): "
        "is it started, and is this its address?"
    )


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ------------------------------------------------------------------------------------------------------------
# Agreeing


def first() -> bool:
    """Whether this is process 0, which alone writes, logs and prints."""
    return jax.process_index() == 0


def exchange(value: Any) -> list[Any]:
    """What every process gave, by process. All of them must call it, at the same point of the program."""
    if jax.process_count() == 1:
        return [value]
    # Between the processes of one job only: nothing that is pickled here is kept or comes from elsewhere.
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int64(len(mine)).astype(np.int32)).reshape(-1)
    room = 1 << int(sizes.max() - 1).bit_length()  # few sizes, so that few programs are compiled
    every = multihost_utils.process_allgather(np.pad(mine, (0, room - len(mine))))
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def of_first(work: Callable[[], T]) -> T:
    """The value of `work`, done by process 0 alone; an error of it is raised in all."""
    if jax.process_count() == 1:
        return work()
    value = error = None
    if first():
        try:
            value = work()
        except Exception as raised:
            error = raised
    value, error = exchange((value, error))[0]
    if error is not None:
        raise error
    return value


# ------------------------------------------------------------------------------------------------------------
# Sharing


def dealt(work: Callable[[S], T], pieces: Sequence[S]) -> list[T]:
    """`[work(piece) for piece in pieces]`, the pieces dealt out among the processes; all get every result."""
    count = jax.process_count()
    results = exchange([work(piece) for piece in pieces[jax.process_index() :: count]])
    return [results[place % count][place // count] for place in range(len(pieces))]


def held(mesh: jax.sharding.Mesh, batch: int) -> list[int]:
    """The examples of a global batch that the devices of this process hold, ascending. Processes that share
    an example (its parameters are spread over both) each read it."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({row for place in places if place for row in range(*place[0].indices(batch))})


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole -> the same on devices of all; each places its own parts."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def placed(leaf: Any, where: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, where)  # spread already
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])

    return jax.tree.map(placed, tree, shardings)


def fetched(tree: Any) -> Any:
    """Arrays, wherever they lie -> NumPy arrays, whole in each process."""

    def gathered(leaf: Any) -> Any:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return multihost_utils.process_allgather(leaf, tiled=True) if spread else leaf

    return jax.device_get(jax.tree.map(gathered, tree))  # which copies all at once


def check_all_used(mesh: jax.sharding.Mesh) -> None:
    """Raises ProcessError unless every process has devices in the mesh."""
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise ProcessError(
            f"mesh {dict(mesh.shape)} uses {mesh.size} of the {jax.device_count()} devices of "
            f"{jax.process_count()} processes: with several processes a mesh uses all devices"
        )
