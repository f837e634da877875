"""The zoo: one file per module, each with its Config, class and sizes. `MODULES` is the whole catalogue."""

import importlib
from collections.abc import Callable
from typing import Any

from mplug2.errors import RecipeError, nearest

# A module's name in recipes, tasks and cards -> its Config by place in this package, and what it does.
MODULES = {
    "vision": ("vision:Config", "clips → tokens: one encoder for images and videos"),
    "temporal": ("temporal:Config", "lent to vision: what only videos have, local in time"),
    "text": ("text:Config", "ids → tokens: private layers of the text encoder"),
    "connector": ("connector:Config", "tokens of one width → tokens of another"),
    "universal": ("universal:Config", "layers shared by text and vision; latents for vision"),
    "fusion": ("fusion:Config", "text tokens attend to vision tokens"),
    "decoder": ("decoder:Config", "tokens → text, one word after the other"),
    "contrastive": ("heads:ContrastiveConfig", "tokens → one space of vision and text"),
    "matching": ("heads:ClassifierConfig", "fused tokens → do text and vision belong together?"),
    "vision_classifier": ("heads:ClassifierConfig", "vision tokens → class"),
    "text_classifier": ("heads:ClassifierConfig", "text tokens → class"),
    "unmasker": ("heads:UnmaskerConfig", "text tokens → the words that were hidden"),
}

SIZES = ("tiny", "small", "base", "large")


def find(name: str) -> Any:
    """The Config class of a module by its name. Raises RecipeError with the nearest name."""
    if name not in MODULES:
        known = ", ".join(MODULES)
        raise RecipeError(f'there is no module "{name}"; known are {known}{nearest(name, MODULES)}')
    file, config = MODULES[name][0].split(":")
    return getattr(importlib.import_module(f"{__name__}.{file}"), config)


def sizes(name: str) -> dict[str, Callable[[], Any]]:
    """The sizes that a module's file defines; a head has none: its width follows from what it reads."""
    file = importlib.import_module(find(name).__module__)
    return {size: getattr(file, size) for size in SIZES if hasattr(file, size)}
