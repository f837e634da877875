"""Checkpoints of a run: Orbax behind one thin adapter. Files: `RUN/checkpoints/STEP/ITEM/...`.

An item for each trained module (`vision`, ...) and each module's running average (`ema.vision`, ...), so that
whoever needs one module reads one; `optimizer`, `window` (sums behind the next line of the log); `iterator`
and `metadata`, JSON. Frozen modules are not copied: `metadata` records the sha256 of their arrays.

Saving goes on in the background; of several processes each writes and reads the parts that its devices hold,
in one folder. A checkpoint is complete when `files.json`, written last and by process 0, names the sha256 of
its files.
"""

import asyncio
import contextlib
import gc
import hashlib
import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from mplug2 import processes
from mplug2.errors import CheckpointError, nearest
from mplug2.network import Parameters, flat
from mplug2.run import write_json

T = TypeVar("T")

FOLDER = "checkpoints"
SEAL = "files.json"
AVERAGE = "ema."
JSON_ITEMS = ("iterator", "metadata")
RESERVED = ("optimizer", "window", *JSON_ITEMS)
"""Items that are not modules."""

SPARE_THREADS = 8
"""Of a save, for its files, beside those that wait for other processes."""

Wanted = Mapping[str, Any] | Callable[[Path], Mapping[str, Any]]
"""What to read: a tree of `jax.ShapeDtypeStruct` (with a sharding) for each item, None for a JSON item; or a
function that says so once it has seen the checkpoint's folder."""


class Checkpoints:
    """The checkpoints of the run in `run_dir`, of which the newest `keep` stay, and the best one by the score
    that `judged_by` names (`Recipe.best`), if it does."""

    def __init__(self, run_dir: Path | str, keep: int = 2, judged_by: str = ""):
        self.folder = Path(run_dir).absolute() / FOLDER
        self.keep, self.judged_by = keep, judged_by
        self._saving: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(
            int(seal.parent.name) for seal in self.folder.glob(f"*/{SEAL}") if seal.parent.name.isdigit()
        )

    @property
    def best(self) -> int | None:
        """The step of the best complete checkpoint, the earliest of equals; None if none was judged."""
        scores = {step: score for step in self.steps if (score := self._score(step)) is not None}
        if not scores:
            return None
        lowest = self.judged_by.partition("/")[0] == "loss"
        return (min if lowest else max)(scores, key=scores.__getitem__)

    def _score(self, step: int) -> float | None:
        """`metadata["scores"]` of a checkpoint, by name."""
        try:
            metadata = json.loads((self.path(step) / "metadata" / "data.json").read_text())
            return metadata["scores"].get(self.judged_by)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or of an older run
            return None

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Begins to save `items` by name (trees of arrays; `iterator` and `metadata` JSON). Their buffers may
        be donated as soon as this returns. Raises CheckpointError if this save, or the one before, could not
        be written."""
        self.wait()
        if processes.of_first(lambda: step in self.steps):
            return
        with _explained(self.path(step)):
            self.folder.mkdir(parents=True, exist_ok=True)
            with _context(), _threads(len(items) + SPARE_THREADS):
                saving = ocp.save_checkpointables_async(str(self.path(step)), dict(items))
        self._saving = threading.Thread(target=self._finish, args=(step, saving), name="mplug2-checkpoint")
        self._saving.start()

    def _finish(self, step: int, saving: Any) -> None:
        try:
            with _explained(self.path(step)):
                saving.result()
                if processes.first():
                    _seal(self.path(step))
            if processes.first():
                for old in set(self.steps[: -self.keep]) - {self.best}:
                    _remove(self.path(old))
        except CheckpointError as error:
            self._failure = error

    def wait(self) -> None:
        """Until what was begun is on disk. Raises CheckpointError, in all processes, if one could not write
        it."""
        self.join()
        failures = [failure for failure in processes.exchange(self._failure) if failure is not None]
        self._failure = None
        if failures:
            raise failures[0]

    def join(self) -> None:
        """Until this process writes no more, whatever has become of it."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None

    def restore(self, wanted: Wanted, *, best: bool = False) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint, or the `best` if one was judged and can be read: (step, items),
        None where there is none.

        One that cannot be read is passed over with a warning, by all processes alike. Raises CheckpointError
        if none can be.
        """
        reasons = []
        newest, chosen = processes.of_first(lambda: (self.steps[::-1], self.best if best else None))
        for step in sorted(newest, key=lambda step: step != chosen):
            try:
                return step, _load(self.path(step), wanted)
            except _Damaged as damage:
                reasons.append(f"checkpoint {self.path(step)} cannot be read ({damage})")
                warnings.warn(f"{reasons[-1]}; trying the one before it", stacklevel=2)
        if reasons:
            raise CheckpointError("; ".join(reasons))
        return None

    def continue_from(self, step: int) -> None:
        """Removes what is not a complete checkpoint of `step` or earlier: damaged ones, and what a crash
        left."""
        processes.of_first(lambda: self._tidy(step))

    def _tidy(self, step: int) -> None:
        kept = {str(complete) for complete in self.steps if complete <= step}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name.partition(".")[0].isdigit() and path.name not in kept:
                _remove(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A save that fails leaves nothing behind and says why in one sentence."""
    try:
        yield
    except Exception as error:
        for left in (path, *path.parent.glob(f"{path.name}.*")):
            _remove(left)
        kept = Checkpoints(path.parent.parent).steps
        before = (
            f"checkpoint {kept[-1]} is whole and the run continues from it"
            if kept
            else "there is no earlier one"
        )
        raise CheckpointError(
            f"checkpoint {path} could not be written ({_brief(error)}); {before}"
        ) from error


