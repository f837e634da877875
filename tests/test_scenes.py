"""Glyph splits and composed scenes."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest

from mplug2.data import glyphs, scenes
from mplug2.errors import DataError


def shown(digit: scenes.Digit) -> list[scenes.Spot]:
    return [spot for spot in digit.path if spot is not None]


def test_splits_share_no_glyph_and_cover_all():
    rows = {split: set(glyphs.split_rows(split).tolist()) for split in glyphs.SPLITS}
    assert {split: len(found) for split, found in rows.items()} == glyphs.SPLITS
    assert set.union(*rows.values()) == set(range(1797))


def test_splits_are_stratified_by_digit():
    for split, size in glyphs.SPLITS.items():
        counts = [len(rows) for rows in glyphs.bank(split, 8).by_kind]
        assert sum(counts) == size
        assert max(counts) - min(counts) <= 0.2 * size / 10


def test_unaugmented_glyphs_are_the_scans_themselves():
    images = glyphs._digits()[0]
    bank = glyphs.bank("test", 8)
    np.testing.assert_array_equal(bank.masks[:, 0], np.rint(images[bank.scans] * 255))


def test_train_variants_differ_from_the_scan_but_stay_close():
    masks = glyphs.bank("train", 12).masks.astype(float)
    assert masks.shape[:2] == (1347, 24)
    flat = masks.reshape(1347, 24, -1)
    scan, others = flat[:, :1], flat[:, 1:]
    alike = (scan * others).sum(-1) / (np.linalg.norm(scan, axis=-1) * np.linalg.norm(others, axis=-1))
    assert 0.8 < alike.mean() < 0.98


def test_an_unknown_split_names_the_nearest():
    with pytest.raises(DataError, match='unknown split "tset".*did you mean "test"'):
        glyphs.split_rows("tset")


@pytest.mark.parametrize("canvas", [32, 40, 48])
@pytest.mark.parametrize("frames", [1, 2, 4, 5])
def test_every_digit_lies_on_the_canvas_and_kinds_and_colours_are_distinct(frames, canvas):
    rng = Random(0)
    for _ in range(500):
        scene = scenes.compose(rng, "test", frames, canvas)
        assert scene.frames == frames
        assert len({digit.kind for digit in scene.digits}) == len(scene.digits)
        assert len({digit.colour for digit in scene.digits}) == len(scene.digits)
        for digit in scene.digits:
            limit = canvas - scenes.pixels(digit.size, canvas)
            assert all(0 <= row <= limit and 0 <= column <= limit for row, column in shown(digit))
        assert scene.boxes().min() >= 0 and scene.boxes().max() <= 1


def test_relations_exclude_one_another():
    rng = Random(1)
    for _ in range(1000):
        scene = scenes.compose(rng, "train", layout=rng.choice(("row", "column")))
        axis = 1 if scene.layout == "row" else 0
        sides = [scenes.pixels(digit.size, 32) for digit in scene.digits]
        spots = [shown(digit)[0] for digit in scene.digits]
        ends = [spot[axis] + side for spot, side in zip(spots, sides, strict=True)]
        assert all(end < after[axis] for end, after in zip(ends, spots[1:], strict=False))
        centres = [spot[1 - axis] + side / 2 for spot, side in zip(spots, sides, strict=True)]
        assert max(centres) - min(centres) <= 2


def test_a_digit_alone_stands_clear_of_the_centre_lines():
    rng = Random(2)
    for _ in range(400):
        scene = scenes.compose(rng, "train", count=1)
        top, left, bottom, right = scene.boxes()[0, 0] * 32
        assert bottom <= 15 if scene.where.startswith("top") else top >= 17
        assert right <= 15 if scene.where.endswith("left") else left >= 17


@pytest.mark.parametrize("frames", [2, 3, 4, 7])
@pytest.mark.parametrize(
    "there, back", [("left", "right"), ("up", "down"), ("appear", "vanish"), ("order", "order")]
)
def test_an_event_and_its_opposite_show_the_same_frames(frames, there, back):
    """Reversed in time, scenes of one kind have the distribution of the other, down to every path."""

    def paths(name: str, reverse: bool) -> Counter:
        layout, where = ("motion", name) if name in scenes.DIRECTIONS else (name, None)
        found = Counter()
        for seed in range(300):
            scene = scenes.compose(
                Random(seed), "train", frames, layout=layout, where=where, kinds=None if where else (3, 5)
            )
            digits = [digit.path[::-1] if reverse else digit.path for digit in scene.digits]
            found[frozenset(digits) if name == "order" else tuple(digits)] += 1
        return found

    if there != "order":  # a draw of one event, played backwards, is the same draw of the other
        assert paths(there, reverse=True) == paths(back, reverse=False)
    else:  # first and second change places: their spots are drawn alike
        spots = [scenes.compose(Random(seed), "train", frames, layout="order").digits for seed in range(3000)]
        means = [np.mean([shown(pair[place])[0] for pair in spots], axis=0) for place in range(2)]
        np.testing.assert_allclose(means[0], means[1], atol=0.7)
        assert all(len(shown(one)) == len(shown(other)) == frames // 2 for one, other in spots)


def test_a_moving_digit_crosses_at_least_half_of_its_free_length():
    rng = Random(4)
    for _ in range(200):
        (digit,) = scenes.compose(rng, "train", 4, layout="motion").digits
        path = np.array(digit.path)
        assert np.abs(path[-1] - path[0]).max() >= (32 - scenes.pixels(digit.size, 32)) / 2
        steps = np.diff(path, axis=0)
        assert (steps >= 0).all() or (steps <= 0).all()


def test_rendering_shows_ink_in_the_boxes_and_only_noise_elsewhere():
    rng = Random(5)
    for frames in (1, 4):
        for _ in range(50):
            scene = scenes.compose(rng, "test", frames)
            clip = scenes.render(scene)
            assert clip.shape == (frames, 32, 32, 3) and clip.dtype == np.uint8
            blank = np.ones(clip.shape[:3], bool)
            for boxes in (scene.boxes() * 32).astype(int):
                for frame, (top, left, bottom, right) in enumerate(boxes):
                    blank[frame, top:bottom, left:right] = False
                    if bottom:
                        assert clip[frame, top:bottom, left:right].max() > 120
            assert clip[blank].max() < 64


def test_the_same_draw_renders_the_same_pixels():
    first, second = (scenes.render(scenes.compose(Random(7), "train", 4)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("frames, canvas", [(0, 32), (1, 20), (1, 33)])
def test_sizes_that_cannot_be_composed_are_refused(frames, canvas):
    with pytest.raises(DataError, match="a scene needs frames"):
        scenes.compose(Random(0), "train", frames, canvas)


@pytest.mark.parametrize("frames, canvas", [(2, 32), (4, 32), (3, 64)])
def test_the_noise_of_a_video_tells_nothing_of_the_order_of_its_frames(frames, canvas):
    """Each frame's place in the table of noise, found again by its first values: any order of them is as
    likely as any other, and none lies beside the one before it."""
    table, size = scenes._noise(), canvas * canvas * 3
    windows = np.lib.stride_tricks.sliding_window_view(table[: scenes._NOISE_STARTS + 8], 8).copy()
    place = {window.tobytes(): start for start, window in enumerate(windows)}
    orders, distances = Counter(), []
    for noise in range(0, scenes._NOISE_STARTS, 1009):
        clip = scenes._background(noise, (frames, canvas, canvas, 3)) - np.uint8(noise % 29)
        starts = [place[frame.reshape(-1)[:8].tobytes()] for frame in clip]
        orders[tuple(np.argsort(starts))] += 1
        distances += np.diff(starts).tolist()
    clips, kinds = orders.total(), math.factorial(frames)
    assert len(orders) == kinds
    chi_squared = sum((count - clips / kinds) ** 2 for count in orders.values()) / (clips / kinds)
    assert chi_squared < kinds - 1 + 4 * math.sqrt(2 * (kinds - 1))  # four standard deviations
    assert size not in distances and np.abs(np.mean(np.sign(distances))) < 4 / math.sqrt(clips)
