"""Whether modules of different origin fit together, seen before any of their weights is here: by what their
cards state, and by tracing the tasks that they can play with abstract arrays.

A refusal names both sides and draws the route: `clips → vision (64) ✗ universal (32) → decoder (32)`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mplug2 import tasks
from mplug2.composition import misfit, watched
from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError, Mplug2Error
from mplug2.hub import gate
from mplug2.hub.card import Card
from mplug2.network import Network, parts_of
from mplug2.recipe import Objective
from mplug2.roles import Config, Execution, base_of

ORDER = ("vision", "temporal", "connector", "text", "universal", "fusion", "decoder")
"""Modules as a clip and a text meet them; heads come after."""

_WORDS = 8


def check_fit(by_module: Mapping[str, Card]) -> None:
    """Raises CardError, naming both cards and what they state, unless each fact that cards share is one."""
    stated: dict[str, tuple[str, Any]] = {}
    for module, card in by_module.items():
        for fact, value in _facts(module, card, "connector" in by_module):
            other, said = stated.setdefault(fact, (card.name, value))
            if value != said:
                hint = "; a connector can stand between vision and the others" if fact == "width" else ""
                raise CardError(
                    f"cards {other} and {card.name} do not fit: {other} has {fact} {said}, "
                    f"{card.name} has {fact} {value}{hint} ({_drawn(by_module)})"
                )


def _facts(module: str, card: Card, connected: bool) -> Iterator[tuple[str, Any]]:
    """What a card states that other cards of its network must state alike."""
    if connected and module in ("vision", "temporal", "connector"):
        yield "vision width", getattr(card.config, "inputs", card.interface.width)
    if not connected or module not in ("vision", "temporal"):
        yield "width", card.interface.width
    if module in ("vision", "temporal"):
        yield "vision depth", getattr(card.config, "depth", None)
    if card.interface.vocabulary is not None:
        yield "vocabulary", card.interface.vocabulary
    if card.tokenizer is not None:
        yield "tokenizer", card.tokenizer.sha256
    if card.questions is not None:
        yield "questions", card.questions
    if card.preprocessing is not None:
        yield "preprocessing", card.preprocessing


def check_base(delta: Card, base: Card | None) -> None:
    """Raises CardError, with both sides, unless `base` is the very module that a delta was trained on."""
    wanted = base_of(delta.module)
    if base is None:
        raise CardError(
            f"card {delta.name} is a delta of the {wanted} of sha256 {delta.base}, "
            f"no card of {wanted} is given"
        )
    if base.file.sha256 != delta.base:
        raise CardError(
            f"card {delta.name} is a delta of the {wanted} of sha256 {delta.base}, "
            f"card {base.name} has sha256 {base.file.sha256}"
        )
    if differing := differences(getattr(delta.config, "of", None), base.config):
        raise CardError(f"cards {delta.name} and {base.name} do not fit: {', '.join(differing)}")


def differences(card: Any, recipe: Any, where: str = "") -> list[str]:
    """The fields in which two configs differ, as `name (card 128, recipe 256)`."""
    if type(card) is not type(recipe):
        return [f"{where or 'config'} (card {type(card).__qualname__}, recipe {type(recipe).__qualname__})"]
    if not dataclasses.is_dataclass(card):
        return [] if card == recipe else [f"{where} (card {card!r}, recipe {recipe!r})"]
    return [
        difference
        for f in dataclasses.fields(card)
        for difference in differences(
            getattr(card, f.name), getattr(recipe, f.name), f"{where}.{f.name}" if where else f.name
        )
    ]


def _drawn(by_module: Mapping[str, Card]) -> str:
    """The route in a line, each module with its width, `✗` where widths meet that differ."""
    order = [module for module in ORDER if module in by_module and module != "temporal"]
    order += [module for module in by_module if module not in ORDER]
    route, before = ("clips" if "vision" in by_module else "words"), None
    for module in order:
        card = by_module[module]
        given = getattr(card.config, "inputs", card.interface.width) if module == "connector" else None
        reads, gives = given or card.interface.width, card.interface.width
        said = f"{reads} to {gives}" if reads != gives else str(gives)
        route += f" {'→' if before in (None, reads) else '✗'} {module} ({said})"
        before = gives
    return f"route: {route}"


def check_routes(configs: Mapping[str, Config], preprocessing: Preprocessing | None = None) -> list[str]:
    """Traces tasks until every module that any task can play has been called; the names of those traced.
    Raises CardError that names who gave what to whom."""
    for module, config in configs.items():
        gate.shapes(config, f"module {module}")
    network = Network(configs, Execution(scan=True))  # a scan refuses stacks of unequal depth
    batch = _batch(configs, preprocessing)
    seen: set[str] = set()
    traced: list[str] = []
    for name, task in sorted(_tasks().items(), key=lambda item: -len(set(parts_of(item[1])) & set(configs))):
        parts = parts_of(task)
        playing = set(parts) & set(configs)
        if playing <= seen or any(needed and part not in configs for part, needed in parts.items()):
            continue
        forward, calls = watched(network, Objective(task=task, data=None, batch=2))
        try:
            jax.eval_shape(forward, network.shapes, batch)
        except Mplug2Error as error:
            raise CardError(f"task {name}: {error}") from None
        except Exception as error:  # the numbers are a stranger's, as in mplug2.hub.gate
            raise CardError(f"task {name}: {misfit(calls, configs, error)}") from error
        seen |= playing
        traced.append(name)
    return traced


def _tasks() -> dict[str, Callable[..., Any]]:
    return {
        name: task
        for name, task in inspect.getmembers(tasks, inspect.isfunction)
        if task.__module__ == tasks.__name__ and not name.startswith("_")
    }


def _batch(
    configs: Mapping[str, Any], preprocessing: Preprocessing | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Every field that a task may read, for two examples."""
    height, width = getattr(configs.get("vision"), "image", (32, 32))
    if preprocessing is not None:
        height, width = preprocessing.height, preprocessing.width
    frames = 2 if "temporal" in configs else 1
    words = min([_WORDS, *(config.positions for config in configs.values() if hasattr(config, "positions"))])
    ids = jax.ShapeDtypeStruct((2, words), jnp.int32)
    texts = ("text", "caption", "question", "answer", "target", "masked", "masked_target")
    return {
        "clips": jax.ShapeDtypeStruct((2, frames, height, width, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((2,), jnp.int32),
        **dict.fromkeys(texts, ids),
    }
