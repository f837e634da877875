"""Containers of video: a local file -> its own stream of frames, by PyAV.

CONTAINERS lists what is opened; content decides, not the name. Not among them are lists of other files
(playlists, concatenations), devices, and protocols: FFmpeg reads the opened file and may open nothing else.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from mplug2.data.inputs import opened, reason
from mplug2.data.sample_tables import check_tables
from mplug2.errors import DataError

CONTAINERS = {  # FFmpeg's demuxer: what people call its files
    "mov": "mp4, mov",
    "matroska": "mkv, webm",
    "avi": "avi",
    "gif": "gif",
    "asf": "wmv",
    "flv": "flv",
    "mpegts": "ts",
    "mpeg": "mpg",
    "ogg": "ogv",
}

PIXELS = 8192 * 4320
"""The most that a frame has. What decodes it holds several at once, a picture's decoder but one."""

_THREADED = 2 * PIXELS  # of all frames that threads decode side by side
_STILL = (
    Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent
)


@dataclass(frozen=True)
class Footage:
    """An opened video: its file, its container, and the stream of its own frames."""

    path: str | Path
    file: BinaryIO
    container: InputContainer
    stream: VideoStream

    @property
    def kind(self) -> str:
        """The key of CONTAINERS that its container is of."""
        names = self.container.format.name.split(",")
        return next(name for name in CONTAINERS if name in names)


@contextmanager
def opened_video(path: str | Path) -> Iterator[Footage]:
    """The opened file with the stream of its own frames, which no cover, thumbnail or single picture is.

    Raises DataError naming the file if it is no regular file, of no container of CONTAINERS, without such a
    stream, with larger frames than PIXELS, and for whatever FFmpeg raises while it is open.
    """
    with opened(path, "the video") as file:
        try:
            with _container(path, file) as container:
                yield Footage(path, file, container, _own_stream(path, container))
        except DataError:
            raise
        except Exception as error:  # FFmpeg's, and what PyAV raises besides
            raise DataError(f"cannot read the video {path}: {reason(error)}") from None


class _Unnamed:
    """A file without its name, by which FFmpeg would judge it, and its content only after that."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


# Titles that are no UTF-8 are nobody's business here. (PyAV 19 lets them be, and knows the word no more.)
_ANY_METADATA: Any = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def _container(path: str | Path, file: BinaryIO) -> InputContainer:
    check_tables(path, file)
    file.seek(0)
    options = {
        "format_whitelist": ",".join(CONTAINERS),
        "protocol_whitelist": "",
        "max_pixels": str(PIXELS),  # of FFmpeg's own look at the first frames
    }
    try:
        return av.open(_Unnamed(file), "r", options=options, io_open=_nothing_else, **_ANY_METADATA)
    except (av.error.ArgumentError, av.error.InvalidDataError, EOFError):
        kinds = ", ".join(CONTAINERS.values())
        raise DataError(
            f"{path} holds no video of a kind that is read, or is broken; read are {kinds}"
        ) from None


def _nothing_else(url: str, flags: int, options: Any) -> Any:
    raise DataError(f'it names another file, "{url}", which is not opened')


def _own_stream(path: str | Path, container: InputContainer) -> VideoStream:
    """Of several, the one that states more than one frame, that the file marks as its default, or that is
    largest; else the first."""
    streams = [stream for stream in container.streams.video if not stream.disposition & _STILL]
    if not streams:
        covers = ", only a cover or thumbnails" if container.streams.video else ""
        raise DataError(f"{path} holds no video{covers}")
    if not (known := [stream for stream in streams if stream.codec_context is not None]):
        raise DataError(f"the video {path} is of a codec that cannot be decoded")

    def rank(stream: VideoStream) -> tuple[bool, bool, int]:
        default = bool(stream.disposition & Disposition.default)
        return stream.frames != 1, default, stream.codec_context.width * stream.codec_context.height

    stream = max(known, key=rank)
    coder = stream.codec_context
    if (pixels := coder.width * coder.height) > PIXELS:
        raise DataError(
            f"the video {path} has too many pixels: {coder.width} x {coder.height}; "
            f"the most of a frame is {PIXELS:,}"
        )
    coder.options = {"max_pixels": str(PIXELS)}  # of frames that are larger than the first
    coder.thread_type = "AUTO"
    coder.thread_count = max(1, min(os.cpu_count() or 1, 16, _THREADED // max(1, pixels)))
    return stream
