"""Views: frames of a video at its own size, uint8 T H' W' C -> a clip of a network's size, uint8 T H W C.

What a view draws, it draws once a clip: all frames are cut and changed alike. `Whole` and `RandomCrop` are
the zoo's own, of evaluation and of training; `OfficialWhole` and `OfficialCrop` are what the official mPLUG-2
code did there, for weights and numbers that came from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np

from mplug2.data.pixels import Preprocessing
from mplug2.data.resample import affine, bicubic, nearest
from mplug2.errors import DataError


class View(Protocol):
    """How a clip is looked at, in training or after it."""

    def __call__(self, frames: np.ndarray, size: Preprocessing, rng: Random) -> np.ndarray: ...


@dataclass(frozen=True)
class Whole:
    """All of every frame, as `Preprocessing` has it: bicubic, antialiased, squashed to the target's size."""

    def __call__(self, frames: np.ndarray, size: Preprocessing, rng: Random) -> np.ndarray:
        return size.from_frames(frames)


@dataclass(frozen=True)
class RandomCrop:
    """A random part of the picture, resized as `Whole` does; then mirrored with probability `flip` (0 where
    texts say left or right), and `changes` random CHANGES, each at up to `strength`, one way or the other.

    `area`: of the part, as a share of the picture; `ratio`: of its width to its height.
    """

    area: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    changes: int = 2
    strength: float = 1.0

    def __post_init__(self):
        if not 0 <= self.changes <= len(CHANGES):
            raise DataError(f"{self.changes} changes to a clip; there are {len(CHANGES)}, each at most once")

    def __call__(self, frames: np.ndarray, size: Preprocessing, rng: Random) -> np.ndarray:
        clip = size.from_frames(_cut(frames, rng, self.area, self.ratio))
        clip = _mirrored(clip, rng, self.flip)
        for change in rng.sample(list(CHANGES), self.changes):
            clip = CHANGES[change](clip, rng.uniform(-self.strength, self.strength))
        return clip


@dataclass(frozen=True)
class OfficialWhole:
    """The official evaluation's: all of every frame, squashed by its nearest pixels, which flicker."""

    def __call__(self, frames: np.ndarray, size: Preprocessing, rng: Random) -> np.ndarray:
        return nearest(frames, size.height, size.width)


@dataclass(frozen=True)
class OfficialCrop:
    """The official training's: a random part, bicubic without antialiasing, mirrored, then `changes` of the
    nine official changes at level 5, always the same way round; four of them change nothing at that level.

    Where bicubic overshoots, values wrap around to the other end of 0..255, as in the official code. Without
    changes (0: --no_randaug) it kept them beyond 0..255; a clip cannot, so they are clamped.
    """

    area: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    changes: int = 2

    def __call__(self, frames: np.ndarray, size: Preprocessing, rng: Random) -> np.ndarray:
        clip = bicubic(_cut(frames, rng, self.area, self.ratio), size.height, size.width).astype(np.int64)
        clip = (clip if self.changes else clip.clip(0, 255)).astype(np.uint8)
        clip = _mirrored(clip, rng, self.flip)
        for change in rng.choices(list(OFFICIAL_CHANGES), k=self.changes):
            clip = OFFICIAL_CHANGES[change](clip)
        return clip


def crop_box(
    height: int, width: int, rng: Random, area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part, as torchvision's RandomResizedCrop draws it: of ten tries
    the first that fits, else the largest central part of an allowed ratio."""
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h = min(height, round(width / ratio[0]))
    w = min(width, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _cut(
    frames: np.ndarray, rng: Random, area: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    top, left, height, width = crop_box(frames.shape[1], frames.shape[2], rng, area, ratio)
    return frames[:, top : top + height, left : left + width]


def _mirrored(clip: np.ndarray, rng: Random, probability: float) -> np.ndarray:
    return clip[:, :, ::-1] if rng.random() < probability else clip


# ------------------------------------------------------------------------------------------------------------
# Changes after RandAugment (Cubuk et al. 2020, arXiv:1909.13719): a clip -> a changed clip


def rotated(clip: np.ndarray, degrees: float) -> np.ndarray:
    """Turned about its middle, counter-clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = clip.shape[2] / 2, clip.shape[1] / 2
    return affine(clip, np.array([[cos, sin, x - cos * x - sin * y], [-sin, cos, y + sin * x - cos * y]]))


def sheared(clip: np.ndarray, across: float = 0.0, down: float = 0.0) -> np.ndarray:
    """Each row moved right by `across` times its place, each column moved down by `down` times its place."""
    return affine(clip, np.array([[1, across, 0], [down, 1, 0]]))


def moved(clip: np.ndarray, right: float = 0.0, down: float = 0.0) -> np.ndarray:
    """By pixels."""
    return affine(clip, np.array([[1, 0, right], [0, 1, down]]))


def brightened(clip: np.ndarray, factor: float) -> np.ndarray:
    return _blend(np.zeros((), np.float32), clip, factor)


def contrasted(clip: np.ndarray, factor: float) -> np.ndarray:
    """Away from, or towards, the clip's mean level of grey."""
    return _blend(clip.mean(dtype=np.float32), clip, factor)


def sharpened(clip: np.ndarray, factor: float) -> np.ndarray:
    """Away from, or towards, each frame blurred over 3 x 3 pixels."""
    edged = np.pad(clip, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge").astype(np.float32)
    rows = edged[:, :-2] + edged[:, 1:-1] + edged[:, 2:]
    return _blend((rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9, clip, factor)


def _blend(base: np.ndarray, clip: np.ndarray, factor: float) -> np.ndarray:
    """0: `base`; 1: the clip; more: further on."""
    return np.rint(base + np.float32(factor) * (clip - base)).clip(0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "rotate": lambda clip, by: rotated(clip, 15 * by),
    "shear_x": lambda clip, by: sheared(clip, across=0.15 * by),
    "shear_y": lambda clip, by: sheared(clip, down=0.15 * by),
    "translate_x": lambda clip, by: moved(clip, right=0.1 * by * clip.shape[2]),
    "translate_y": lambda clip, by: moved(clip, down=0.1 * by * clip.shape[1]),
    "brightness": lambda clip, by: brightened(clip, 1 + 0.5 * by),
    "contrast": lambda clip, by: contrasted(clip, 1 + 0.5 * by),
    "sharpness": lambda clip, by: sharpened(clip, 1 + 0.9 * by),
}
"""By how much, from -1 to 1."""


def _unchanged(clip: np.ndarray) -> np.ndarray:
    return clip


OFFICIAL_CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": _unchanged,
    "Contrast": _unchanged,  # by a factor of 5 / 10 * 1.8 + 0.1, which is 1
    "Brightness": _unchanged,
    "Sharpness": _unchanged,
    "ShearX": lambda clip: sheared(clip, across=0.15),
    "ShearY": lambda clip: sheared(clip, down=0.15),
    "TranslateX": lambda clip: moved(clip, right=-5),
    "TranslateY": lambda clip: moved(clip, down=-5),
    "Rotate": lambda clip: rotated(clip, 15),
}
"""At level 5, the only one that the official recipes use."""
