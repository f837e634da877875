"""Containers: which files are opened as videos, which of their streams is the video, how it lies, and whether
all of it is there."""

import functools
import io
import os
import socket
import struct
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from filming import write_video
from PIL import Image

from mplug2.data import clips, containers
from mplug2.data.clips import frame_count, read_video
from mplug2.data.containers import opened_video
from mplug2.data.extent import measure
from mplug2.errors import DataError

KINDS = {
    "a.mp4": ("libx264", {"movflags": "faststart"}),
    "fragments.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "a.mov": ("mpeg4", {"movflags": "faststart"}),
    "a.mkv": ("libx264", {}),
    "a.webm": ("libvpx", {}),
    "a.avi": ("mpeg4", {}),
    "a.flv": ("flv", {}),
    "a.wmv": ("msmpeg4", {}),
    "a.ogv": ("libvpx", {}),
    "a.ts": ("mpeg2video", {}),
    "a.gif": ("", {}),
}


def filmed(path: Path) -> Path:
    """40 frames of 10 a second in the container of the file's name, noisy ones: each takes some bytes."""
    path.write_bytes(film(path.name))
    return path


@functools.cache
def film(name: str) -> bytes:
    rng = np.random.default_rng(0)
    noise = [(rng.integers(0, 60, (48, 64, 1)) + 4 * number).astype(np.uint8) for number in range(40)]
    if name == "a.gif":
        first, *rest = (Image.fromarray(picture[..., 0]) for picture in noise)
        written = io.BytesIO()
        first.save(written, "gif", save_all=True, append_images=rest, duration=100)
        return written.getvalue()
    codec, options = KINDS[name]
    ending = name.partition(".")[2]
    kind = {"wmv": "asf", "ogv": "ogg", "mkv": "matroska", "ts": "mpegts"}.get(ending, ending)
    with tempfile.NamedTemporaryFile() as file, av.open(file.name, "w", kind, options) as container:
        stream = container.add_stream(codec, rate=25 if name == "a.ts" else 10, options={"g": "10"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.thread_count = 1
        for picture in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.repeat(3, 2), format="rgb24")))
        container.mux(stream.encode())
        container.close()
        return file.read()


def test_a_title_that_is_no_text_does_not_keep_a_video_from_being_read(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "a quiet caf."
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    written = path.read_bytes()
    assert written.count(b"quiet caf.") == 1
    path.write_bytes(written.replace(b"quiet caf.", b"quiet caf\xe9"))
    assert read_video(path, 1).shape == (1, 48, 64, 3)


# --- how much is there


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_video_of_any_kind_is_read_without_a_word(tmp_path: Path, name):
    assert read_video(filmed(tmp_path / name), 4).shape == (4, 48, 64, 3)
    assert frame_count(tmp_path / name) == 40


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("a.ts", "a.ogv")])
def test_half_a_video_is_refused(tmp_path: Path, name):
    content = filmed(tmp_path / name).read_bytes()
    for share in (0.8, 0.5):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(
            DataError,
            match=rf"{name} breaks off(: .* of the .* s that it states|, and does not say how long)",
        ):
            read_video(tmp_path / name, 4)


def test_a_video_of_which_the_last_frame_is_missing_is_read_with_a_warning(tmp_path: Path):
    for name in ("a.mp4", "a.mkv", "a.flv"):
        content = filmed(tmp_path / name).read_bytes()
        with opened_video(tmp_path / name) as footage:
            last = max(packet.pos or 0 for packet in footage.container.demux(footage.stream) if packet.size)
        (tmp_path / name).write_bytes(content[: last + 5])
        with pytest.warns(UserWarning, match=rf"{name} breaks off: 3.90 s of the 4.00 s.*; 39 frame"):
            assert read_video(tmp_path / name, 4).shape == (4, 48, 64, 3)


