"""Clips: a few frames of a video file -> uint8 T H W C, by PyAV; any container and codec of FFmpeg, and
animated GIF."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from mplug2.errors import DataError, nearest

SAMPLING = ("uniform", "random", "middle", "official_random")


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

    Raises DataError naming the file if it is missing, holds no video, no frame, or cannot be decoded.
    """
    total = frame_count(path)
    while total:
        wanted = frame_indices(total, frames, how, rng).tolist()
        shown, decoded = _decode(path, set(wanted), total)
        if decoded == total:
            return np.stack([shown[number] for number in wanted])
        total = decoded
    raise DataError(f"the video {path} is empty: it has no frame")


def frame_count(path: str | Path) -> int:
    """How many frames a video file holds, without decoding: a broken file or an odd codec may give fewer.
    Raises DataError naming the file if it is missing or holds no video."""
    with _video(path) as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def _decode(path: str | Path, wanted: set[int], limit: int) -> tuple[dict[int, np.ndarray], int]:
    """The `wanted` ones of the first `limit` frames by number, and the number of frames decoded."""
    shown, size, decoded = {}, {}, 0
    with _video(path) as (container, stream):
        for frame in container.decode(stream):
            size = size or {"width": frame.width, "height": frame.height}  # a stream may change it midway
            if decoded in wanted:
                picture = frame.to_ndarray(format="rgb24", **size)
                shown[decoded] = np.rot90(picture, frame.rotation // 90)
            decoded += 1
            if decoded == limit:
                break
    return shown, decoded


@contextlib.contextmanager
def _video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The opened file and its first video stream; what FFmpeg raises while it is open becomes a DataError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"cannot read the video {path}: {error.strerror or error}") from None
