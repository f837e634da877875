"""Lock files: what a network was composed of, exactly: by module its config and the sha256 of its file (or
the seed that began it), with the tokenizer and the preprocessing. JSON.

A run keeps its lock, a bundle carries one. The same lock composes the same network, bit for bit; where a file
behind it has become another one, it is refused with both sides.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from mplug2 import files, hub
from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError, CheckpointError
from mplug2.hub.card import Card, File, Tokens
from mplug2.hub.card_tokenizer import tokens_of
from mplug2.hub.fit import differences
from mplug2.hub.typed_json import decode, encode, parsed, plain_name, read_json
from mplug2.kernels import available
from mplug2.network import Network, Parameters
from mplug2.recipe import Mode, Recipe
from mplug2.roles import Config, Execution

FILE = "lock.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One module. `source` is the place of its card in the recipe's words, `card` its name, `file` its
    weights; without them it is begun from the lock's seed."""

    config: Config
    mode: Mode
    source: str = ""
    card: str = ""
    file: File | None = None

    def __post_init__(self):
        if (self.mode == "init") != (self.file is None):
            raise CardError(f"mode: is {self.mode!r}, and there is {'no' if self.file is None else 'a'} file")
        if self.file is not None:
            plain_name("card", self.card)


@dataclass(frozen=True, kw_only=True)
class Lock:
    """`recipe` and `overrides` find the recipe again. `folder`: where the lock was read; files beside it come
    before those that its cards name."""

    recipe: str
    overrides: tuple[str, ...]
    seed: int
    execution: Execution
    preprocessing: Preprocessing
    tokenizer: Tokens
    modules: Mapping[str, Part]
    folder: Path = dataclasses.field(default=Path(), compare=False, repr=False)

    def text(self) -> str:
        return json.dumps(encode(self), indent=1, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Raises OSError."""
        files.write_text(path, self.text())


def of(recipe: Recipe, name: str = "", overrides: Sequence[str] = ()) -> Lock:
    """What a recipe is composed of now; `name` and `overrides` are how it was found. Raises CardError."""
    return Lock(
        recipe=name or recipe.name,
        overrides=tuple(overrides),
        seed=recipe.seed,
        execution=recipe.execution,
        preprocessing=recipe.preprocessing,
        tokenizer=tokens_of(recipe.tokenizer),
        modules={module: _part(recipe, module) for module in recipe.parts},
    )


def _part(recipe: Recipe, module: str) -> Part:
    config, mode = recipe.parts[module], recipe.mode(module)
    if mode == "init":
        return Part(config=config, mode=mode)
    card = hub.card_of(recipe, module)
    return Part(config=config, mode=mode, source=recipe.cards[module], card=card.name, file=card.file)


def read(path: Path | str) -> Lock:
    """Raises CardError with the file and the field that is wrong."""
    path = Path(path)
    return _of(read_json(path, "lock"), f"lock {path}", path.parent)


def decoded(text: bytes, who: str, folder: Path) -> Lock:
    """The lock that `text` spells, as of `folder`. Raises CardError that begins with `who`."""
    return _of(parsed(text, who), who, folder)


def _of(value: Any, who: str, folder: Path) -> Lock:
    try:
        return dataclasses.replace(decode(Lock, value, ""), folder=folder)
    except CardError as error:
        raise CardError(f"{who}: {error}") from None


def check(lock: Lock) -> dict[str, Card]:
    """The cards of the lock's loaded modules, by module. Raises CardError, with both sides, where one is not
    what was locked."""
    return {module: _card(lock, module, part) for module, part in lock.modules.items() if part.file}


def compose(lock: Lock, mesh: jax.sharding.Mesh | None = None) -> tuple[Network, Parameters]:
    """The network that was locked, bit for bit; what cards hold is loaded onto `mesh` (default: this
    process's first device). Raises CardError, DownloadError."""
    cards = check(lock)
    execution = available(lock.execution)
    network = Network({module: part.config for module, part in lock.modules.items()}, execution)
    begun = {module: part.config for module, part in lock.modules.items() if not part.file}
    fresh = jax.jit(Network(begun, execution).init)(lock.seed)

    def loaded(card: Card) -> Parameters:
        return hub.load(card)[1] if mesh is None else hub.load_onto(card, mesh)

    return network, {
        module: fresh[module] if module in fresh else loaded(cards[module]) for module in lock.modules
    }


def _card(lock: Lock, module: str, part: Part) -> Card:
    """A loaded module's card: beside the lock, or where the recipe had it."""
    beside = lock.folder / f"{part.card}.json"
    card = hub.find(beside if beside.is_file() else part.source, module)
    locked: dict[str, Any] = {"sha256": part.file and part.file.sha256, "config": part.config}
    found: dict[str, Any] = {"sha256": card.file.sha256, "config": card.config}
    for fact, value in locked.items():
        if found[fact] != value:
            said = differences(found[fact], value) if fact == "config" else []
            raise CardError(
                f"module {module} was locked as card {part.card} of {fact} {value}; card {card.name} at "
                f"{card.folder} has {fact} {found[fact]}" + (f" ({', '.join(said)})" if said else "")
            )
    return card


def keep(folder: Path, now: Lock) -> None:
    """Writes a run's lock when the run begins. When it is continued, what it is composed of must still be the
    same: raises CardError that lists both sides; CheckpointError if it cannot be written."""
    path = folder / FILE
    try:
        if path.exists():
            compare(read(path), now)
        else:
            now.write(path)
    except CardError as error:
        raise CardError(f"{folder}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def compare(locked: Lock, now: Lock) -> None:
    """Raises CardError that lists both sides unless two locks are of the same network."""
    told = []
    for module in sorted({*locked.modules, *now.modules}):
        one, other = _facts(locked, module), _facts(now, module)
        told += [
            f"{module} {fact} was locked as {one.get(fact, 'absent')} and is {other.get(fact, 'absent')}"
            for fact in {**one, **other}
            if one.get(fact) != other.get(fact)
        ]
    for fact in ("seed", "preprocessing", "tokenizer"):
        one, other = getattr(locked, fact), getattr(now, fact)
        # A tokenizer is what its file holds, whatever the file is called.
        if one != (dataclasses.replace(other, file=one.file) if fact == "tokenizer" else other):
            told.append(f"{fact} was locked as {one} and is {other}")
    if told:
        raise CardError("; ".join(told))


def _facts(lock: Lock, module: str) -> dict[str, Any]:
    if module not in lock.modules:
        return {}
    part = lock.modules[module]
    return {
        "mode": part.mode,
        "sha256": part.file.sha256 if part.file else "(begun by the seed)",
        "config": part.config,
    }
