"""Resampling of frames uint8 T H W C that Pillow does not do: nearest and bicubic as PyTorch's `interpolate`
has them, and affine maps as OpenCV's `warpAffine` has them.

Needed where weights were trained on exactly that; resizing in `Preprocessing` is the zoo's own.
"""

import numpy as np

GREY = 128
"""What lies beyond the border of a frame."""

_CUBIC = np.float32(-0.75)  # PyTorch's and OpenCV's; Pillow's is -0.5


def nearest(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """`interpolate(mode="nearest")`: uint8 T height width C; a pixel is the one at or before its place."""

    def places(inputs: int, outputs: int) -> np.ndarray:
        return (np.arange(outputs, dtype=np.float32) * np.float32(inputs / outputs)).astype(np.int64)

    rows, columns = places(frames.shape[1], height), places(frames.shape[2], width)
    return frames[:, rows][:, :, columns]


def bicubic(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """`interpolate(mode="bicubic")`, without antialiasing: float32 T height width C, which overshoots 0..255
    at edges."""
    rows, down = _taps(frames.shape[1], height)
    columns, across = _taps(frames.shape[2], width)
    wide = (frames.astype(np.float32)[:, :, columns] * across[:, :, None]).sum(3)
    return (wide[:, rows] * down[:, :, None, None]).sum(2)


def _taps(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The four inputs of each output, int64 (outputs, 4), and their weights, float32 (outputs, 4)."""
    place = (np.arange(outputs, dtype=np.float32) + np.float32(0.5)) * np.float32(inputs / outputs)
    place -= np.float32(0.5)
    first = np.floor(place)
    past = place - first

    def near(x: np.ndarray) -> np.ndarray:
        return ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((_CUBIC * x - 5 * _CUBIC) * x + 8 * _CUBIC) * x - 4 * _CUBIC

    weights = np.stack([far(past + 1), near(past), near(1 - past), far(2 - past)], 1)
    taps = first.astype(np.int64)[:, None] + np.arange(-1, 3)
    return np.clip(taps, 0, inputs - 1), weights


def affine(frames: np.ndarray, forward: np.ndarray) -> np.ndarray:
    """`warpAffine` with a grey border: the pixel at (x, y) goes to `forward @ (x, y, 1)`, forward 2 x 3;
    bilinear."""
    _, height, width, _ = frames.shape
    back = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
    y, x = np.mgrid[:height, :width]
    # Two grey pixels around: what falls beyond is drawn up to there.
    bordered = np.pad(frames, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=GREY).astype(np.float32)
    across = np.clip(back[0, 0] * x + back[0, 1] * y + back[0, 2] + 2, 0, width + 2.999)
    down = np.clip(back[1, 0] * x + back[1, 1] * y + back[1, 2] + 2, 0, height + 2.999)
    left, top = across.astype(np.int64), down.astype(np.int64)
    right_share = (across - left).astype(np.float32)[..., None]
    low_share = (down - top).astype(np.float32)[..., None]

    def row(at: np.ndarray) -> np.ndarray:
        return bordered[:, at, left] * (1 - right_share) + bordered[:, at, left + 1] * right_share

    return np.rint(row(top) * (1 - low_share) + row(top + 1) * low_share).astype(np.uint8)
