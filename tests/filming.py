"""Videos for tests: small ones, of any container and codec."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path,
    grey: list[int],
    codec: str = "libx264",
    size: tuple[int, int] = (48, 32),
    rate: int = 10,
) -> None:
    """A video whose i-th frame is all `grey[i]`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt, stream.thread_count = "yuv420p", 1  # libvpx's threads wait for one another, for long
        for number, level in enumerate(grey):
            picture = np.full((size[1], size[0], 3), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
