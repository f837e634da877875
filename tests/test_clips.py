"""Readers of videos and pictures, and what they refuse."""

import json
from pathlib import Path
from random import Random

import av
import jax
import numpy as np
import pytest
from filming import write_video
from PIL import Image

from mplug2.data.clips import frame_indices, read_video
from mplug2.data.pixels import Preprocessing, read_image
from mplug2.errors import DataError

RECORDED = json.loads((Path(__file__).parent / "golden" / "aux" / "aux.json").read_text())


@pytest.mark.parametrize(
    "total, frames, uniform, middle",
    [
        (16, 4, [2, 6, 10, 14], [1, 5, 9, 13]),
        (17, 4, [2, 6, 10, 14], [1, 5, 9, 14]),
        (5, 3, [0, 2, 4], [0, 1, 3]),
        (4, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        (2, 4, [0, 0, 1, 1], [0, 1, 1, 1]),
        (1, 3, [0, 0, 0], [0, 0, 0]),
    ],
)
def test_each_interval_gives_its_centre_frame(total, frames, uniform, middle):
    assert frame_indices(total, frames).tolist() == uniform
    assert frame_indices(total, frames, "middle").tolist() == middle


@pytest.mark.parametrize("frames, total, expected", RECORDED["frames_middle"])
def test_middle_frames_are_the_recorded_ones_of_the_official_code(frames, total, expected):
    assert frame_indices(total, frames, "middle").tolist() == expected


class OfficialGenerators(Random):
    """The official code's two: Python's for an interval, NumPy's for a whole clip, seeded alike."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.whole = np.random.RandomState(seed)

    def sample(self, population, k, *, counts=None):
        return [population[place] for place in self.whole.permutation(len(population))[:k].tolist()]


@pytest.mark.parametrize("frames, total, seed, expected", RECORDED["frames_rand"])
def test_random_frames_are_the_recorded_ones_of_the_official_code(frames, total, seed, expected):
    assert frame_indices(total, frames, "official_random", OfficialGenerators(seed)).tolist() == expected


@pytest.mark.parametrize("total, frames", [(100, 16), (17, 4), (5, 5), (3, 8), (1, 4)])
def test_random_frames_are_one_of_each_interval_and_all_of_them_equally_often(total, frames):
    rng, rounds = Random(0), 4000
    drawn = np.stack([frame_indices(total, frames, "random", rng) for _ in range(rounds)])
    assert drawn.dtype == np.int64 and (np.diff(drawn) >= 0).all()
    low = np.arange(frames) * total // frames
    high = -(-np.arange(1, frames + 1) * total // frames) - 1
    assert (drawn >= low).all() and (drawn <= high).all()
    share = np.bincount(drawn.ravel(), minlength=total) / drawn.size
    np.testing.assert_allclose(share * total, 1, atol=0.25)


def test_official_random_never_takes_the_last_frame_of_an_interval_and_random_does():
    drawn = {how: set() for how in ("random", "official_random")}
    for how, seen in drawn.items():
        rng = Random(0)
        for _ in range(300):
            seen |= set(frame_indices(16, 4, how, rng).tolist())
    assert drawn["random"] == set(range(16))
    assert drawn["official_random"] == set(range(16)) - {3, 7, 11, 15}


def test_a_random_sampling_without_a_generator_is_refused():
    for how in ("random", "official_random"):
        with pytest.raises(DataError, match=f'"{how}" draws frames and needs a random generator'):
            frame_indices(4, 2, how)


def test_an_unknown_sampling_names_the_nearest():
    with pytest.raises(DataError, match='unknown frame sampling "midle".*did you mean "middle"'):
        frame_indices(4, 2, "midle")


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.webm", "libvpx")])
def test_frames_of_a_video_are_the_ones_asked_for(tmp_path: Path, name, codec):
    grey = list(range(10, 250, 15))
    write_video(tmp_path / name, grey, codec)
    clip = read_video(tmp_path / name, 4)
    assert clip.shape == (4, 32, 48, 3) and clip.dtype == np.uint8
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [grey[i] for i in (2, 6, 10, 14)], atol=4)


def test_an_animated_gif_is_a_video(tmp_path: Path):
    frames = [Image.new("RGB", (20, 10), (level, 0, 0)) for level in (10, 90, 170, 250)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    clip = read_video(tmp_path / "a.gif", 2)
    assert clip.shape == (2, 10, 20, 3)
    np.testing.assert_allclose(clip[:, 0, 0, 0], [90, 250], atol=3)


def test_random_frames_of_a_video_are_those_that_the_generator_draws(tmp_path: Path):
    grey = list(range(10, 250, 15))
    write_video(tmp_path / "a.mp4", grey)
    clip = read_video(tmp_path / "a.mp4", 4, "random", Random(3))
    drawn = frame_indices(len(grey), 4, "random", Random(3)).tolist()
    assert drawn != frame_indices(len(grey), 4).tolist()
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [grey[i] for i in drawn], atol=4)


def test_a_video_shorter_than_the_frames_asked_for_repeats_them(tmp_path: Path):
    write_video(tmp_path / "a.mp4", [50, 200])
    np.testing.assert_allclose(read_video(tmp_path / "a.mp4", 4).mean((1, 2, 3)), [50, 50, 200, 200], atol=4)


def test_a_video_filmed_on_its_side_is_shown_upright(tmp_path: Path):
    write_video(tmp_path / "a.mp4", [100] * 3)
    identity = np.array([65536, 0, 0, 0, 65536, 0, 0, 0, 2**30], ">i4").tobytes()
    turned = np.array([0, 65536, 0, -65536, 0, 0, 32 * 65536, 0, 2**30], ">i4").tobytes()
    data = (tmp_path / "a.mp4").read_bytes()
    head, tail = data.split(b"tkhd", 1)  # the track's display matrix, not the movie's
    (tmp_path / "a.mp4").write_bytes(head + b"tkhd" + tail.replace(identity, turned, 1))
    assert read_video(tmp_path / "a.mp4", 1).shape == (1, 48, 32, 3)


def test_a_video_that_breaks_off_gives_the_frames_it_has_or_one_sentence(tmp_path: Path):
    write_video(tmp_path / "a.avi", list(range(10, 250, 6)), "mpeg4", (320, 240))
    data = (tmp_path / "a.avi").read_bytes()
    for share in (0.9, 0.5, 0.1, 0.01):
        (tmp_path / "b.avi").write_bytes(data[: int(len(data) * share)])
        try:
            assert read_video(tmp_path / "b.avi", 3).shape == (3, 240, 320, 3)
        except DataError as error:
            assert "b.avi" in str(error)


def test_broken_missing_and_empty_videos_are_refused_by_name(tmp_path: Path):
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "nothing.mp4").write_bytes(b"")
    with av.open(str(tmp_path / "frameless.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    for name in ("noise.mp4", "nothing.mp4", "absent.mp4", "frameless.avi"):
        with pytest.raises(DataError, match=name):
            read_video(tmp_path / name, 2)


def test_sound_alone_is_no_video(tmp_path: Path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="a.wav holds no video"):
        read_video(tmp_path / "a.wav", 2)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_a_picture_of_any_mode_becomes_a_one_frame_clip(tmp_path: Path, mode):
    name = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (40, 20)).save(name)
    clip = Preprocessing(height=16, width=24).from_pil(read_image(name))
    assert clip.shape == (1, 16, 24, 3) and clip.dtype == np.uint8


def test_a_picture_of_the_right_size_passes_unchanged():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(Preprocessing().from_pil(Image.fromarray(pixels))[0], pixels)


def test_resizing_is_antialiased():
    """A one-pixel checkerboard shrinks to grey, not to black or white."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    clip = Preprocessing().from_pil(Image.fromarray(np.stack([board.astype(np.uint8)] * 3, -1)))
    assert clip.min() > 110 and clip.max() < 145


def test_frames_are_resized_like_pictures():
    frames = np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), np.uint8)
    clip = Preprocessing().from_frames(frames)
    assert clip.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(clip[1:2], Preprocessing().from_pil(Image.fromarray(frames[1])))


def test_pixels_are_normalised_inside_jit():
    prepare = Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    clips = np.array([[[[[0, 0, 0], [255, 255, 255]]]]], np.uint8)
    floats = jax.jit(prepare.to_float)(clips)
    np.testing.assert_allclose(floats[0, 0, 0], [[-1, -1, 0], [1, 3, 1]], atol=1e-6)
    assert floats.dtype == np.float32


def test_a_photo_taken_on_its_side_is_shown_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (20, 40)


def test_broken_missing_and_huge_pictures_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "header.png").write_bytes(data[:20])
    for name in ("cut.png", "text.png", "header.png", "absent.png"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
    Image.fromarray(noise).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    with pytest.raises(DataError, match="huge.png has too many pixels"):
        read_image(tmp_path / "huge.png")