def test_a_gif_or_ogg_without_its_end_mark_is_read_with_a_warning(tmp_path: Path):
    content = filmed(tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(content[:-1])
    with pytest.warns(UserWarning, match="a.gif does not end as .* may break off; 40 frame"):
        read_video(tmp_path / "a.gif", 4)
    (tmp_path / "a.gif").write_bytes(content + b"more")
    read_video(tmp_path / "a.gif", 4)
    content = filmed(tmp_path / "a.ogv").read_bytes()
    (tmp_path / "a.ogv").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="a.ogv does not end as"):
        read_video(tmp_path / "a.ogv", 4)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "a.ogv"])
def test_room_that_was_made_for_a_video_and_not_filled_is_not_the_video(tmp_path: Path, name):
    content = filmed(tmp_path / name).read_bytes()
    half = len(content) // 2
    (tmp_path / name).write_bytes(content[:half] + bytes(len(content) - half))
    with pytest.raises(DataError, match=rf"{name}( breaks off|: Invalid data)"):
        read_video(tmp_path / name, 4)


def test_a_transport_stream_that_ends_within_a_packet_is_read_with_a_warning(tmp_path: Path):
    content = filmed(tmp_path / "a.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(content[: len(content) // 2 // 188 * 188 + 100])
    with pytest.warns(UserWarning, match="a.ts does not end as a whole one does"):
        read_video(tmp_path / "a.ts", 4)


@pytest.mark.parametrize("flags", ["dash", "frag_keyframe+empty_moov", "cmaf", "frag_keyframe"])
def test_a_short_video_of_fragments_is_whole_though_its_frames_begin_late(tmp_path: Path, flags):
    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": flags}) as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "6", "bf": "2"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode())
    assert read_video(tmp_path / "a.mp4", 4).shape == (4, 48, 64, 3)


def test_sound_that_outlasts_the_frames_and_a_last_frame_held_long_are_whole(tmp_path: Path):
    for name in ("a.mkv", "b.mp4", "c.webm"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libvpx" if "webm" in name else "mpeg4", rate=10)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            stream.thread_count = 1
            for number in (0, 1, 2, 40):  # seconds / 10; the last one is there for long
                frame = av.VideoFrame(32, 32, "yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert read_video(tmp_path / name, 2).shape == (2, 32, 32, 3)


def test_frames_that_no_decoder_can_read_are_not_passed_over(tmp_path: Path):
    content = bytearray(filmed(tmp_path / "a.mp4").read_bytes())
    start = content.find(b"mdat")
    middle = start + (len(content) - start) // 2
    content[middle:] = bytes(len(content) - middle)  # as in a download to a file of its full size
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(DataError, match="a.mp4"):
        read_video(tmp_path / "a.mp4", 4)


# --- how it lies

COLOURS = np.zeros((64, 96, 3), np.uint8)
COLOURS[:32, :48], COLOURS[:32, 48:], COLOURS[32:, :48], COLOURS[32:, 48:] = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("plain") / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(COLOURS, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def turned(content: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """The video with another display matrix of its track: x, y is shown at a x + c y, b x + d y."""
    place = content.find(b"tkhd") + 44
    fixed = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    return content[:place] + struct.pack(">9i", *fixed, 1 << 30) + content[place + 36 :]


def corners(frame: np.ndarray) -> str:
    height, width, _ = frame.shape
    found = [
        frame[y, x].astype(int) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)
    ]
    return "".join("W" if corner.min() > 200 else "RGB"[int(corner.argmax())] for corner in found)


@pytest.mark.parametrize(
    "matrix, shown",
    [
        ((1, 0, 0, 1), "RGBW"),
        ((-1, 0, 0, 1), "GRWB"),  # mirrored
        ((1, 0, 0, -1), "BWRG"),
        ((-1, 0, 0, -1), "WBGR"),  # turned twice
        ((0, 1, 1, 0), "RBGW"),  # along the diagonal
        ((0, 1, -1, 0), "BRWG"),  # turned to the right
        ((0, -1, 1, 0), "GWRB"),
        ((0, -1, -1, 0), "WGBR"),
        ((2, 0, 0, 2), "RGBW"),  # enlarged
        ((0.94, 0.34, -0.34, 0.94), "RGBW"),  # by 20 degrees
        ((0.17, 0.98, -0.98, 0.17), "BRWG"),  # by 80
        ((0, 0, 0, 0), "RGBW"),
    ],
)
def test_a_display_matrix_turns_and_mirrors_to_the_nearest_right_angle(tmp_path: Path, plain, matrix, shown):
    (tmp_path / "a.mp4").write_bytes(turned(plain, *matrix))
    frame = read_video(tmp_path / "a.mp4", 1)[0]
    assert corners(frame) == shown
    sideways = abs(matrix[1]) > abs(matrix[0])
    assert frame.shape == ((96, 64, 3) if sideways else (64, 96, 3))


def test_a_sample_aspect_ratio_leaves_frames_as_they_are_stored(tmp_path: Path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(200, 1)
        container.mux(stream.encode(av.VideoFrame(32, 16, "yuv420p")))
        container.mux(stream.encode())
    assert read_video(tmp_path / "a.mkv", 1).shape == (1, 16, 32, 3)


def test_transparent_frames_lie_on_white(tmp_path: Path):
    clear = Image.new("RGBA", (16, 16))
    clear.paste((0, 0, 0, 255), (4, 4, 12, 12))
    other = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    clear.save(tmp_path / "a.gif", save_all=True, append_images=[other], duration=100)
    with av.open(str(tmp_path / "b.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "rgba"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.array(clear), format="rgba")))
        container.mux(stream.encode())
    for name in ("a.gif", "b.mov"):
        frame = read_video(tmp_path / name, 2)[0]
        assert frame[0, 0].tolist() == [255, 255, 255] and not frame[8, 8].any()


def test_frames_that_change_their_size_midway_all_have_the_first_ones(tmp_path: Path):
    content = b""
    for number, size in enumerate([(48, 32), (96, 80)]):
        write_video(tmp_path / "part.ts", [100 + 50 * number] * 5, "mpeg2video", size, rate=25)
        content += (tmp_path / "part.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(content)
    clip = read_video(tmp_path / "a.ts", 4)
    assert clip.shape == (4, 32, 48, 3)
    np.testing.assert_allclose(clip.mean((1, 2, 3)), [100, 100, 150, 150], atol=6)


# --- which stream it is


def several(path: Path, *streams: tuple[str, tuple[int, int], int, int, Disposition]) -> Path:
    """A file of several streams: codec, size, frames, level of grey, and what the stream is marked as."""
    with av.open(str(path), "w") as container:
        made = []
        for codec, (width, height), frames, grey, marked in streams:
            stream = container.add_stream(codec, rate=10)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height = width, height
            stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24"}.get(codec, "yuv420p")
            stream.disposition = marked
            made.append((stream, frames, np.full((height, width, 3), grey, np.uint8)))
        for stream, frames, picture in made:
            for _ in range(frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return path


NO, DEFAULT = Disposition(0), Disposition.default
FILM = ("mpeg4", (64, 48), 10, 200, DEFAULT)


@pytest.mark.parametrize(
    "name, streams",
    [
        ("cover.mp4", [FILM, ("png", (128, 128), 1, 0, Disposition.attached_pic)]),
        ("cover_first.mp4", [("mjpeg", (128, 128), 1, 0, Disposition.attached_pic), FILM]),
        ("single_first.mov", [("mjpeg", (128, 128), 1, 0, DEFAULT), FILM]),
        ("default.mkv", [("mpeg4", (128, 128), 10, 0, NO), FILM]),
        ("large.mp4", [("mpeg4", (32, 32), 10, 0, DEFAULT), FILM]),
    ],
)
def test_of_several_streams_the_video_is_its_own_frames(tmp_path: Path, name, streams):
    path = several(tmp_path / name, *streams)
    clip = read_video(path, 4)
    assert clip.shape == (4, 48, 64, 3) and abs(clip.mean() - 200) < 4 and frame_count(path) == 10


def test_covers_and_thumbnails_alone_are_no_video(tmp_path: Path, monkeypatch):
    path = several(tmp_path / "a.mp4", FILM)
    for marked in (Disposition.attached_pic, Disposition.attached_pic | Disposition.timed_thumbnails):
        with opened_video(path) as footage:
            footage.stream.disposition = marked
            with pytest.raises(DataError, match="a.mp4 holds no video, only a cover or thumbnails"):
                containers._own_stream(path, footage.container)


# --- what is opened


@pytest.mark.parametrize(
    "content",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\n{}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:4,\nhttp://localhost:9/live.ts\n",
        "ffconcat version 1.0\nfile '{}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{}</BaseURL></MPD>',
        "[playlist]\nFile1={}\n",
        "color=c=red:s=64x64:d=1",
    ],
)
@pytest.mark.parametrize("name", ["a.mp4", "a.m3u8", "a.ffconcat", "a.sdp", "a.mpd"])
def test_no_list_of_other_files_is_a_video(tmp_path: Path, plain, content, name):
    (tmp_path / "other.mp4").write_bytes(plain)
    (tmp_path / name).write_text(content.format(tmp_path / "other.mp4"))
    with pytest.raises(
        DataError, match=f"{name} holds no video of a kind that is read.*; read are mp4, mov, mkv"
    ):
        read_video(tmp_path / name, 2)


@pytest.mark.parametrize(
    "name", ["http://localhost:9/a.mp4", "concat:a.mp4|b.mp4", "subfile,,start,0,end,9,,:a.mp4"]
)
def test_an_address_is_the_name_of_a_file_that_is_not_there(name):
    with pytest.raises(DataError, match="cannot read the video .*: No such file"):
        read_video(name, 2)


def test_content_decides_and_not_the_name_of_a_video(tmp_path: Path, plain):
    (tmp_path / "a.m3u8").write_bytes(plain)
    assert read_video(tmp_path / "a.m3u8", 1).shape == (1, 64, 96, 3)


def test_a_film_that_names_another_file_does_not_open_it(tmp_path: Path, plain):
    """QuickTime's references to data elsewhere."""
    (tmp_path / "other.mp4").write_bytes(plain)
    elsewhere = bytes(4) + b"alis" + bytes(4) + str(tmp_path / "other.mp4").encode()
    content = plain.replace(b"url \0\0\0\1", b"alis\0\0\0\0")
    (tmp_path / "a.mov").write_bytes(content + elsewhere)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "_nothing_else", lambda *words: seen.append(words))
        try:
            read_video(tmp_path / "a.mov", 1)
        except DataError as error:
            assert "a.mov" in str(error)
    assert not seen


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_pixels_are_counted_before_a_frame_is_decoded(tmp_path: Path, name, monkeypatch):
    monkeypatch.setattr(containers, "PIXELS", 48 * 32 - 1)
    write_video(tmp_path / name, [100] * 3, "libx264", rate=25)
    monkeypatch.setattr(clips, "_decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(
        DataError,
        match=rf"{name} (has too many pixels: 48 x 32; the most of a frame is 1,535|holds no video)",
    ):
        read_video(tmp_path / name, 2)


def test_frames_that_grow_midway_beyond_the_most_are_refused(tmp_path: Path, monkeypatch):
    content = b""
    for size in [(48, 32), (96, 80)]:
        write_video(tmp_path / "part.ts", [100] * 5, "mpeg2video", size, rate=25)
        content += (tmp_path / "part.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(content)
    monkeypatch.setattr(containers, "PIXELS", 2000)
    with pytest.raises(DataError, match="a.ts"):
        read_video(tmp_path / "a.ts", 4)


def test_a_clip_of_more_pixels_than_fit_is_refused_with_the_sizes(tmp_path: Path, monkeypatch):
    write_video(tmp_path / "a.mp4", [100] * 3)
    monkeypatch.setattr(clips, "PIXELS", 4 * 48 * 32)
    assert read_video(tmp_path / "a.mp4", 4).shape == (4, 32, 48, 3)
    with pytest.raises(DataError, match=r"5 frame\(s\) of 48 x 32 are 7,680; the most of a clip is 6,144"):
        read_video(tmp_path / "a.mp4", 5)


def with_table(content: bytes, table: bytes, at: int, *numbers: int) -> bytes:
    place = content.find(table) + at
    return content[:place] + struct.pack(f">{len(numbers)}I", *numbers) + content[place + 4 * len(numbers) :]


def test_a_table_of_more_frames_than_any_video_has_is_refused_before_there_is_room_for_it(
    tmp_path: Path, plain
):
    stated = with_table(plain, b"stsz", 8, 1, 80_000_000)
    several(tmp_path / "a.mp4", FILM)
    fragment = filmed(tmp_path / "fragments.mp4").read_bytes()
    moved = with_table(fragment, b"trun", 8, 80_000_000)
    padded = struct.pack(">I4s", len(stated) + 8, b"free") + stated
    packed = plain + struct.pack(">I4sI4sI4s", 28, b"moov", 20, b"cmov", 12, b"dcom")
    for content, said in (
        (stated, "states 80,000,000 frames; the most is 5,000,000"),
        (moved, "states 80,000,0.* frames"),
        (padded, "states 80,000,000 frames"),
        (packed, "has compressed tables"),
    ):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(DataError, match=f"a.mp4 {said}"):
            read_video(tmp_path / "a.mp4", 1)


def test_a_video_of_more_frames_than_the_most_is_refused_as_they_are_counted(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("mplug2.data.extent.FRAMES", 9)
    with pytest.raises(DataError, match="a.mkv has more than 9 frames"):
        read_video(filmed(tmp_path / "a.mkv"), 2)


def test_threads_share_what_one_decoder_may_hold(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    write_video(tmp_path / "a.mp4", [100] * 3)
    for pixels, threads in ((containers.PIXELS, 16), (1000 * 48 * 32 // 333, 6), (48 * 32, 2)):
        monkeypatch.setattr(containers, "_THREADED", 2 * pixels)
        with opened_video(tmp_path / "a.mp4") as footage:
            assert footage.stream.codec_context.thread_count == threads


def test_a_film_of_no_pixels_or_frames_is_refused(tmp_path: Path, plain):
    place = plain.find(b"avc1") + 28
    (tmp_path / "a.mp4").write_bytes(plain[:place] + bytes(4) + plain[place + 4 :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert read_video(tmp_path / "a.mp4", 1).shape == (1, 64, 96, 3)
        except DataError as error:
            assert "a.mp4" in str(error)


def test_measuring_decodes_nothing(tmp_path: Path):
    with opened_video(filmed(tmp_path / "a.mp4")) as footage:
        there = measure(footage)
    assert (there.frames, there.end) == (40, "whole")
    assert (
        there.stated == pytest.approx(4)
        and there.found == pytest.approx(4)
        and there.gap == pytest.approx(0.1)
    )


def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path: Path):
    from mplug2.data.annotations import CaptionLines, read_answers
    from mplug2.data.pictures import read_image

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(os.path.relpath(tmp_path / "socket"))
    try:
        for path, kind in (
            (tmp_path / "pipe", "a named pipe"),
            (tmp_path / "folder", "a folder"),
            (tmp_path / "socket", "a socket"),
            (Path("/dev/zero"), "a device"),
        ):
            for read in (read_image, lambda path: read_video(path, 2), frame_count, read_answers):
                with pytest.raises(DataError, match=f"{path.name}: it is {kind}, expected a regular file"):
                    read(path)
    finally:
        listening.close()
    with pytest.raises(DataError, match="pipe: it is a named pipe"):
        CaptionLines(train="pipe").entries(tmp_path, "train")
    for name in ("a\0b.png", "x" * 300):
        with pytest.raises(DataError, match="cannot read"):
            read_image(tmp_path / name)
