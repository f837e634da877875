"""Clips: a few frames of a video file -> uint8 T H W C, by PyAV; containers as in `containers.CONTAINERS`,
and any codec of FFmpeg."""

from pathlib import Path
from random import Random

import numpy as np
from av.video.frame import VideoFrame

from mplug2.data.colours import on_ground
from mplug2.data.containers import opened_video
from mplug2.data.extent import ENOUGH, Extent, judge, measure, packets
from mplug2.data.orientation import orientation_of
from mplug2.errors import DataError, nearest

SAMPLING = ("uniform", "random", "middle", "official_random")

PIXELS = 2**28
"""The most that the frames of a clip have together, at a video's own size: 0.8 GB."""


def frame_indices(total: int, frames: int, how: str = "uniform", rng: Random | None = None) -> np.ndarray:
    """Which `frames` of `total` to show, int64, sorted: one frame of each of `frames` equal intervals.

    "uniform" takes the centre of each and "random" any of its frames, all frames of a video equally likely;
    they cut at exact fractions, and a video shorter than `frames` repeats frames evenly. "middle" and
    "official_random" are the official mPLUG-2 code's, of evaluation and of training: they cut at whole
    frames, a shorter video repeats its last frame, and "official_random" never takes the last frame of an
    interval; where that leaves an interval none, the whole clip is a random set of frames.

    `rng` draws the random ones. Raises DataError on another `how`, on nothing to pick or to pick from, and on
    a random one without `rng`.
    """
    if how not in SAMPLING:
        raise DataError(
            f'unknown frame sampling "{how}"; known are {", ".join(SAMPLING)}{nearest(how, SAMPLING)}'
        )
    if total < 1 or frames < 1:
        raise DataError(f"cannot pick {frames} frame(s) of a video of {total}; both must be at least 1")
    if how == "uniform":
        return (2 * np.arange(frames) + 1) * total // (2 * frames)
    if how == "middle":
        starts, ends = _official_intervals(total, frames)
        return _official_length((starts + ends) // 2, frames)
    if rng is None:
        raise DataError(f'frame sampling "{how}" draws frames and needs a random generator')
    if how == "random":
        # Exact, in 32nd powers of two: a float could round up to `total`.
        places = (place << 32 | rng.getrandbits(32) for place in range(frames))
        return np.array([place * total // (frames << 32) for place in places], np.int64)
    starts, ends = _official_intervals(total, frames)
    if (starts < ends).all():
        chosen = [rng.choice(range(start, end)) for start, end in zip(starts, ends, strict=True)]
    else:
        chosen = sorted(rng.sample(range(total), len(starts)))
    return _official_length(np.array(chosen, np.int64), frames)


def _official_intervals(total: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last frame of each interval; no more intervals than frames of the video."""
    cuts = np.linspace(0, total, min(frames, total) + 1).astype(np.int64)
    return cuts[:-1], cuts[1:] - 1


def _official_length(chosen: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(chosen, (0, frames - len(chosen)), mode="edge")


def read_video(path: str | Path, frames: int, how: str = "uniform", rng: Random | None = None) -> np.ndarray:
    """`frames` frames of a video file at its own size, upright, uint8 T H W C, RGB; `how` and `rng` as in
    `frame_indices`.

    Frames are as stored: a sample aspect ratio is not heeded, as clips are squashed anyway. Where they change
    their size midway, all have the first one's. Transparent ones lie on `colours.GROUND`. Raises DataError
    naming the file if it is missing, holds no video, no frame, breaks off (`extent.judge`), has more than
    PIXELS pixels in the frames asked for, or cannot be decoded; warns where little is missing.
    """
    there = _judged(path)
    total = there.frames
    while total:
        clip, decoded, span = _decode(path, frame_indices(total, frames, how, rng).tolist(), total)
        if decoded == total:
            return clip
        if span < ENOUGH * there.span:  # fewer frames than packets alone say nothing: some are not shown
            raise DataError(
                f"the video {path} breaks off: {span:.2f} s of the {there.span:.2f} s that it holds can be "
                f"decoded ({decoded:,} frame(s))"
            )
        total = decoded
    raise DataError(f"the video {path} is empty: it has no frame")


def frame_count(path: str | Path) -> int:
    """How many frames a video file holds, without decoding: a broken file or an odd codec may give fewer.
    Raises DataError naming the file if it is missing or holds no video."""
    with opened_video(path) as footage:
        return measure(footage).frames


def _judged(path: str | Path) -> Extent:
    with opened_video(path) as footage:
        there = measure(footage)
    judge(path, there)
    return there


def _decode(path: str | Path, wanted: list[int], limit: int) -> tuple[np.ndarray, int, float]:
    """The `wanted` ones of the first `limit` frames, in order, the number of frames decoded, and seconds from
    the first to the end of the last."""
    places: dict[int, list[int]] = {}
    for place, number in enumerate(wanted):
        places.setdefault(number, []).append(place)
    clip, decoded, times = np.zeros((0, 0, 0, 3), np.uint8), 0, []
    with opened_video(path) as footage:
        for frame in (frame for packet in packets(footage) for frame in packet.decode()):
            if not decoded:
                width, height = orientation_of(frame).size(frame.width, frame.height)
                if (pixels := len(wanted) * width * height) > PIXELS:
                    raise DataError(
                        f"the video {path} has too many pixels: {len(wanted)} frame(s) of {width} x {height} "
                        f"are {pixels:,}; the most of a clip is {PIXELS:,}"
                    )
                clip = np.zeros((len(wanted), height, width, 3), np.uint8)
            if decoded in places:
                clip[places[decoded]] = _pixels(frame, clip.shape[2], clip.shape[1])
            if frame.time is not None:
                times.append(frame.time)
            decoded += 1
            if decoded == limit:
                break
    span = max(times) - min(times) if times else 0.0
    return clip, decoded, span + span / max(1, len(times) - 1)


def _pixels(frame: VideoFrame, width: int, height: int) -> np.ndarray:
    """A frame as RGB, upright and of this size."""
    upright = orientation_of(frame)
    stored = dict(zip(("width", "height"), upright.size(width, height), strict=True))
    if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
        return upright(on_ground(frame.to_ndarray(format="rgba", **stored)))
    return upright(frame.to_ndarray(format="rgb24", **stored))
