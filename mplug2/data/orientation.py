"""Orientation of a video: its display matrix, as one of the eight ways that a picture can lie."""

from dataclasses import dataclass

import numpy as np
from av.video.frame import VideoFrame


@dataclass(frozen=True)
class Orientation:
    """Rows and columns exchanged first, then mirrored left to right, then top to bottom."""

    transposed: bool = False
    across: bool = False
    down: bool = False

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Pixels H W C as stored -> upright."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.down else 1, :: -1 if self.across else 1]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height as stored -> upright, and back."""
        return (height, width) if self.transposed else (width, height)


def orientation_of(frame: VideoFrame) -> Orientation:
    """How a player shows a frame. A matrix turned by another angle than a right one is taken for the nearest
    of the eight, and its scale is passed over, as is a matrix without any."""
    try:
        found = frame.side_data.get("DISPLAYMATRIX")  # type: ignore[call-overload]
    except ValueError:  # beside it is something that this PyAV has no name for
        return Orientation()
    if found is None or len(matrix := np.frombuffer(bytes(found), np.int32)) != 9:
        return Orientation()
    # A pixel at x, y is shown at a x + c y, b x + d y.
    a, b, _, c, d = matrix[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, across=c < 0, down=b < 0)
    return Orientation(False, across=a < 0, down=d < 0)
