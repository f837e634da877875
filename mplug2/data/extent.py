"""Extent: how much of a video is there, beside what its container states.

A download that broke off shows another, shorter event, of which the caption is wrong. Containers of STATING
say how long they are; GIF and Ogg have a mark at their end; MPEG streams say nothing, but a
transport stream shows that it was cut within a packet. A file that ends in zeros never came as a whole: room
was made for it.
"""

import math
import os
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from av.packet import Packet
from av.video.stream import VideoStream

from mplug2.data.containers import Footage
from mplug2.data.sample_tables import FRAMES
from mplug2.errors import DataError

STATING = ("mov", "matroska", "avi", "flv", "asf")

_BY_FRAME = ("mov", "avi")  # of these, those that state how long each frame is shown, the last one too

ENOUGH = 0.95
"""Of what is stated, so much must be there: with less a video is refused, with less than all it is read with
a warning."""

_ZEROS = 4096
"""So many zeros at the end of a file are no content: more than pad a sector or a few edited tags."""

_TS_PACKETS = (188, 192, 204)
"""Bytes of a packet of a transport stream: plain, with a time (Blu-ray), with a code against errors."""

End = Literal["whole", "unmarked", "cut"]


@dataclass(frozen=True)
class Extent:
    """What is there. `frames`: packets with a frame to show; `span`: seconds from the first to the end of
    the last; `found`: seconds from the start of the video to there, and `stated`: what the container says of
    it, if it does; `gap`: seconds between frames; `end`: "cut" where bytes are missing."""

    frames: int
    span: float
    found: float
    stated: float | None
    gap: float
    end: End = "whole"


def packets(footage: Footage) -> Iterator[Packet]:
    """The packets of a video's own frames but for one that the file's end cuts, and what flushes decoders."""
    for packet in footage.container.demux(footage.stream):
        if not (packet.is_corrupt and footage.kind in STATING):
            yield packet


def measure(footage: Footage) -> Extent:
    """Reads all packets of a video and decodes none. Raises DataError if there are more than FRAMES."""
    stream, kind = footage.stream, footage.kind
    # Matroska and FLV state the length of the longest stream alone, which may be the sound.
    of_all = kind in ("matroska", "flv")
    count, damaged, first, last, end = 0, False, math.inf, -math.inf, 0.0
    for packet in footage.container.demux() if of_all else footage.container.demux(stream):
        if not packet.size:
            continue
        ours = packet.stream_index == stream.index
        if packet.is_corrupt:
            damaged = True
            if kind in STATING:  # as in `packets`
                continue
        if ours and not packet.is_discard:
            count += 1
            if count > FRAMES:
                raise DataError(f"the video {footage.path} has more than {FRAMES:,} frames")
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is None or packet.time_base is None:
            continue
        begins = float(stamp * packet.time_base)
        if ours:
            first, last = min(first, begins), max(last, begins)
        end = max(end, begins + float((packet.duration or 0) * packet.time_base))
    first, last = (first, last) if first <= last else (0.0, 0.0)  # no packet says when it is
    gap = (last - first) / (count - 1) if count > 1 else 0.0
    found = max(end, last + gap) - (0.0 if of_all else _start(stream))
    ends = _end(footage, damaged)
    # The last frame of the others may be shown longer than can be seen: only bytes tell that more is missing.
    stated = _stated(footage) if kind in _BY_FRAME or ends == "cut" else None
    return Extent(count, last + gap - first, found, stated, gap, ends)


def judge(path: str | Path, there: Extent) -> None:
    """Raises DataError for a video of which less than ENOUGH is there, or that ends within a frame without
    saying how much is missing; warns of one of which anything is missing, or may be."""
    has = f"{there.frames:,} frame(s) can be read"
    if there.stated is not None and there.stated - there.found > 0.75 * there.gap:
        said = f"{max(0, there.found):.2f} s of the {there.stated:.2f} s that it states are there"
        if there.found < ENOUGH * there.stated:
            raise DataError(f"the video {path} breaks off: {said}, at least {ENOUGH:.0%} are needed; {has}")
        warnings.warn(f"the video {path} breaks off: {said}; {has}", stacklevel=2)
    elif there.end == "cut" and there.stated is None:
        raise DataError(f"the video {path} breaks off, and does not say how long it was; {has}")
    elif there.end == "unmarked":
        said = f"the video {path} does not end as a whole one does: it may break off"
        warnings.warn(f"{said}; {has}", stacklevel=2)


def _start(stream: VideoStream) -> float:
    return float((stream.start_time or 0) * stream.time_base) if stream.time_base else 0.0