def restore_modules(
    run_dir: Path | str,
    names: Iterable[str] | None = None,
    *,
    ema: bool = True,
    best: str = "",
    shardings: Mapping[str, Any] | None = None,
) -> tuple[int, Parameters]:
    """(step, {module: parameters}) of the newest readable checkpoint of a run, or of the best one by the
    score `best`: the modules `names`, or all that were trained; their running averages if the run keeps them
    and `ema`. Reads nothing else. `shardings` says where arrays lie, {module: of each parameter} (default: on
    this process's first device).

    Frozen modules are not in a run: compose them from their cards. Raises CheckpointError if there is no
    checkpoint, or a module was not trained in this run.
    """

    def wanted(path: Path) -> dict[str, Any]:
        there = {item.name for item in path.iterdir() if item.is_dir()}
        trained = sorted(item for item in there if not item.startswith(AVERAGE) and item not in RESERVED)
        chosen = trained if names is None else list(names)
        if strange := [name for name in chosen if name not in trained]:
            raise CheckpointError(
                f"{path}: holds the trained modules {trained}, not {strange}{nearest(strange[0], trained)}"
            )
        items = {name: AVERAGE + name if ema and AVERAGE + name in there else name for name in chosen}
        with _context():
            stored = ocp.checkpointables_metadata(str(path)).metadata
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def placed(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        return {
            item: jax.tree.map(
                placed,
                stored[item],
                shardings[name] if shardings else jax.tree.map(lambda _: first, stored[item]),
            )
            for name, item in items.items()
        }

    restored = Checkpoints(run_dir, judged_by=best).restore(wanted, best=True)
    if restored is None:
        raise CheckpointError(f"{run_dir}: there is no checkpoint in this folder")
    step, items = restored
    return step, {item.removeprefix(AVERAGE): tree for item, tree in items.items()}


def fingerprint(params: Mapping[str, Any]) -> str:
    """sha256 of one module's arrays: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flat(params).items()):
        if isinstance(leaf, jax.Array):  # of a copy: an array of a device keeps what the host has read of it
            leaf = processes.fetched(jnp.copy(leaf))
        array = np.ascontiguousarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


class _Damaged(Exception):
    """A checkpoint that cannot be read."""


def _load(path: Path, wanted: Wanted) -> dict[str, Any]:
    items = _alike(lambda: wanted(path) if callable(wanted) else wanted)

    def read() -> dict[str, Any]:
        processes.of_first(lambda: _verify(path, items))
        with _context():
            return ocp.load_checkpointables(str(path), dict(items))

    return _alike(read)


def _alike(work: Callable[[], T]) -> T:
    """The value of `work`, which every process does. If it fails in one, the same CheckpointError or _Damaged
    is raised in all: one that went on would wait for the others at their next exchange."""
    value: Any = None
    failure: CheckpointError | _Damaged | None = None
    try:
        value = work()
    except (CheckpointError, _Damaged) as error:
        failure = error
    except Exception as error:  # whatever a damaged file makes Orbax raise
        failure = _Damaged(_brief(error))
    if failures := [one for one in processes.exchange(failure) if one is not None]:
        with warnings.catch_warnings():  # Orbax leaves coroutines behind that it never awaited
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        raise failures[0]
    return value


def _seal(path: Path) -> None:
    """Writes the sha256 of every file, by its place; the checkpoint is complete with it."""
    sums = {str(file.relative_to(path)): _sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}
    write_json(path / SEAL, sums)


def _remove(path: Path) -> None:
    """As far as it can be. The seal goes first: what a kill leaves of it then counts as no checkpoint."""
    with contextlib.suppress(OSError):
        (path / SEAL).unlink()
    shutil.rmtree(path, ignore_errors=True)


def _verify(path: Path, items: Iterable[str]) -> None:
    """Orbax notices a missing file, not a changed byte. Raises _Damaged if a file of `items` is not as it was
    sealed."""
    sums = json.loads((path / SEAL).read_text())
    for item in items:
        files = [place for place in sums if place.startswith(f"{item}/")]
        if not files:
            raise _Damaged(f"it has no item {item}")
        for place in files:
            if not (path / place).is_file() or _sha256(path / place) != sums[place]:
                raise _Damaged(f"{place} is not what was written")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _context() -> ocp.Context:
    """JSON items are written as JSON, for people to read; everything else as arrays."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for item in JSON_ITEMS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    context.checkpointables.registry = registry
    return context


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Of several processes, event loops that begin in this block have so many threads. (Orbax begins the one
    that writes in the background before its call comes back.)

    Orbax waits for the other processes twice for each item, each time in a thread of its event loop. Of
    asyncio's own few (CPUs and 4 more, at most 32) all may be taken by items that wait for processes whose
    threads all wait for other items. (Policies are how asyncio lets this be said until Python 3.16.)"""
    if jax.process_count() == 1:
        yield
        return

    class Roomy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            loop = super().new_event_loop()
            loop.set_default_executor(ThreadPoolExecutor(count, thread_name_prefix="mplug2-checkpoint"))
            return loop

    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(Roomy())
    try:
        yield
    finally:
        asyncio.set_event_loop_policy(before)


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
