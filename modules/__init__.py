"""The zoo: one file per module, each with its Config, class and sizes. This table is the whole catalogue.

`MODULES`: the name that a module has in recipes, tasks and cards -> its Config, by place in this package.
"""

import importlib
from collections.abc import Callable
from typing import Any

from mplug2.errors import RecipeError, nearest

MODULES = {
    "vision": "vision:Config",
    "temporal": "temporal:Config",
    "text": "text:Config",
    "connector": "connector:Config",
    "universal": "universal:Config",
    "fusion": "fusion:Config",
    "decoder": "decoder:Config",
    "contrastive": "heads:ContrastiveConfig",
    "matching": "heads:ClassifierConfig",
    "vision_classifier": "heads:ClassifierConfig",
    "text_classifier": "heads:ClassifierConfig",
    "unmasker": "heads:UnmaskerConfig",
}

SIZES = ("tiny", "small", "base", "large")


def find(name: str) -> Any:
    """The Config class of a module by its name. Raises RecipeError with the nearest name."""
    if name not in MODULES:
        raise RecipeError(
            f'there is no module "{name}"; known are {", ".join(MODULES)}{nearest(name, MODULES)}'
        )
    file, config = MODULES[name].split(":")
    return getattr(importlib.import_module(f"{__name__}.{file}"), config)


def sizes(name: str) -> dict[str, Callable[[], Any]]:
    """The sizes that a module's file defines, by name; a head has none: its width follows from what it
    reads."""
    config = find(name)
    file = importlib.import_module(config.__module__)
    return {size: getattr(file, size) for size in SIZES if hasattr(file, size)}
