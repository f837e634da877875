"""The page that a person reads first: a README.md for a folder of cards, made of what the cards state."""

import dataclasses
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mplug2 import files
from mplug2.errors import CardError
from mplug2.hub.card import Card, Parent, Parents
from mplug2.roles import base_of
from mplug2.scores import said
from mplug2.screen import printable

NAME = "README.md"
LARGEST = 1_000_000
"""Bytes; a page that is longer is not ours."""

_ROUTE = """
 text ── text ──┐               ┌── contrastive, classifiers
                ├── universal ──┤
 image ┐        │               ├── fusion ── matching, unmasker
 video ┴ vision ┘               │      │
         └ temporal (videos)    └── decoder ── captions, answers, continuations
""".strip("\n")


def write(folder: Path, cards: Iterable[Card], where: str = "") -> Path:
    """Writes `folder`/README.md; `where` is the folder's public address, if it has one. Raises CardError."""
    path = folder / NAME
    try:
        files.write_text(path, text(list(cards), where or folder.name))
    except OSError as error:
        raise CardError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def text(cards: list[Card], where: str) -> str:
    """Markdown, with the header that model hubs read. What cards say is shown and never obeyed."""
    licences = sorted({card.licence for card in cards})
    alone = licences[0].lower() if len(licences) == 1 else "other"
    head = [
        "---",
        "library_name: mplug2",
        f"license: {alone if re.fullmatch(r'[a-z0-9.+-]+', alone) else 'other'}",
    ]
    head += ["tags: [jax, multimodal, mplug-2]", "---", ""]
    names = ", ".join(_code(card.module) for card in cards)
    what = "Modules" if len(cards) > 1 else "A module"
    lines = [
        f"# {_text(where)}",
        "",
        f"{what} of the [mplug2](https://arxiv.org/abs/2302.00402) zoo: {names}.",
        "",
    ]
    for card in cards:
        lines += section(card)
    lines += ["## The route", "", "Where modules stand in a network:", "", "```", _ROUTE, "```", ""]
    lines += ["## Use", "", "```python", *_use(cards, where), "```", ""]
    return "\n".join([*head, *lines])


def section(card: Card) -> list[str]:
    """Markdown lines that say what a card states."""
    seen = card.interface
    streams = f"{_text(', '.join(seen.reads))} → {_text(', '.join(seen.writes))}"
    rows = {
        "module": f"{_code(card.module)}: {streams}; width {seen.width}, stored as {seen.dtype}",
        "config": _code(_config(card.config)),
        "file": f"{_code(card.file.path)}, {card.file.bytes / 1e6:.2f} MB, sha256 `{card.file.sha256}`",
        "adapts": f"the `{base_of(card.module)}` of sha256 `{card.base}`, and no other" if card.base else "",
        "licence": _text(card.licence),
        "source": _text(card.source),
        "paper": _text(card.paper),
    }
    if (how := card.trained) is not None:
        told = f"{how.steps} steps, seed {how.seed}, commit {_text(how.commit)}"
        rows["trained"] = f"recipe {_code(how.recipe)}, {told}"
        sample = f", sha256 of a sample of the train split `{how.data_sha256}`"
        rows["data"] = _text(how.data) + (sample if how.data_sha256 else "")
        rows["machine"] = _text(how.machine)
    if (come := card.parents) is not None:
        rows["parents"] = _descent(come)
        rows["base"] = _parent(come.base) if come.base else ""
    if card.preprocessing is not None:
        rows["preprocessing"] = _code(_config(card.preprocessing))
    if card.tokenizer is not None:
        rows["tokenizer"] = f"{_code(card.tokenizer.file)}, sha256 `{card.tokenizer.sha256}`"
    if card.questions is not None:
        rows["questions"] = f"worded {card.questions.kind}, at most {card.questions.words} words"
    lines = [f"## {card.name}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value]
    if card.scores:
        lines += ["", "| evaluation | metric | score | 95% interval | n |", "|---|---|---|---|---|"]
    for name, score in card.scores.items():
        value, low, high = (said(score.metric, number) for number in (score.value, score.low, score.high))
        lines.append(f"| {_text(name)} | {_text(score.metric)} | {value} | {low} to {high} | {score.n} |")
    return [*lines, ""]


def _descent(come: Parents) -> str:
    """The method with its settings, and each parent with its coefficient."""
    settings = [f"{_text(name)} {value:.6g}" for name, value in come.settings.items()]
    settings += [f"take {_text(pattern)}" for pattern in come.take]
    told = _code(come.method) + (f" ({', '.join(settings)})" if settings else "")
    merged = [f"{one.coefficient:.6g} × {_parent(one)}" for one in come.merged]
    return f"{told} of {', '.join(merged)}" if merged else told


def _parent(one: Parent) -> str:
    return f"{_text(one.name)} (sha256 `{one.sha256}`)"


def _use(cards: list[Card], where: str) -> list[str]:
    mine = [json.dumps(f"{where}/{card.name}.json", ensure_ascii=not where.isprintable()) for card in cards]
    mine = [text.replace("<", "\\u003c") for text in mine]
    if all(card.base for card in cards):
        return [
            "from mplug2.predict import Predictor",
            f"cards = [{', '.join(mine)}]  # in a local copy of this folder",
            'predictor = Predictor.of("small")  # or other cards: what the deltas were trained on',
            "mine = predictor.adapted(*cards)  # verified by sha256; another base is refused",
            "mine.caption(mine.image(FILE))  # the predictor itself stays as it was",
        ]
    own = {card.module for card in cards}
    others = [f'"{module}-small"' for module in ("vision", "universal", "decoder") if module not in own]
    return [
        "from mplug2 import hub",
        f"cards = [{', '.join(mine)}]  # in a local copy of this folder",
        "config, params = hub.load(hub.find(cards[0]))  # verified by sha256",
        f"network, params = hub.compose(*cards{''.join(f', {one}' for one in others)})",
        "# modules that do not fit together are refused with both sides",
    ]


def _config(config: Any) -> str:
    fields = [f"{f.name}={_value(getattr(config, f.name))}" for f in dataclasses.fields(config)]
    return f"{type(config).__module__.rpartition('.')[2]}.{type(config).__qualname__}({', '.join(fields)})"


def _value(value: Any) -> str:
    return _config(value) if dataclasses.is_dataclass(value) else repr(value)


def _text(value: str) -> str:
    """Text that stays in its cell and is only text, whatever a card says: no table, markup, link or picture
    of Markdown's, and no HTML."""
    escaped = html.escape(printable(value), quote=False)
    return re.sub(r"([\\`*\[|~])", r"\\\1", escaped)


def _code(value: str) -> str:
    """The same as code. A span of Markdown's cannot hold all letters in a table."""
    value = printable(value)
    if re.search(r"[`<>&|\\]", value):
        return f"<code>{_text(value)}</code>"
    return f"`{value}`"
