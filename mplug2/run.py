"""The run directory: what was asked for, on what, and how it went. It needs nothing but itself.

    run.json           the recipe itself, its places and settings, what its data held; a session for every
                       time it was started
    recipe/            of a recipe file: its source and its neighbours'; a tokenizer's file
    lock.json          the files and configs that the network was composed of
    load_report.json   the account of every array that the run began with
    metrics.jsonl      one object a line of the log; also tensorboard/
    checkpoints/       see mplug2.checkpoint

A directory belongs to one recipe: `settings` cover all that decides what is computed (mplug2.settings). How
the recipe of a run is had again is told in mplug2.recipes.runs.
"""

import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import mplug2
from mplug2 import files, places, recipe_json, trust
from mplug2.data.annotations import inside
from mplug2.data.inventory import Inventory, changes
from mplug2.errors import CardError, CheckpointError, DataError, RecipeError
from mplug2.hub.typed_json import decode, encode, read_json
from mplug2.recipe import Recipe
from mplug2.settings import differences, fingerprint, in_words, settings
from mplug2.source import Sources

DEFAULT_FOLDER = Path("runs")
FILE = "run.json"
KEPT = "recipe"
LARGEST_KEPT = 100_000_000  # bytes; source files and vocabularies have a few thousand to a few million
SESSIONS = 500
"""So many are remembered: the first, and the newest others."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory that has been opened or begun. `recipe` and `overrides` are the words that named the
    recipe, `settings` every field that counts, flat, as text.

    `values` is the recipe as JSON (mplug2.recipe_json), None of one that only its own code can make; `places`
    are its places by dotted path, absolute; `kept` the sha256 of each file in recipe/, `main` the recipe file
    among them, `mark` says that this user made them (mplug2.trust); `data` what the feeds' data held.
    `notes`: what whoever continues the run is to be told.
    """

    path: Path
    recipe: str
    overrides: tuple[str, ...]
    fingerprint: str
    settings: Mapping[str, str]
    sessions: tuple[Mapping[str, Any], ...] = ()
    values: Any = None
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    main: str = ""
    mark: str = ""
    data: Mapping[str, tuple[Inventory, ...]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def commit(self) -> str:
        """What the newest session ran on."""
        return self.sessions[-1].get("commit", "unknown") if self.sessions else "unknown"

    @property
    def marked(self) -> dict[str, object]:
        """What `mark` is of."""
        return {"recipe": self.recipe, "main": self.main, "kept": dict(self.kept)}

    def write(self) -> None:
        written = {name: encode(getattr(self, name)) for name in _WRITTEN}
        write_json(self.path / FILE, {name: value for name, value in written.items() if value is not None})


_WRITTEN = tuple(field.name for field in dataclasses.fields(Run) if field.name not in ("path", "notes"))


def is_run(path: Path | str) -> bool:
    """Is this a run directory?"""
    return (Path(path) / FILE).is_file()


def read_run(path: Path | str) -> Run:
    """Raises CheckpointError if `path` is not a run directory, or with the field of run.json that is
    wrong."""
    path = Path(path)
    if not is_run(path):
        raise CheckpointError(f"{path} is not a run directory: it has no {FILE}")
    try:
        value = read_json(path / FILE, "run")
        if not isinstance(value, dict):
            raise CardError(f"expected an object, got a {type(value).__name__}")
        return Run(path, **_read_fields(value))
    except CardError as error:
        raise CheckpointError(f"{path / FILE} cannot be read: {error}") from None


def _read_fields(value: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(Run)
    for field in dataclasses.fields(Run)[1:5]:
        if field.name not in value:
            raise CardError(f"{field.name}: missing")
    found = {name: decode(hints[name], value[name], name) for name in _WRITTEN if name in value}
    for place, session in enumerate(found.get("sessions", ())):
        for name, hint in (("commit", str), ("machine", Mapping[str, Any])):
            decode(hint | None, session.get(name), f"sessions[{place}].{name}")
    return found


def open_run(
    path: Path | str,
    recipe: Recipe,
    source: str = "",
    overrides: Sequence[str] = (),
    *,
    sources: Sources | None = None,
    data: Mapping[str, tuple[Inventory, ...]] | None = None,
    changed_data: bool = False,
) -> Run:
    """The run directory of `recipe`, begun or continued, with one session more.

    `source` and `overrides` are the words that named the recipe, `sources` those of its file, `data` what its
    train splits hold. Raises RecipeError that lists the fields in which the directory's own recipe differs;
    one that was refused before its first step, and has kept nothing, may become another's. Raises DataError
    where the data is not what the run was trained on, unless that is wanted (`changed_data`).
    """
    path = Path(path)
    with _writable(path):
        files.remove_unfinished(path / FILE)
    run = _described(path, recipe, source, overrides, data or {})
    if (path / FILE).exists():
        before = read_run(path)
        if differing := differences(before.settings, recipe):
            if _begun(path):
                told = in_words(differing, before.settings, run.settings)
                raise RecipeError(f"{path} holds a run of another recipe; {told}")
            with _writable(path):
                (path / "lock.json").unlink(missing_ok=True)
        else:
            run = dataclasses.replace(run, sessions=before.sessions, fingerprint=before.fingerprint)
            if _begun(path):
                run = _continued(before, run, sources, changed_data)
    elif path.is_dir() and any(path.iterdir()):
        raise RecipeError(f"{path} is not empty and not a run directory: give another one")
    with _writable(path):
        path.mkdir(parents=True, exist_ok=True)
        run = _with_files(run, recipe, sources)
        sessions = (*run.sessions, _session())
        if len(sessions) > SESSIONS:
            sessions = (sessions[0], *sessions[1 - SESSIONS :])
        run = dataclasses.replace(run, sessions=sessions)
        run.write()
    return run


def _described(
    path: Path,
    recipe: Recipe,
    source: str,
    overrides: Sequence[str],
    data: Mapping[str, tuple[Inventory, ...]],
) -> Run:
    try:
        values = recipe_json.encode(places.fixed(recipe))
    except recipe_json.NotOursError:
        values = None
    return Run(
        path,
        source or recipe.name,
        tuple(overrides),
        fingerprint(recipe),
        settings(recipe),
        values=values,
        places=places.found(recipe),
        data=data,
    )


def _continued(before: Run, run: Run, sources: Sources | None, changed_data: bool) -> Run:
    """With what has changed since `before`, in words. Raises DataError."""
    notes = []
    for feed in [feed for feed in run.data if len(before.data.get(feed, ())) == len(run.data[feed])]:
        pairs = zip(before.data[feed], run.data[feed], strict=True)
        told = "; ".join(change for one, other in pairs for change in changes(one, other))
        if told and not changed_data:
            raise DataError(
                f"{run.path}: the data of {feed} is not what this run was trained on: {told}; put it back, "
                "begin another run, or go on with it by --changed-data"
            )
        notes += [f"goes on with other data of {feed}: {told}"] if told else []
        notes += [
            f"{place} is now {now}, was {before.places[place]}" + ("" if told else ": the same content")
            for place, now in run.places.items()
            if place.startswith(f"objectives.{feed}.") and before.places.get(place, now) != now
        ]
    if sources and before.kept and (other := _changed(before.kept, sources.hashes)):
        notes.append(f"{', '.join(other)} changed since this run was last started; its settings did not")
    return dataclasses.replace(run, data={**before.data, **run.data}, notes=tuple(notes))


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name in now if before.get(name) != now[name]]


def _with_files(run: Run, recipe: Recipe, sources: Sources | None) -> Run:
    """With what recipe/ keeps; what else lies there is nobody's. Raises OSError."""
    keep = dict(sources.files) if sources else {}
    hashes = dict(sources.hashes) if sources else {}
    tokenizer: Any = recipe.tokenizer
    for place in run.places:
        if place.startswith("tokenizer.") and hasattr(tokenizer, "content"):
            keep[Path(run.places[place]).name] = tokenizer.content
            hashes[Path(run.places[place]).name] = tokenizer.sha256
    folder, main = run.path / KEPT, sources.main if sources else ""
    for name, content in keep.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != content:
            with files.replacing(folder / name) as file:
                file.write(content)
    run = dataclasses.replace(run, kept=hashes, main=main)
    if not sources:
        return run
    try:
        return dataclasses.replace(run, mark=trust.mark(run.marked))
    except CheckpointError as error:
        return dataclasses.replace(run, notes=(*run.notes, f"{error}; this run will ask for --trust"))


def kept_file(run: Run, name: str, *, verify: bool = True) -> bytes:
    """The content of a file in recipe/. Raises CheckpointError for one that cannot be read or, with `verify`,
    is not the one that was kept."""
    try:
        path = inside(run.path / KEPT, name, str(run.path / FILE))
    except DataError as error:
        raise CheckpointError(str(error)) from None
    try:
        content = files.read_regular(path, LARGEST_KEPT)
    except OSError as error:
        said = f"{path} cannot be read ({error.strerror or error})"
        raise CheckpointError(f"{said}: the run needs it") from None
    if verify and hashlib.sha256(content).hexdigest() != run.kept.get(name):
        raise CheckpointError(f"{path} is not the file that the run kept: its sha256 is another")
    return content


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
    except (CheckpointError, LookupError, TypeError):
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


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    files.write_text(path, json.dumps(value, indent=1) + "\n")


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
