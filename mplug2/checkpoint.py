"""Checkpoints of a run: Orbax behind one thin adapter. Files: `RUN/checkpoints/STEP/ITEM/...`.

An item for each trained module (`vision`, ...) and each module's running average (`ema.vision`, ...), so that
whoever needs one module reads one; `optimizer`, `window` (sums behind the next line of the log); `iterator`
and `metadata`, JSON. Frozen modules are not copied: `metadata` records the sha256 of their arrays.

Saving goes on in the background; of several processes each writes and reads the parts that its devices hold,
in one folder. A checkpoint is complete when `files.json`, written last and by process 0, names the sha256 of
its files (mplug2.seal); before that it is opened in the way in which it will be read.
"""

import asyncio
import gc
import hashlib
import itertools
import json
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

from mplug2 import processes, quiet, seal
from mplug2.errors import CheckpointError, cause, nearest
from mplug2.network import Parameters, flat
from mplug2.open_folder import OpenFolder
from mplug2.run import read_run
from mplug2.seal import METADATA, SEAL, Damaged, Misnamed

T = TypeVar("T")

FOLDER = "checkpoints"
AVERAGE = "ema."
JSON_ITEMS = ("iterator", METADATA)
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

    def __init__(self, run_dir: Path | str | OpenFolder, keep: int = 2, judged_by: str = ""):
        self.run_dir = run_dir if isinstance(run_dir, OpenFolder) else OpenFolder(run_dir)
        self.keep, self.judged_by = keep, judged_by
        self._saving: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._misnamed: set[int] = set()

    @property
    def folder(self) -> Path:
        """Where people find them."""
        return self.run_dir.name.absolute() / FOLDER

    def path(self, step: int) -> Path:
        return self.folder / str(step)

    @property
    def _inside(self) -> Path:
        """`folder`, for whoever would read a meaning into its name, or be misled once it is moved."""
        return self.run_dir.path / FOLDER

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = [sealed.parent.name for sealed in self._inside.glob(f"*/{SEAL}")]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    @property
    def best(self) -> int | None:
        """The step of the best complete checkpoint, the earliest of equals; None if none was judged."""
        scores = {
            step: score
            for step in self.steps
            if (score := seal.score(self._inside / str(step), self.judged_by)) is not None
        }
        if not scores:
            return None
        lowest = self.judged_by.partition("/")[0] == "loss"
        return (min if lowest else max)(scores, key=scores.__getitem__)

    @property
    def kept(self) -> str:
        """What a run that ends here has, in words."""
        steps = self.steps
        if not steps:
            return "there is no earlier one"
        return f"checkpoint {steps[-1]} is whole and the run continues from it"

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Begins to save `items` by name (trees of arrays; `iterator` and `metadata` JSON). Their buffers may
        be donated as soon as this returns. Raises CheckpointError if this save, or the one before, could not
        be written."""
        self.wait()
        self.run_dir.open().check()
        if processes.of_first(lambda: step in self.steps):
            return
        quiet.say_once()
        expected = seal.described(items, JSON_ITEMS)
        with self._explained(step):
            self._inside.mkdir(exist_ok=True)
            with _context(), _threads(len(items) + SPARE_THREADS):
                saving = ocp.save_checkpointables_async(str(self._inside / str(step)), dict(items))
        self._saving = threading.Thread(
            target=self._finish, args=(step, expected, saving), name="mplug2-checkpoint"
        )
        self._saving.start()

    def _finish(self, step: int, expected: Mapping[str, Any], saving: Any) -> None:
        try:
            with self._explained(step):
                saving.result()
                if processes.first():
                    self._complete(self._inside / str(step), expected)
            if processes.first():
                for old in set(self.steps[: -self.keep]) - {self.best}:
                    seal.remove(self._inside / str(old))
        except CheckpointError as error:
            self._failure = error

    def _complete(self, path: Path, expected: Mapping[str, Any]) -> None:
        """Seals what was written if it opens in the way in which it will be read, and holds what it should.
        (Arrays are looked up in their data bases and not read; their bytes are the seal's, which reads each
        file once.)"""
        with _context():
            stored = ocp.checkpointables_metadata(str(path)).metadata
        arrays = {name: stored[name] for name in expected if name not in JSON_ITEMS}
        texts = {
            name: json.loads((path / name / "data.json").read_bytes())
            for name in JSON_ITEMS
            if name in expected
        }
        found = seal.described(arrays | texts, JSON_ITEMS)
        if strange := [name for name in expected if found[name] != expected[name]]:
            raise Damaged(f"{', '.join(strange)} cannot be read back as written")
        seal.write(path)

    @contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """A save that fails leaves nothing behind and says why in one sentence."""
        try:
            yield
        except Exception as error:
            self.run_dir.check()
            why = self.run_dir.why(error)
            path = self._inside / str(step)
            for left in (path, *path.parent.glob(f"{path.name}.*")):
                seal.remove(left)
            raise CheckpointError(
                f"checkpoint {self.path(step)} could not be written ({why}); {self.kept}"
            ) from error

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

        One that cannot be read, or is not what its name says, is passed over with a warning, by all processes
        alike. Raises CheckpointError if none can be.
        """
        reasons = []
        newest, chosen = processes.of_first(lambda: (self.steps[::-1], self.best if best else None))
        if not newest:
            return None
        self.run_dir.open()
        recipe = processes.of_first(self._recipe)
        for step in sorted(newest, key=lambda step: step != chosen):
            try:
                return step, _load(self._inside / str(step), recipe, wanted)
            except Damaged as damage:
                said = "cannot be read"
                if isinstance(damage, Misnamed):
                    said = "is not what its name says"
                    self._misnamed.add(step)
                reasons.append(self.run_dir.told(f"checkpoint {self.path(step)} {said} ({damage})"))
                warnings.warn(f"{reasons[-1]}; trying the one before it", stacklevel=2)
        raise CheckpointError("; ".join(reasons))

    def _recipe(self) -> str:
        """The fingerprint of the run's recipe; empty where nobody says."""
        try:
            return read_run(self.run_dir.path).fingerprint
        except CheckpointError:
            return ""

    def continue_from(self, step: int) -> None:
        """Removes what is not a complete checkpoint of `step` or earlier: damaged ones, and what a crash
        left. One that is whole, but was not what its name says, is only put aside."""
        processes.of_first(lambda: self._tidy(step))

    def _tidy(self, step: int) -> None:
        kept = {str(complete) for complete in self.steps if complete <= step}
        for path in self._inside.iterdir() if self._inside.is_dir() else ():
            if path.name.isdecimal() and int(path.name) in self._misnamed:
                _put_aside(path)
            elif path.name.partition(".")[0].isdecimal() and path.name not in kept:
                seal.remove(path)


