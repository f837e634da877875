"""The run directory: what was asked for, on what, and how it went.

    run.json           recipe, overrides, fingerprint, settings; a session for every time it was started
    lock.json          the files and configs that the network was composed of
    load_report.json   the account of every array that the run began with
    metrics.jsonl      one object a line of the log; also tensorboard/
    checkpoints/       see mplug2.checkpoint

A directory belongs to one recipe: `fingerprint` covers all that decides what is computed, and nothing else
(OPERATION).
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import mplug2
from mplug2 import files
from mplug2.errors import CheckpointError, RecipeError
from mplug2.network import flat
from mplug2.recipe import Recipe

OPERATION = ("evaluations", "mesh", "workers", "log_every", "checkpoint_every", "keep", "best")
"""Fields of a recipe that do not change what is learned: a run may be continued with others."""

DEFAULT_FOLDER = Path("runs")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory that has been opened or begun. `recipe` is the name that finds the recipe again,
    `overrides` what was changed on the command line, `settings` every field that counts, flat, as text."""

    path: Path
    recipe: str
    overrides: tuple[str, ...]
    fingerprint: str
    settings: Mapping[str, str]
    sessions: tuple[Mapping[str, Any], ...] = ()

    @property
    def commit(self) -> str:
        """What the newest session ran on."""
        return self.sessions[-1]["commit"] if self.sessions else "unknown"

    def write(self) -> None:
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "path"
        }
        write_json(self.path / "run.json", values)


def read_run(path: Path | str) -> Run:
    """Raises CheckpointError if `path` is not a run directory."""
    path = Path(path)
    try:
        values = json.loads((path / "run.json").read_text())
        return Run(
            path,
            values["recipe"],
            tuple(values["overrides"]),
            values["fingerprint"],
            values["settings"],
            tuple(values["sessions"]),
        )
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a run directory: it has no run.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'run.json'} cannot be read: {type(error).__name__}: {error}"
        ) from None


def open_run(path: Path | str, recipe: Recipe, source: str = "", overrides: Sequence[str] = ()) -> Run:
    """The run directory of `recipe`, begun or continued, with one session more. `source` and `overrides` find
    the recipe again later. Raises RecipeError that lists the fields in which the directory's own recipe
    differs; one that was refused before its first step, and has kept nothing, may become another's."""
    path, told = Path(path), settings(recipe)
    with _writable(path):
        files.remove_unfinished(path / "run.json")
    new = Run(path, source or recipe.name, tuple(overrides), fingerprint(recipe), told)
    if (path / "run.json").exists():
        run = read_run(path)
        if run.fingerprint != new.fingerprint:
            if _begun(path):
                raise RecipeError(f"{path} holds a run of another recipe; {differences(run.settings, told)}")
            with _writable(path):
                (path / "lock.json").unlink(missing_ok=True)
            run = new
    elif path.is_dir() and any(path.iterdir()):
        raise RecipeError(f"{path} is not empty and not a run directory: give another one")
    else:
        run = new
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)
        run = dataclasses.replace(run, sessions=(*run.sessions, _session()))
        run.write()
    return run


@contextmanager
def alone(path: Path | str) -> Iterator[None]:
    """While it is entered, nobody else who enters it trains in the run directory `path`. It ends with the
    process. Raises CheckpointError where somebody does. (On network file systems it may hold on one machine
    alone, or not at all.)"""
    path = Path(path)
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{path}: {_who_trains(path)} trains there: stop it first, or give another run directory"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def _who_trains(path: Path) -> str:
    try:
        session = read_run(path).sessions[-1]
        return f"process {session['pid']} on {session['machine']['host']}, since {session['began']},"
    except (CheckpointError, LookupError):
        return "another process"


def _begun(path: Path) -> bool:
    """Whether the run in `path` has logged or kept a step."""
    metrics, checkpoints = path / "metrics.jsonl", path / "checkpoints"
    logged = metrics.exists() and metrics.stat().st_size > 0
    return logged or (checkpoints.is_dir() and any(checkpoints.iterdir()))


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"run directory {path} cannot be written: {error.strerror or error}") from None


def default_folder(recipe: Recipe) -> Path:
    """Where a run goes when nobody says: the same place for the same recipe."""
    return DEFAULT_FOLDER / f"{recipe.name}-{fingerprint(recipe)[:8]}"


def settings(recipe: Recipe, *, operation: bool = False) -> dict[str, str]:
    """Every field of a recipe that decides what is computed, flat: `{"optimizer.learning_rate": "0.001",
    ...}`. With `operation`, the others as well."""
    fields = _described(recipe)
    # The form of a delta decides something only where there is one.
    del fields["delta"], fields["deltas"]
    fields |= {"deltas": _described(recipe.forms)} if recipe.forms else {}
    return flat({name: value for name, value in fields.items() if operation or name not in OPERATION})


def fingerprint(recipe: Recipe) -> str:
    """sha256 of `settings`."""
    return hashlib.sha256(json.dumps(settings(recipe), sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    files.write_text(path, json.dumps(value, indent=1) + "\n")


def _described(value: Any) -> Any:
    """Nested dicts of text. A callable is its import path; an object is its type and what it holds."""
    if isinstance(value, Mapping):
        return {str(key): _described(inner) for key, inner in value.items()} or "{}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"": _name(type(value)), **fields} if not isinstance(value, Recipe) else fields
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    if isinstance(value, (list, tuple)):
        return repr([_described(inner) for inner in value])
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    return {"": _name(type(value)), **{name: _described(inner) for name, inner in vars(value).items()}}


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Where two recipes' settings differ, in words: "there" and "here"."""
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    told = [
        f"{name} is {theirs.get(name, 'absent')} there, {ours.get(name, 'absent')} here" for name in names
    ]
    return "; ".join(told[:8]) + (f"; and {len(told) - 8} fields more" if len(told) > 8 else "")


def _session() -> dict[str, Any]:
    return {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "pid": os.getpid(),
        "commit": commit(),
        "versions": {
            "mplug2": mplug2.__version__,
            "python": platform.python_version(),
            **{
                name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
            },
        },
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "devices": sorted({device.device_kind for device in jax.devices()}),
            "device_count": jax.device_count(),
            "process_count": jax.process_count(),
        },
    }


def commit() -> str:
    """The checkout's commit, `+` where files differ from it; `unknown` for an installed package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        said = subprocess.run(
            ["git", "-c", f"safe.directory={root}", "describe", "--always", "--abbrev=40", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
