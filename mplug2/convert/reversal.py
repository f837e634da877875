"""The way back: modules and their cards -> one safetensors file under the official keys."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mplug2 import hub
from mplug2.convert import writing
from mplug2.convert.families import Model, canonical, mplug_model
from mplug2.convert.tensors import read_safetensors, stored
from mplug2.errors import CheckpointError, nearest
from mplug2.hub.card import Card

BACK = ("mplug2", "mplug")
STACKS = {768: 12, 1024: 24}
"""The layers of the released models' fusion encoders, idle ones too, by hidden width."""


def revert(folder: Path, family: str, path: Path, *, fusion_stack: int | None = None) -> int:
    """Writes the modules of a folder as one safetensors file under the official keys of BACK; returns their
    number.

    With the folder's own report, exactly the keys that were converted; without one (modules trained here),
    those of a fine-tuned file whose fusion encoder has `fusion_stack` layers. Raises CheckpointError or
    CardError.
    """
    if family not in BACK:
        raise CheckpointError(
            f'there is no way back to "{family}"{nearest(family, BACK)}; there is to {list(BACK)}'
        )
    report = _read_report(folder)
    if report and report["from"] != family:
        raise CheckpointError(f"{folder}: was converted from {report['from']}, not from {family}")
    cards = hub.cards(folder)
    fusion_stack = fusion_stack or report.get("fusion_stack")
    model = _model_of(cards, fusion_stack, flat=report.get("flat", family == "mplug"))
    weights = {module: read_safetensors(card.weights) for module, card in cards.items()}
    arrays = writing.restored(model.keys, lambda module, name: weights[module][name])
    for key, other in model.keys.tied.items():
        if other in arrays:
            arrays[key] = arrays[other]
    arrays |= {key: writing.counting(length) for key, length in model.keys.counted.items()}
    if report:  # the very keys that were there
        arrays = {key: arrays[canonical(key)] for key in report["keys"] if canonical(key) in arrays}
        unused = folder / "conversion" / "unused.safetensors"
        arrays |= {
            key: stored(tensor)
            for key, tensor in (read_safetensors(unused) if unused.is_file() else {}).items()
        }
    writing.stream(path, arrays, {"format": "pt"})
    return len(arrays)


def _model_of(cards: Mapping[str, Card], fusion_stack: int | None, *, flat: bool) -> Model:
    configs = {module: card.config for module, card in cards.items()}
    if "fusion" in configs and not fusion_stack:
        fusion: Any = configs["fusion"]
        fusion_stack = STACKS.get(fusion.width, fusion.depth)
    return mplug_model(configs, fusion_stack or 0, flat=flat)


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / "conversion" / "report.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