def _put_aside(path: Path) -> None:
    names = (
        path.with_name(f"refused-{path.name}" + (f"-{count}" if count else "")) for count in itertools.count()
    )
    path.rename(next(name for name in names if not name.exists()))


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


def _load(path: Path, recipe: str, wanted: Wanted) -> dict[str, Any]:
    items = _alike(lambda: wanted(path) if callable(wanted) else wanted)

    def read() -> dict[str, Any]:
        processes.of_first(lambda: seal.verify(path, recipe, items))
        with _context():
            return ocp.load_checkpointables(str(path), dict(items))

    return _alike(read)


def _alike(work: Callable[[], T]) -> T:
    """The value of `work`, which every process does. If it fails in one, the same CheckpointError or Damaged
    is raised in all: one that went on would wait for the others at their next exchange."""
    value: Any = None
    failure: CheckpointError | Damaged | None = None
    try:
        value = work()
    except (CheckpointError, Damaged) as error:
        failure = error
    except Exception as error:  # whatever a damaged file makes Orbax raise
        file = getattr(error, "filename", None)
        failure = Damaged(f"{file}: {cause(error)}" if file else cause(error))
    if failures := [one for one in processes.exchange(failure) if one is not None]:
        with warnings.catch_warnings():  # Orbax leaves coroutines behind that it never awaited
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
        raise failures[0]
    return value


def _context() -> ocp.Context:
    """JSON items are written as JSON, for people to read; everything else as arrays.

    Folders are made before anything is written: made beside it, the threads that write wait for one that
    cannot be made (no inodes are left), five minutes each, and the process with them."""
    context = ocp.Context()
    context.async_options.create_directories_asynchronously = False
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
