"""Views of clips: the official code's as recorded, and ours, which change all frames alike."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mplug2.data.augment import (
    CHANGES,
    OFFICIAL_CHANGES,
    OfficialCrop,
    OfficialWhole,
    RandomCrop,
    Whole,
    crop_box,
)
from mplug2.data.pixels import CLIP_MEAN, CLIP_STD, Preprocessing
from mplug2.data.resample import affine, bicubic, nearest
from mplug2.errors import DataError

RECORDED = load_file(Path(__file__).parent / "golden" / "aux" / "aux_tensors.safetensors")
CLIP = RECORDED["tf.clip_uint8"]
TOP, LEFT, HEIGHT, WIDTH = map(int, RECORDED["tf.crop_ijhw"])
CUT = CLIP[:, TOP : TOP + HEIGHT, LEFT : LEFT + WIDTH]
SIZE = Preprocessing(height=32, width=32, mean=CLIP_MEAN, std=CLIP_STD)
WHOLE: dict[str, Any] = {"area": (1.0, 1.0), "ratio": (WIDTH / HEIGHT, WIDTH / HEIGHT), "flip": 0.0}


# --- the official code's


def test_the_official_evaluation_sees_the_recorded_pixels():
    clip = OfficialWhole()(CLIP, SIZE, Random(0))
    np.testing.assert_array_equal(clip, RECORDED["tf.test.resized"])
    normalised = jax.jit(SIZE.to_float)(clip[None])[0]
    np.testing.assert_allclose(normalised.transpose(3, 0, 1, 2), RECORDED["tf.test.final"], atol=1e-5)


def test_crops_are_resized_to_the_recorded_pixels():
    np.testing.assert_array_equal(nearest(CUT, 32, 32), RECORDED["tf.resized_crop.nearest"])
    np.testing.assert_array_equal(np.trunc(bicubic(CUT, 32, 32)), RECORDED["tf.resized_crop.bicubic"])


def test_the_official_crop_wraps_around_as_recorded_and_is_clamped_without_changes():
    wrapped = RECORDED["tf.resized_crop.bicubic.after_uint8_cast"]
    view = OfficialCrop(**WHOLE, changes=1)
    seen = {view(CUT, SIZE, Random(seed)).tobytes() for seed in range(30)}
    assert wrapped.tobytes() in seen
    clamped = RECORDED["tf.resized_crop.bicubic"].clip(0, 255)
    np.testing.assert_array_equal(OfficialCrop(**WHOLE, changes=0)(CUT, SIZE, Random(0)), clamped)


@pytest.mark.parametrize("name", OFFICIAL_CHANGES)
def test_official_changes_are_the_recorded_ones(name):
    """Within one level of grey, of a fiftieth of the pixels: halves are rounded to one side or the other."""
    clip = RECORDED["tf.aug_M5.Identity"]
    apart = np.abs(OFFICIAL_CHANGES[name](clip).astype(int) - RECORDED[f"tf.aug_M5.{name}"])
    assert apart.max() <= 1 and (apart > 0).mean() < 0.02


def test_the_official_crop_draws_from_all_nine_changes():
    assert len(OFFICIAL_CHANGES) == 9
    view = OfficialCrop(**WHOLE, changes=1)
    seen = {view(CUT, SIZE, Random(seed)).tobytes() for seed in range(200)}
    assert len(seen) == 6  # four of the nine look alike


# --- ours


@pytest.mark.parametrize("view", [Whole(), RandomCrop(), OfficialWhole(), OfficialCrop()])
def test_every_view_has_the_size_asked_for_and_is_the_same_for_the_same_draw(view):
    size = Preprocessing(height=20, width=36)
    clip = view(CLIP, size, Random(3))
    assert clip.shape == (3, 20, 36, 3) and clip.dtype == np.uint8
    np.testing.assert_array_equal(clip, view(CLIP, size, Random(3)))


@pytest.mark.parametrize("view", [RandomCrop(), OfficialCrop()])
def test_all_frames_of_a_clip_are_cut_and_changed_alike(view):
    still = np.repeat(CLIP[:1], 4, 0)
    seen = set()
    for seed in range(12):
        clip = view(still, SIZE, Random(seed))
        assert (clip == clip[:1]).all()
        seen.add(clip.tobytes())
    assert len(seen) == 12


def test_a_crop_without_changes_is_the_part_resized_as_in_evaluation():
    plain = RandomCrop(**WHOLE, changes=0)
    np.testing.assert_array_equal(plain(CUT, SIZE, Random(0)), SIZE.from_frames(CUT))
    mirrored = replace(plain, flip=1.0)
    np.testing.assert_array_equal(mirrored(CUT, SIZE, Random(0)), SIZE.from_frames(CUT)[:, :, ::-1])


def test_more_changes_than_there_are_are_refused():
    with pytest.raises(DataError, match="9 changes to a clip; there are 8"):
        RandomCrop(changes=9)


@pytest.mark.parametrize("height, width", [(240, 320), (320, 240), (45, 61), (10, 400), (400, 10), (1, 1)])
def test_parts_have_the_area_and_ratio_asked_for_or_are_the_largest_central_one(height, width):
    area, ratio = (0.5, 1.0), (3 / 4, 4 / 3)
    for seed in range(300):
        top, left, h, w = crop_box(height, width, Random(seed), area, ratio)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        if min(height, width) > 40:
            assert 0.5 * 0.95 <= h * w / (height * width) <= 1
            assert 3 / 4 * 0.95 <= w / h <= 4 / 3 * 1.05
    if (height, width) == (10, 400):
        assert (top, left, h, w) == (0, 193, 10, 13)
    if (height, width) == (400, 10):
        assert (top, left, h, w) == (193, 0, 13, 10)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_nothing_changes_nothing_and_both_ways_differ(name):
    clip = RECORDED["tf.aug_M5.Identity"]
    np.testing.assert_array_equal(CHANGES[name](clip, 0.0), clip)
    one, other = CHANGES[name](clip, 1.0), CHANGES[name](clip, -1.0)
    assert (one != clip).any() and (other != clip).any() and (one != other).any()


def test_brightness_contrast_and_sharpness_are_blends_computed_by_hand():
    clip = np.zeros((1, 3, 3, 3), np.uint8)
    clip[0, 1, 1] = 90
    assert CHANGES["brightness"](clip, 1.0)[0, 1, 1, 0] == 135
    assert CHANGES["contrast"](clip, -1.0)[0, :, :, 0].tolist() == [[5] * 3, [5, 50, 5], [5] * 3]  # mean 10
    assert CHANGES["sharpness"](clip, -1.0)[0, :, :, 0].tolist() == [[9] * 3, [9, 18, 9], [9] * 3]
    clip[0, 1, 1] = 250
    assert CHANGES["brightness"](clip, 1.0)[0, 1, 1, 0] == 255  # clamped, not wrapped


def test_a_moved_clip_has_grey_where_nothing_was():
    clip = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    moved = affine(clip, np.array([[1, 0, 2], [0, 1, 0]]))
    np.testing.assert_array_equal(moved[:, :, 2:], clip[:, :, :3])
    assert (moved[:, :, :2] == 128).all()