def _end(footage: Footage, damaged: bool) -> End:
    kind, file = footage.kind, footage.file
    if kind == "gif":
        return _gif_end(file)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZEROS))
    if not any(file.read()):
        return "cut"
    if kind == "ogg":
        return "whole" if _ogg_ends(file) else "unmarked"
    if kind == "mpegts":
        return "unmarked" if all(size % packet for packet in _TS_PACKETS) else "whole"
    if kind not in STATING:
        return "whole"
    needed = _matroska_size(file) if kind == "matroska" else _asf(file)[0] if kind == "asf" else 0
    short = needed > size or (kind == "flv" and not _flv_ends(file))
    return "cut" if damaged or short else "whole"


def _stated(footage: Footage) -> float | None:
    """Seconds by the container, of the video or of the longest stream; None where it does not say, or where
    FFmpeg says it by what it found."""
    stream, kind = footage.stream, footage.kind
    if kind in ("matroska", "flv"):
        return None if footage.container.duration is None else footage.container.duration / 1_000_000
    if kind == "asf":
        return _asf(footage.file)[1]
    if stream.time_base is None or kind not in STATING:
        return None
    units = stream.frames if kind == "avi" and stream.frames else stream.duration
    if units is None:
        return None
    # An index counts from the first frame; fragments, which count no frames, say when the last one ends.
    before = max(0.0, _start(stream)) if kind == "mov" and not stream.frames else 0.0
    return float(units * stream.time_base) - before


def _matroska_size(file: IO[bytes]) -> int:
    """The bytes that a Matroska file's outermost element says it has; 0 if it says nothing."""

    def number() -> tuple[int, int]:
        first = file.read(1)[0]
        more = 8 - first.bit_length()
        whole = int.from_bytes(bytes([first - (1 << (7 - more))]) + file.read(more))
        return whole, (1 << 7 * (more + 1)) - 1

    file.seek(0)
    try:
        for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # EBML, Segment
            if file.read(4) != name:
                return 0
            size, unknown = number()
            if name[0] == 0x18 and size != unknown:
                return file.tell() + size
            file.seek(size, os.SEEK_CUR)
    except (IndexError, ValueError, OSError):  # it ends here, or a size that is none
        pass
    return 0


def _asf(file: IO[bytes]) -> tuple[int, float | None]:
    """The bytes and the seconds that an ASF file's header says it has; 0 and None if it says nothing."""
    file.seek(0)
    head = file.read(65536)
    place = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))  # the file properties object
    if place < 0 or len(head) < place + 92:
        return 0, None
    size, _, _, played, _, preroll, live = struct.unpack_from("<QQQQQQI", head, place + 40)
    if live & 1:  # written without an end
        return 0, None
    return size, played / 10_000_000 - preroll / 1000


def _flv_ends(file: IO[bytes]) -> bool:
    """Whether an FLV file ends with the size of its last tag."""
    end = file.seek(0, os.SEEK_END) - 4
    file.seek(max(0, end))
    length = int.from_bytes(file.read(4))
    if not 11 <= length <= end:
        return False
    file.seek(end - length)
    return int.from_bytes(file.read(4)[1:]) == length - 11


def _gif_end(file: IO[bytes]) -> End:
    """How a GIF ends: with its mark, between two blocks, or within one."""

    def blocks() -> bool:
        while length := file.read(1):
            if length == b"\0":
                return True
            if len(file.read(length[0])) < length[0]:
                return False
        return False

    def table(flags: int) -> bool:
        size = 3 << ((flags & 7) + 1) if flags & 128 else 0
        return len(file.read(size)) == size

    file.seek(0)
    head = file.read(13)
    whole, kind = len(head) == 13 and table(head[10]), b""
    while whole and (kind := file.read(1)) in (b"\x21", b"\x2c"):
        if kind == b"\x21":
            whole = bool(file.read(1)) and blocks()
        else:
            place = file.read(9)
            whole = len(place) == 9 and table(place[8]) and bool(file.read(1)) and blocks()
    if not whole or kind == b"\0":  # no block begins so: room that was never filled
        return "cut"
    return "whole" if kind else "unmarked"  # at anything else decoders end as well


def _ogg_ends(file: IO[bytes]) -> bool:
    """Whether the last page of an Ogg file is marked as the last one."""
    file.seek(0, 2)
    file.seek(max(0, file.tell() - 2 * 65307))  # the longest page, twice
    tail = file.read()
    page = tail.rfind(b"OggS")
    return page >= 0 and len(tail) > page + 5 and bool(tail[page + 5] & 4)
