"""Clips: a few frames of a video file -> uint8 T H W C, by PyAV; any container and codec of FFmpeg, and
animated GIF."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from mplug2.errors import DataError, nearest

SAMPLING = ("uniform", "middle")


def frame_indices(total: int, frames: int, how: str = "uniform") -> np.ndarray:
    """Which `frames` of `total` to show, int64, sorted: the centre frame of each of `frames` equal intervals.
     "uniform" cuts at exact fractions; a video shorter than `frames` repeats frames evenly. "middle" is the
    official mPLUG-2 code's: it cuts at whole frames, and a shorter video repeats its last frame.
    """
    if how not in SAMPLING:
        raise DataError(
            f'unknown frame sampling "{how}"; known are {", ".join(SAMPLING)}{nearest(how, SAMPLING)}'
        )
    if total < 1 or frames < 1:
        raise DataError(f"cannot pick {frames} frame(s) of a video of {total}; both must be at least 1")
    if how == "uniform":
        return (2 * np.arange(frames) + 1) * total // (2 * frames)
    cuts = np.linspace(0, total, min(frames, total) + 1).astype(np.int64)
    middle = (cuts[:-1] + cuts[1:] - 1) // 2
    return np.pad(middle, (0, frames - len(middle)), mode="edge")


def read_video(path: str | Path, frames: int, how: str = "uniform") -> np.ndarray:
    """`frames` frames of a video file at its own size, upright, uint8 T H W C, RGB.

    Raises DataError naming the file if it is missing, holds no video, no frame, or cannot be decoded.
    """
    total = _packets(path)  # a quick count; a broken file or an odd codec may decode to fewer frames
    while total:
        wanted = frame_indices(total, frames, how).tolist()
        shown, decoded = _decode(path, set(wanted), total)
        if decoded == total:
            return np.stack([shown[number] for number in wanted])
        total = decoded
    raise DataError(f"the video {path} is empty: it has no frame")


def _packets(path: str | Path) -> int:
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
