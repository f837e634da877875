"""Sample tables of mp4 and mov files, looked at before FFmpeg makes room for what they state: an index of
80 million frames, which a file of 90 kB can state, takes it 5 GB and half a minute."""

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mplug2.errors import DataError

FRAMES = 5_000_000
"""The most that a video has: 55 hours of them."""

_CHUNK = 1 << 24
_TABLE = re.compile(
    rb"(?P<table>stsz|stz2|trun).{4}(?P<numbers>.{8})|hdlr.{4}(?!dhlr).{4}(?P<of>.{4})", re.DOTALL
)
_PACKED = re.compile(rb"cmov.{4}dcom", re.DOTALL)


def check_tables(path: str | Path, file: IO[bytes]) -> None:
    """Raises DataError for an mp4 or mov file that states more than FRAMES samples of a stream, or whose
    tables are compressed. Sound may have as many as its bytes hold: uncompressed, each is a sample."""
    size, fragments, sound = file.seek(0, os.SEEK_END), 0, False
    for part in _outside_data(file, size):
        if _PACKED.search(part):
            raise DataError(f"the video {path} has compressed tables, which are not read")
        for found in _TABLE.finditer(part):
            if found["of"] is not None:
                sound = found["of"] == b"soun"
                continue
            first, count = struct.unpack(">II", found["numbers"])
            if found["table"] == b"trun":
                fragments += (count := first)
            if count > FRAMES or fragments > FRAMES:
                fits = found["table"] == b"stsz" and first and first * count <= size
                if not (sound and fits):
                    raise DataError(
                        f"the video {path} states {max(count, fragments):,} frames; the most is {FRAMES:,}"
                    )


def _outside_data(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The outermost boxes but those of data, in parts that a table lies in as a whole; nothing of a file
    that does not begin as one of boxes."""
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        if not place and not re.fullmatch(rb"[A-Za-z0-9 ]{4}", kind):
            return
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        end = size if length == 0 else min(size, place + length)
        if length and length < 8:
            return
        if kind != b"mdat":
            for start in range(place, end, _CHUNK):
                file.seek(start)
                yield file.read(min(_CHUNK + 64, end - start))
        place = end
