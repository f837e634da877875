"""A run's report as one HTML file that needs nothing else: what a model said about pictures and videos that
it had never seen, scores beside their baselines, and loss curves.

Everything is given (curves, scores, sayings); this file only draws. Pictures are embedded as PNG, curves as
SVG.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mplug2 import files
from mplug2.scores import said
from mplug2.screen import printable

Scores = Mapping[str, Mapping[str, Any]]
Curve = Sequence[tuple[int, float]]  # (step, loss)

_COLOURS = (
    "#3366cc",
    "#dc3912",
    "#109618",
    "#ff9900",
    "#990099",
    "#0099c6",
    "#dd4477",
    "#66aa00",
    "#b82e2e",
    "#316395",
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:78rem;padding:0 1rem;color:#222}
h1{margin-bottom:0}h2{margin-top:2.5rem;border-bottom:1px solid
#ddd}table{border-collapse:collapse;margin:1rem 0} td,th{padding:.2rem
.7rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap;font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left}.faint{color:#888}.grid{display:flex;flex-wrap:wrap;gap:1rem}
figure{margin:0;border:1px solid
#ddd;border-radius:.5rem;padding:.7rem;width:15.5rem}figure.video{width:32.5rem} figure
img{image-rendering:pixelated;height:7rem;border-radius:.2rem;display:block;margin-bottom:.4rem}
figcaption{font-size:13px}.right{color:#0a7d32}.wrong{color:#c02020}.legend
span{margin-right:1rem;white-space:nowrap}
"""


@dataclass(frozen=True)
class Saying:
    """One thing a model said: to what (`asked`; empty for a caption), what it said, and the truth."""

    asked: str
    said: str
    truth: str

    @property
    def right(self) -> bool:
        return self.said == self.truth


@dataclass(frozen=True)
class Exhibit:
    """A clip uint8 `T H W C` (one frame: a picture; more: a film strip) and what was said about it, by
    model."""

    clip: np.ndarray
    sayings: Mapping[str, Sequence[Saying]]

    @property
    def right(self) -> bool:
        return all(saying.right for sayings in self.sayings.values() for saying in sayings)


@dataclass(frozen=True, kw_only=True)
class Report:
    """`scores`: {model: {evaluation: {value, low, high, blind, chance, n, metric}}}; `curves`: {objective:
    curve}."""

    title: str
    about: Sequence[str]
    scores: Mapping[str, Scores]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    exhibits: Sequence[Exhibit] = ()

    def write(self, path: Path) -> None:
        """Writes the page, whole or not at all."""
        files.write_text(path, self.html())

    def html(self) -> str:
        about = "".join(f"<p>{_text(line)}</p>" for line in self.about)
        pictures = [exhibit for exhibit in self.exhibits if len(exhibit.clip) == 1]
        videos = [exhibit for exhibit in self.exhibits if len(exhibit.clip) > 1]
        return (
            "<!doctype html><html lang=en><meta charset=utf-8>"
            f"<title>{_text(self.title)}</title><style>{_STYLE}</style>"
            f"<h1>{_text(self.title)}</h1>{about}"
            + (f"<h2>Pictures</h2>{_grid(pictures)}" if pictures else "")
            + (f"<h2>Videos, frame by frame</h2>{_grid(videos)}" if videos else "")
            + f"<h2>Scores</h2>{_score_table(self.scores)}"
            + (f"<h2>Loss</h2>{_chart(self.curves)}" if self.curves else "")
            + "</html>\n"
        )


def _score_table(scores: Mapping[str, Scores]) -> str:
    """A row an evaluation, three columns a model: its value with the 95% interval, then blind and chance."""
    names = list(dict.fromkeys(name for model in scores.values() for name in model))
    head = "".join(f"<th>{_text(model)}</th><th class=faint>95% interval</th>" for model in scores)
    rows = []
    for name in names:
        any_score = next(model[name] for model in scores.values() if name in model)
        metric = str(any_score["metric"])
        cells = "".join(_cells(metric, model.get(name)) for model in scores.values())
        rows.append(
            f"<tr><td>{_text(name)} <span class=faint>{_text(metric)}</span></td>{cells}"
            f"<td>{_said(metric, any_score['blind'])}</td><td>{_said(metric, any_score['chance'])}</td>"
            f"<td>{any_score['n']}</td></tr>"
        )
    return (
        f"<table><tr><th>evaluation</th>{head}<th>blind</th><th>chance</th><th>n</th></tr>{''.join(rows)}</table>"
        "<p class=faint>Held-out glyphs. Blind: the best that a reader of the words alone scores. "
        "Intervals: 95%.</p>"
    )


