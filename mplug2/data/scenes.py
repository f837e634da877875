"""Scenes of handwritten digits: composing them, and rendering them to clips uint8 T H W C.

An image scene (one frame) has one digit in a quadrant ("corner"), or two or three in a "row" or a "column". A
video scene is one event: a digit crosses the canvas ("motion"), one digit gives way to another ("order"), or
one digit is there in only the second ("appear") or the first ("vanish") half while another stands still.
Kinds and colours within a scene are distinct, and relations exclude one another, so every question has one
answer.

Every event and its opposite have the same distribution over *sets* of frames (each half holds the same number
of frames, a path runs over the same places either way, the noise is independent), so a reader that is blind
to the order of frames scores exactly at chance. Lengths below are for a 32-pixel canvas; other canvases
scale.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from mplug2.data.glyphs import bank
from mplug2.errors import DataError

COLOURS = {"red": (240, 70, 60), "green": (60, 210, 90), "blue": (80, 130, 255), "yellow": (240, 220, 60)}
SIZES = ("small", "large")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("left", "right", "up", "down")

Spot = tuple[int, int]  # row and column of a digit's top left pixel
_INK = {
    name: (np.arange(256)[:, None] * np.array(rgb) // 255).astype(np.uint8) for name, rgb in COLOURS.items()
}
_NOISE_STARTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Digit:
    """One digit of a scene: `glyph` and `variant` index its split's bank, `path` is its spot in every frame
    (None where it is not shown)."""

    kind: int
    glyph: int
    variant: int
    colour: str
    size: str
    path: tuple[Spot | None, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """Digits in reading order (left to right, top to bottom, first to last; in "appear" and "vanish" the
    changing digit, then the still one). `where` is the corner or the direction of the layouts that have one.
    `noise` picks the background."""

    split: str
    canvas: int
    layout: str
    where: str
    digits: tuple[Digit, ...]
    noise: int

    @property
    def frames(self) -> int:
        return len(self.digits[0].path)

    def boxes(self) -> np.ndarray:
        """Boxes float32 (digits, T, 4): top, left, bottom, right in 0..1; all zero where the digit is not
        shown."""
        rows = []
        for digit in self.digits:
            side = pixels(digit.size, self.canvas)
            for spot in digit.path:
                rows.append((0, 0, 0, 0) if spot is None else (*spot, spot[0] + side, spot[1] + side))
        return np.array(rows, np.float32).reshape(len(self.digits), self.frames, 4) / self.canvas


def pixels(size: str, canvas: int) -> int:
    """Height and width of a digit: a quarter of the canvas when small, three eighths when large."""
    return canvas // 4 if size == "small" else canvas * 3 // 8


def compose(
    rng: Random,
    split: str,
    frames: int = 1,
    canvas: int = 32,
    *,
    layout: str | None = None,
    count: int | None = None,
    kinds: Sequence[int] | None = None,
    sizes: Sequence[str] | None = None,
    where: str | None = None,
) -> Scene:
    """A scene drawn by `rng`; whatever is given stays fixed, the rest is uniform. Frames: 1 for an image,
    else >= 2."""
    if frames < 1 or canvas < 32 or canvas % 8:
        raise DataError(
            f"a scene needs frames >= 1 and a canvas of 32, 40, 48 ... pixels; got {frames} and {canvas}"
        )
    if frames == 1:
        count = count or (
            len(kinds) if kinds else 1 if layout == "corner" else rng.randint(2 if layout else 1, 3)
        )
        layout = layout or ("corner" if count == 1 else rng.choice(("row", "column")))
    else:
        layout = layout or rng.choice(("motion", "order", rng.choice(("appear", "vanish"))))
        count = 1 if layout == "motion" else 2
    kinds = kinds or rng.sample(range(10), count)
    sizes = sizes or draw_sizes(rng, count)
    sides = [pixels(size, canvas) for size in sizes]
    if layout == "corner":
        where = where or rng.choice(CORNERS)
        paths = [(_corner(rng, where, sides[0], canvas),)]
    elif layout == "motion":
        where = where or rng.choice(DIRECTIONS)
        paths = [_motion(rng, where, sides[0], canvas, frames)]
    elif layout == "order":
        first, second = (_anywhere(rng, side, canvas) for side in sides)
        paths = [_half(first, frames, late=False), _half(second, frames, late=True)]
    elif layout in ("appear", "vanish"):
        changing, still = _apart(rng, sides, canvas)
        paths = [_half(changing, frames, late=layout == "appear"), (still,) * frames]
    else:
        paths = [(spot,) for spot in _line(rng, sides, canvas, across=layout == "row")]
    digits = []
    for kind, colour, size, side, path in zip(
        kinds, rng.sample(tuple(COLOURS), count), sizes, sides, paths, strict=True
    ):
        glyphs = bank(split, side)
        digits.append(
            Digit(kind, rng.choice(glyphs.by_kind[kind]), rng.randrange(glyphs.variants), colour, size, path)
        )
    return Scene(split, canvas, layout, where or "", tuple(digits), rng.randrange(_NOISE_STARTS))


def draw_sizes(rng: Random, count: int) -> list[str]:
    """Sizes that fit the canvas together: free for one or two digits, at most one large among three."""
    if count < 3:
        return [rng.choice(SIZES) for _ in range(count)]
    large = rng.randrange(4)
    return ["large" if slot == large else "small" for slot in range(count)]


def render(scene: Scene) -> np.ndarray:
    """The scene as a clip uint8 T H W C: a dark, noisy background, and anti-aliased ink that outshines it."""
    clip = _background(scene.noise, (scene.frames, scene.canvas, scene.canvas, 3))
    for digit in scene.digits:
        side = pixels(digit.size, scene.canvas)
        ink = _INK[digit.colour][bank(scene.split, side).masks[digit.glyph, digit.variant]]
        for frame, spot in zip(clip, digit.path, strict=True):
            if spot is not None:
                patch = frame[spot[0] : spot[0] + side, spot[1] : spot[1] + side]
                np.maximum(patch, ink, out=patch)
    return clip


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(1797).integers(0, 36, 1 << 20).astype(np.uint8)


def _background(noise: int, shape: tuple[int, ...]) -> np.ndarray:
    """`T H W C`: of one level, and of each frame a stretch of the table. Those of a video are drawn one by
    one: stretches that followed one another would tell the order of the frames."""
    frames, *pixels = shape
    starts = [noise]
    if frames > 1:
        rng = Random(noise)
        starts = [rng.randrange(_NOISE_STARTS) for _ in range(frames)]
    size = int(np.prod(pixels))
    stretches = [np.resize(_noise()[start : start + size], pixels) for start in starts]
    return np.stack(stretches) + np.uint8(noise % 29)


def _corner(rng: Random, where: str, side: int, canvas: int) -> Spot:
    """A spot within one quadrant, at least a pixel clear of the centre lines."""
    unit, half = canvas // 32, canvas // 2
    row, column = (rng.randint(0, half - unit - side) for _ in range(2))
    return (
        row + (half + unit) * where.startswith("bottom"),
        column + (half + unit) * where.endswith("right"),
    )


def _anywhere(rng: Random, side: int, canvas: int) -> Spot:
    return (rng.randint(0, canvas - side), rng.randint(0, canvas - side))


def _spread(rng: Random, sides: Sequence[int], canvas: int, gap: int) -> list[int]:
    """Starts of intervals in order along one axis, at least `gap` apart, the slack shared out at random."""
    slack = canvas - sum(sides) - gap * (len(sides) - 1)
    starts, used = [], 0
    for cut, side in zip(sorted(rng.randint(0, slack) for _ in sides), sides, strict=True):
        starts.append(cut + used)
        used += side + gap
    return starts


def _line(rng: Random, sides: Sequence[int], canvas: int, across: bool) -> list[Spot]:
    """Two or three digits in a row (`across`) or a column: a clear gap along it, centres within 2 pixels
    across it."""
    unit = canvas // 32
    along = _spread(rng, sides, canvas, gap=unit * (2 if len(sides) == 2 else 1))
    widest = (max(sides) + 1) // 2
    centre = rng.randint(widest + unit, canvas - widest - unit)
    beside = [centre - side // 2 + rng.randint(-unit, unit) for side in sides]
    return list(zip(beside, along, strict=True) if across else zip(along, beside, strict=True))


def _apart(rng: Random, sides: Sequence[int], canvas: int) -> tuple[Spot, Spot]:
    """Two digits side by side along one axis, in either order, free along the other."""
    order = rng.sample((0, 1), 2)
    starts = _spread(rng, [sides[i] for i in order], canvas, gap=canvas // 16)
    along = dict(zip(order, starts, strict=True))
    free = [rng.randint(0, canvas - side) for side in sides]
    if rng.random() < 0.5:
        return (along[0], free[0]), (along[1], free[1])
    return (free[0], along[0]), (free[1], along[1])


def _motion(rng: Random, where: str, side: int, canvas: int, frames: int) -> tuple[Spot, ...]:
    """A straight path over at least half of the free length; opposite directions run over the same spots."""
    span = canvas - side
    low, high = rng.randint(0, span // 4), span - rng.randint(0, span // 4)
    steps = [low + round((high - low) * t / (frames - 1)) for t in range(frames)]
    if where in ("left", "up"):
        steps.reverse()
    beside = rng.randint(0, span)
    return tuple((beside, step) if where in ("left", "right") else (step, beside) for step in steps)


def _half(spot: Spot, frames: int, late: bool) -> tuple[Spot | None, ...]:
    """Shown in the first or the last `frames // 2` frames; the middle frame of an odd number belongs to
    neither half."""
    shown, hidden = (spot,) * (frames // 2), (None,) * (frames - frames // 2)
    return hidden + shown if late else shown + hidden
