"""Bundles: a network to carry to a machine without a network: every module's card and weights, the tokenizer
and the lock, in one folder or one tar. What it computes there is what it computes here, bit for bit.

A bundle is a directory of cards with a lock beside them, so whatever reads cards reads it too. Trained
modules are written as float32, which is what they were trained as; others are their card's own file.
"""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mplug2 import hub
from mplug2.card_wording import questions_of, wording_of, wording_of_cards
from mplug2.data.tokens import Tokenizer
from mplug2.data.wording import Wording
from mplug2.errors import CardError
from mplug2.hub import archive, lock, publishing
from mplug2.hub.card import Card, Trained
from mplug2.hub.card_tokenizer import carried, opened
from mplug2.hub.fit import differences
from mplug2.hub.lock import Lock, Part
from mplug2.hub.weights import replacing
from mplug2.network import Network, Parameters
from mplug2.recipe import Recipe


@dataclass(frozen=True)
class Bundle:
    """What was opened. `wording` is what the cards state, so that it answers alike wherever it is opened."""

    lock: Lock
    network: Network
    params: Parameters
    tokenizer: Tokenizer
    wording: Wording | None


def write(
    folder: Path,
    locked: Lock,
    recipe: Recipe,
    trained: Parameters,
    *,
    facts: Trained | None = None,
) -> None:
    """Into `folder`, which must be empty or absent: `trained` modules from their parameters, the others of
    `recipe` from the cards it loads. `locked` is the recipe's lock, `facts` how the trained ones came about.
    Raises CardError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CardError(f"{folder} is there already: give another place for the bundle")
    parts: dict[str, Part] = {}
    questions = questions_of(wording_of(recipe))
    family = recipe.name.replace(".", "-").replace(" ", "-")
    loaded = {module: hub.card_of(recipe, module) for module in recipe.parts if module not in trained}
    _check_apart(locked, family, loaded, trained)
    for module, config in recipe.parts.items():
        if module in trained:
            states = module in ("vision", "temporal")
            card = publishing.publish(
                folder,
                f"{module}-{family}",
                module,
                config,
                trained[module],
                trained=facts,
                preprocessing=recipe.preprocessing if states else None,
                tokenizer=locked.tokenizer if hasattr(config, "vocabulary") else None,
                questions=questions if module == "text" else None,
                base=hub.base_sha256(recipe, module),
            )
        else:
            card = loaded[module]
            if module == "text":  # this network's questions are worded as its recipe words them
                card = dataclasses.replace(card, questions=questions)
            card = _copied(card, folder)
        parts[module] = Part(config=config, mode="full", source=card.name, card=card.name, file=card.file)
    carried(recipe.tokenizer, folder)
    dataclasses.replace(locked, modules=parts).write(folder / lock.FILE)


def _check_apart(locked: Lock, family: str, loaded: Mapping[str, Card], trained: Iterable[str]) -> None:
    """Raises CardError where two files of a bundle would have one name."""
    written = {module: publishing.files_of(card) for module, card in loaded.items()}
    for module in trained:
        name = f"{module}-{family}"
        written[module] = {f"{name}.json": "", f"{name}.safetensors": ""}
    own = {lock.FILE: "", locked.tokenizer.file: locked.tokenizer.sha256}
    publishing.check_apart([*written.items(), ("the bundle", own)])


def _copied(card: Card, folder: Path) -> Card:
    """The card and its weights, in `folder`."""
    copy = dataclasses.replace(card, folder=folder)
    with hub.located(card).open("rb") as weights, replacing(copy.weights) as file:
        shutil.copyfileobj(weights, file, 1 << 20)
    copy.write()
    return copy


def is_bundle(path: Path) -> bool:
    """Is this a bundle's folder or tar? A run's folder is not one."""
    if path.suffix == ".tar":
        return path.is_file()
    return (path / lock.FILE).is_file() and not (path / "run.json").exists()


def load(path: Path) -> Bundle:
    """The network of a bundle, verified. A tar is unpacked for as long as it takes to map its files. Raises
    CardError."""
    if path.suffix != ".tar":
        return _load(path)
    with tempfile.TemporaryDirectory(prefix="mplug2-") as folder:
        archive.unpack(path, Path(folder))
        return _load(Path(folder))


def _load(folder: Path) -> Bundle:
    locked = lock.read(folder / lock.FILE)
    try:
        cards = _inside(locked, folder)
        tokenizer = opened(locked.tokenizer, folder)
    except CardError as error:
        raise CardError(f"bundle {folder}: {error}") from None
    network, params = lock.compose(locked)
    return Bundle(locked, network, params, tokenizer, wording_of_cards(cards.values()))


def _inside(locked: Lock, folder: Path) -> dict[str, Card]:
    """The cards of a bundle's modules. Raises CardError unless all are in its folder with their weights: it
    comes from strangers, so nothing is read or fetched from elsewhere, and no array is made that no file of
    theirs holds."""
    for module, part in locked.modules.items():
        if part.file is None:
            raise CardError(f"module {module} has no file; a bundle holds the weights of every module")
        for name in (f"{part.card}.json", part.file.path):
            if not (folder / name).is_file():
                raise CardError(f"module {module}: {name} is not in the bundle, which holds all its files")
    return lock.check(locked)


def check_recipe(bundle: Bundle, recipe: Recipe) -> None:
    """Raises CardError, with both sides, unless a recipe found by the bundle's lock has the bundle's
    modules."""
    theirs: Mapping[str, object] = recipe.parts
    if theirs != bundle.network.configs:
        differing = [
            difference
            for module in {**bundle.network.configs, **theirs}
            for difference in differences(
                bundle.network.configs.get(module), theirs.get(module), f"modules.{module}"
            )
        ]
        raise CardError(
            f"recipe {bundle.lock.recipe} is not the one that was bundled: {', '.join(differing[:8])}"
        )
