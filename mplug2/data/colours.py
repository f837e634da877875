"""Colours: a Pillow picture of any mode -> RGB of 8 bits.

Transparent pictures lie on GROUND. Brightness of more than 8 bits is scaled, never clipped: 16-bit gray by
its type, 0..65535; 32-bit whole numbers and floats, whose type states no white, by their values (`_white`).
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

GROUND = (255, 255, 255)
"""What shows through where a picture or a frame of a video is transparent: white, as on a page."""


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode, with any kind of transparency -> RGB on GROUND. Raises ValueError for a mode
    that Pillow cannot convert."""
    if image.mode.startswith("I;16"):
        return _deep(image)
    if image.mode in ("I", "F"):
        return _scaled(np.asarray(image)).convert("RGB")
    if image.mode == "La":  # premultiplied; it converts to nothing else
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, GROUND)
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def on_ground(frame: np.ndarray) -> np.ndarray:
    """Pixels uint8 H W 4, RGBA -> uint8 H W 3 on GROUND."""
    return np.asarray(to_rgb(Image.fromarray(frame)))


def _deep(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    key = image.info.get("transparency")
    grey = _of_bands(levels, lambda band: (band.astype(np.uint32) * 255 + 32767) // 65535).convert("RGB")
    if isinstance(key, int):  # the level of transparent pixels
        grey.paste(GROUND, mask=_of_bands(levels, lambda band: (band == key) * 255))
    return grey


def _scaled(levels: np.ndarray) -> Image.Image:
    """Levels int32 or float32 H W -> gray. NaN is black."""
    black = largest = 0.0
    for band in _bands(levels):
        finite = band[np.isfinite(band)]
        black, largest = float(finite.min(initial=black)), float(finite.max(initial=largest))
    white = _white(largest, levels.dtype.kind == "i")

    def shade(band: np.ndarray) -> np.ndarray:
        shares = np.nan_to_num((band - np.float64(black)) / (white - black), nan=0, posinf=1, neginf=0)
        return np.rint(shares.clip(0, 1) * 255)

    return _of_bands(levels, shade)


def _bands(levels: np.ndarray) -> list[np.ndarray]:
    """Levels H W -> some rows of them at a time: what is computed of all of a large picture takes room."""
    rows = max(1, 2**20 // max(1, levels.shape[1]))
    return [levels[start : start + rows] for start in range(0, len(levels), rows)]


def _of_bands(levels: np.ndarray, shade: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    return Image.fromarray(np.concatenate([shade(band).astype(np.uint8) for band in _bands(levels)]))


def _white(largest: float, whole: bool) -> float:
    """The level that is white. Floats up to 1 are shares, and whole numbers up to 255 are of 8 bits. Else
    the largest level is white, or 255 or 65535 if it lies in the upper half below one of these: a picture
    that no pixel of which is quite white stays as it was."""
    low = 255 if whole else 1
    if largest <= low:
        return low
    return next((white for white in (255, 65535) if white / 2 < largest <= white), largest)