def _cells(metric: str, score: Mapping[str, Any] | None) -> str:
    """A model's two columns; empty where it was not asked, with the reason where there is no interval."""
    if score is None:
        return "<td></td><td></td>"
    value, low, high = (_said(metric, score[bound]) for bound in ("value", "low", "high"))
    bounds = f"{low} to {high}" if score["low"] is not None else html.escape(score.get("why", ""))
    return f"<td><b>{value}</b></td><td class=faint>{bounds}</td>"


def _said(metric: str, value: float | None) -> str:
    return "&ndash;" if value is None else said(metric, value)


def _chart(curves: Mapping[str, Curve], width: int = 900, height: int = 320) -> str:
    """Losses against steps, as SVG, the losses on a logarithmic axis."""
    points = [point for curve in curves.values() for point in curve]
    last = max(step for step, _ in points) or 1
    logs = [np.log10(max(loss, 1e-4)) for _, loss in points]
    low, high = min(logs), max(max(logs), min(logs) + 1e-6)
    left, bottom = 46, 24

    def place(step: int, loss: float) -> str:
        x = left + (width - left) * step / last
        y = (height - bottom) * (high - np.log10(max(loss, 1e-4))) / (high - low)
        return f"{x:.1f},{y:.1f}"

    lines, legend = [], []
    for (name, curve), colour in zip(
        curves.items(), _COLOURS * (1 + len(curves) // len(_COLOURS)), strict=False
    ):
        path = " ".join(place(step, loss) for step, loss in curve)
        lines.append(f'<polyline fill=none stroke="{colour}" stroke-width=1.5 points="{path}"/>')
        legend.append(f'<span style="color:{colour}">&#9632; {_text(name)}</span>')
    ticks = []
    for power in range(int(np.floor(low)), int(np.ceil(high)) + 1):
        for value in (10.0**power, 3 * 10.0**power):
            if low <= np.log10(value) <= high:
                y = place(0, value).split(",")[1]
                ticks.append(f'<line x1={left} x2={width} y1={y} y2={y} stroke="#eee"/>')
                ticks.append(
                    f'<text x={left - 6} y={y} text-anchor=end dy=4 font-size=11 fill="#888">{value:g}</text>'
                )
    for step in np.linspace(0, last, 6).astype(int):
        x = place(int(step), 10.0**low).split(",")[0]
        ticks.append(f'<text x={x} y={height - 6} text-anchor=middle font-size=11 fill="#888">{step}</text>')
    return (
        f'<svg viewBox="0 0 {width + 20} {height}" width="100%">{"".join(ticks)}{"".join(lines)}</svg>'
        f"<p class=legend>{''.join(legend)}</p>"
    )


def _text(value: str) -> str:
    """Text that is only text: no HTML, and nothing that cannot be seen."""
    return html.escape(printable(value))


def _grid(exhibits: Sequence[Exhibit]) -> str:
    return f"<div class=grid>{''.join(_figure(exhibit) for exhibit in exhibits)}</div>"


def _figure(exhibit: Exhibit) -> str:
    lines = []
    for model, sayings in exhibit.sayings.items():
        lines.append(f"<div class=faint>{_text(model)}</div>")
        for saying in sayings:
            asked = f"{_text(saying.asked)}? " if saying.asked else ""
            mark, kind = ("&#10003;", "right") if saying.right else ("&#10007;", "wrong")
            truth = "" if saying.right else f" <span class=faint>({_text(saying.truth)})</span>"
            lines.append(f"<div>{asked}<span class={kind}>{mark} {_text(saying.said)}</span>{truth}</div>")
    kind = ' class="video"' if len(exhibit.clip) > 1 else ""
    picture = f'<img alt="" src="{_png(exhibit.clip)}">'
    return f"<figure{kind}>{picture}<figcaption>{''.join(lines)}</figcaption></figure>"


def _png(clip: np.ndarray) -> str:
    """A clip as a data URL: its frames side by side, two white pixels between them."""
    gap = np.full((clip.shape[1], 2, 3), 255, np.uint8)
    strip = [part for frame in clip for part in (frame, gap)][:-1]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(strip, axis=1)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
