"""Publishing: one module written as a safetensors file and the card that names it.

`write` fills a folder of one's own, such as a publication's (mplug2.hub.publication); `publish` is a
publication of one module.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Concatenate, ParamSpec

import numpy as np

from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError, nearest
from mplug2.hub import gate, weights
from mplug2.hub.card import (
    Card,
    File,
    Interface,
    Parents,
    Questions,
    Score,
    Tokens,
    Trained,
    draft,
    interface,
)
from mplug2.hub.gate import NONE
from mplug2.hub.publication import publication
from mplug2.network import Parameters, flat
from mplug2.roles import Config

Facts = ParamSpec("Facts")


def files_of(card: Card) -> dict[str, str]:
    """What a card in a folder brings: by file name, what tells its content from another's."""
    files = {f"{card.name}.json": f"card of {card.module}", card.file.path: card.file.sha256}
    return files if card.tokenizer is None else files | {card.tokenizer.file: card.tokenizer.sha256}


def check_apart(written: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Raises CardError, naming both, where two would write one file of a folder with different content.
    `written`: who writes, and its files as by `files_of`; disks that fold case are believed."""
    first: dict[str, tuple[str, str]] = {}
    for who, files in written:
        for name, content in files.items():
            other, known = first.setdefault(name.lower(), (who, content))
            if content != known:
                raise CardError(f"{other} and {who} would both write {name}: give one of them another name")


def write(
    folder: Path,
    name: str,
    module: str,
    config: Config,
    params: Parameters,
    *,
    dtype: str = "float32",
    licence: str = "Apache-2.0",
    source: str = "",
    paper: str = "",
    trained: Trained | None = None,
    parents: Parents | None = None,
    scores: Mapping[str, Score] = NONE,
    urls: tuple[str, ...] = (),
    connects: Interface | None = None,
    preprocessing: Preprocessing | None = None,
    tokenizer: Tokens | None = None,
    questions: Questions | None = None,
    base: str | None = None,
) -> Card:
    """Writes one module as `<name>.safetensors` and `<name>.json` into `folder`, one after the other; returns
    its card.

    `params` is the module's own nested dict; `base` is the sha256 of what a delta adapts. Raises CardError
    when its arrays are not the config's or not finite, in their own type or in `dtype`, and when the files
    cannot be written.
    """
    if dtype not in weights.FLOATS:
        raise CardError(
            f"dtype {dtype!r}: weights are published as {sorted(weights.FLOATS)}"
            + nearest(dtype, weights.FLOATS)
        )
    arrays = {key: np.asarray(array) for key, array in flat(params).items()}
    path = folder / f"{name}.safetensors"
    card = dataclasses.replace(
        draft(name, module, config, connects or interface(module, config, dtype), base),
        licence=licence,
        source=source,
        paper=paper,
        trained=trained,
        parents=parents,
        scores=dict(scores),
        preprocessing=preprocessing,
        tokenizer=tokenizer,
        questions=questions,
        folder=path.parent,
    )
    gate.check(card, gate.shapes(config, f"module {module}"), arrays)
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused below by name
        arrays = {key: array.astype(weights.FLOATS[dtype]) for key, array in arrays.items()}
    if strange := sorted(
        key for key, array in arrays.items() if not np.isfinite(array.astype(np.float32)).all()
    ):
        raise CardError(f"module {module}: not finite as {dtype}: {gate.listing(strange)}")
    sha256, size = weights.write(path, arrays, {"card": name})
    card = dataclasses.replace(card, file=File(path=path.name, sha256=sha256, bytes=size, urls=urls))
    card.write()
    return card


def _published(
    write: Callable[Concatenate[Path, Facts], Card],
) -> Callable[Concatenate[str | Path, Facts], Card]:
    def publish(folder: str | Path, /, *facts: Facts.args, **others: Facts.kwargs) -> Card:
        with publication(Path(folder)) as new:
            card = write(new.staged, *facts, **others)
        return new.cards[card.name]

    return publish


publish = _published(write)
"""As `write`, into a folder that others read and write: card and weights of that name become these together,
or stay what they were. Weights have the card's name or, where that is taken, one that tells their content."""
