"""Cards to merge: a base and three of the same modules, with parameters drawn by numpy."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from mplug2.hub import publishing, weights
from mplug2.hub.card import Card
from mplug2.modules import heads, vision
from mplug2.network import Network, flat, nested

MODULES = {"vision": vision.tiny(), "contrastive": heads.ContrastiveConfig(width=32, space=16)}
SHAPES = Network(MODULES).shapes


def drawn(seed: int, modules: dict = MODULES) -> dict:
    """By module, arrays by name."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES if modules is MODULES else Network(modules).shapes
    return {
        module: {name: rng.standard_normal(shape.shape, np.float32) for name, shape in flat(tree).items()}
        for module, tree in shapes.items()
    }


def publish(folder: Path, seed: int, family: str, **more) -> Path:
    modules = more.pop("modules", MODULES)
    for module, arrays in drawn(seed, modules).items():
        tree = nested({tuple(name.split(".")): array for name, array in arrays.items()})
        publishing.publish(folder, f"{module}-{family}", module, modules[module], tree, **more)
    return folder


def parents(folder: Path) -> dict[str, Path]:
    """Directories of cards: `base`, and `a`, `b`, `c`."""
    return {name: publish(folder / name, seed, name) for seed, name in enumerate(("base", "a", "b", "c"))}


def read(card: Card) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in weights.read(card.weights, card.file.sha256).items()}


def change(card: Card, **fields) -> Card:
    """The card with other fields, written beside its file."""
    changed = replace(card, **fields)
    changed.write()
    return changed


def copy(place: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in place.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
