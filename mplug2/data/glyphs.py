"""Handwritten digits as ink masks: the 1,797 scans of scikit-learn's `load_digits` (8x8, UCI), split by
glyph.

`bank(split, pixels)` -> masks uint8 (glyphs, variants, pixels, pixels), 0 = paper and 255 = full ink. The
splits share no glyph: train 1347, validation 150, test 300, stratified by digit under one fixed permutation.
Train glyphs come in up to 24 precomputed variants (small rotation, shear, stretch, shift and stroke gain;
variant 0 is the scan itself), so that composing a scene costs one look-up; validation and test glyphs are the
scans as written.
"""

import functools
from dataclasses import dataclass

import numpy as np

from mplug2.errors import DataError, nearest

SPLITS = {"train": 1347, "validation": 150, "test": 300}
VARIANTS = 24
_BANK_BYTES = 64 << 20  # large canvases get fewer variants, so that a bank stays small and quick to build


@dataclass(frozen=True)
class Bank:
    """The glyphs of one split at one size: `masks` uint8 (N, variants, P, P), `by_kind[k]` = rows of digit k,
    `scans[n]` = the row of glyph n in `load_digits`."""

    masks: np.ndarray
    by_kind: tuple[tuple[int, ...], ...]
    scans: np.ndarray

    @property
    def variants(self) -> int:
        return self.masks.shape[1]


def check_split(split: str) -> str:
    """`split` itself, or a DataError with the nearest name."""
    if split not in SPLITS:
        raise DataError(
            f'unknown split "{split}"; handwriting has {", ".join(SPLITS)}{nearest(split, SPLITS)}'
        )
    return split


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All scans as ink in 0..1, float32 (1797, 8, 8), and the digit of each, int64 (1797,)."""
    from sklearn.datasets import load_digits  # a second of imports that only a reader of handwriting pays

    ink, kinds = load_digits(return_X_y=True)
    return (np.asarray(ink) / 16).astype(np.float32).reshape(-1, 8, 8), np.asarray(kinds)


@functools.cache
def split_rows(split: str) -> np.ndarray:
    """Rows of `load_digits` that belong to `split`, sorted; a glyph is in exactly one split."""
    check_split(split)
    kinds = _digits()[1]
    rng = np.random.default_rng(1797)
    # Each digit's shuffled glyphs are spread evenly over (0, 1): cutting the merged order stratifies them
    # to within a glyph.
    spread = np.empty(len(kinds))
    for kind in range(10):
        rows = rng.permutation(np.flatnonzero(kinds == kind))
        spread[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    cuts = np.cumsum(list(SPLITS.values()))[:-1]
    parts = dict(zip(SPLITS, np.split(np.argsort(spread, kind="stable"), cuts), strict=True))
    return np.sort(parts[split])


@functools.cache
def bank(split: str, pixels: int) -> Bank:
    """The bank of `split` with glyphs drawn `pixels` high and wide; built once per process."""
    rows = split_rows(split)
    images, kinds = _digits()
    variants = max(1, min(VARIANTS, _BANK_BYTES // (len(rows) * pixels * pixels))) if split == "train" else 1
    masks = np.empty((len(rows), variants, pixels, pixels), np.uint8)
    for variant in range(variants):
        rng = np.random.default_rng((1797, pixels, variant))
        masks[:, variant] = _draw(images[rows], pixels, rng if variant else None)
    by_kind = tuple(tuple(np.flatnonzero(kinds[rows] == kind).tolist()) for kind in range(10))
    return Bank(masks, by_kind, rows)


def _draw(scans: np.ndarray, pixels: int, rng: np.random.Generator | None) -> np.ndarray:
    """Scans float32 (N, 8, 8) -> masks uint8 (N, P, P), bilinear; with `rng` each under an affine map of its
    own."""
    count = len(scans)
    maps, shift, gain = np.broadcast_to(np.eye(2), (count, 2, 2)), np.zeros((count, 2)), np.ones(count)
    if rng is not None:
        angle = np.deg2rad(rng.uniform(-12, 12, count))
        shear, gain = rng.uniform(-0.15, 0.15, count), rng.uniform(0.85, 1.3, count)
        # Scans fill their paper: enlarging or shifting them further would cut strokes off.
        stretch, shift = rng.uniform(0.99, 1.2, (count, 2)), rng.uniform(-0.3, 0.3, (count, 2))
        turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(
            count, 2, 2
        )
        lean = np.stack([np.ones(count), np.zeros(count), shear, np.ones(count)], -1).reshape(count, 2, 2)
        maps = (turn @ lean) * stretch[:, None, :]
    # Inverse mapping: where on the 8x8 paper (with a border of 2 blank pixels) does each mask pixel look?
    line = (np.arange(pixels) + 0.5) * 8 / pixels - 4
    grid = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    spots = np.einsum("nij,pj->npi", maps, grid) + shift[:, None] + 4 - 0.5 + 2
    spots = np.clip(spots, 0, 10.999)
    corner = spots.astype(np.int64)
    (v, u), (y, x) = np.moveaxis(spots - corner, -1, 0), np.moveaxis(corner, -1, 0)
    paper = np.pad(scans, ((0, 0), (2, 2), (2, 2))).reshape(count, 144)
    flat = y * 12 + x

    def ink(offset: int) -> np.ndarray:
        return np.take_along_axis(paper, flat + offset, axis=1)

    top, bottom = ink(0) * (1 - u) + ink(1) * u, ink(12) * (1 - u) + ink(13) * u
    drawn = (top * (1 - v) + bottom * v) * gain[:, None]
    return np.rint(np.clip(drawn, 0, 1) * 255).astype(np.uint8).reshape(count, pixels, pixels)
