"""Pictures: what is opened, what colours and transparency become, which way up; whatever a decoder raises."""

import re
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from mplug2.data import pictures
from mplug2.data.colours import GROUND, to_rgb
from mplug2.data.pictures import FORMATS, read_image
from mplug2.errors import DataError

RAMP = np.tile(np.arange(64, dtype=np.float64) / 63, (64, 1))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG of any bit depth, which Pillow does not write all of; `rows`: each with its filter byte, 0."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + data + chunk(b"IEND", b"")


# --- more than 8 bits


@pytest.mark.parametrize(
    "name, levels",
    [
        ("gray.png", (RAMP * 65535).round().astype(np.uint16)),
        ("gray.tiff", (RAMP * 65535).round().astype(np.uint16)),
        ("gray.pgm", (RAMP * 65535).round().astype(np.uint16)),
        ("big_endian.tiff", (RAMP * 65535).round().astype(">u2")),
        ("whole.tiff", (RAMP * 255).round().astype(np.int32)),
        ("whole_16.tiff", (RAMP * 65535).round().astype(np.int32)),
        ("whole_32.tiff", (RAMP * (2**31 - 1)).astype(np.int32)),
        ("share.tiff", RAMP.astype(np.float32)),
        ("byte.tiff", (RAMP * 255).astype(np.float32)),
        ("wide.tiff", (RAMP * 65535).astype(np.float32)),
        ("wider.tiff", (RAMP * 1000).astype(np.float32)),
        ("over.tiff", (RAMP * 1.02).astype(np.float32)),
        ("signed.tiff", (RAMP * 2 - 1).astype(np.float32)),
        ("share.pfm", RAMP.astype(np.float32)),
    ],
)
def test_a_ramp_of_any_depth_is_a_ramp_of_8_bits(tmp_path: Path, name, levels):
    Image.fromarray(levels).save(tmp_path / name)
    shown = pixels(tmp_path / name)
    assert (shown == shown[..., :1]).all()
    np.testing.assert_allclose(shown[..., 0], RAMP * 255, atol=0.51)


def tiff(data: bytes, width: int, height: int, bits: int, photometric: int = 1) -> bytes:
    """A gray TIFF of unsigned numbers as they lie in `data`, of kinds that Pillow does not write."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(data)), (339, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def test_levels_that_pillow_hands_on_otherwise_than_stated_are_as_stated(tmp_path: Path):
    width, height = RAMP.shape[1], RAMP.shape[0]
    whole = (RAMP * 4095).round().astype(int).reshape(-1, 2)
    twelve = np.stack([whole[:, 0] >> 4, (whole[:, 0] & 15) << 4 | whole[:, 1] >> 8, whole[:, 1] & 255], 1)
    unsigned = (RAMP * (2**32 - 1)).astype("<u4").tobytes()
    inverted = ((1 - RAMP) * 65535).round().astype("<u2").tobytes()
    for content in (
        tiff(twelve.astype(np.uint8).tobytes(), width, height, 12),
        tiff(unsigned, width, height, 32),
        tiff(inverted, width, height, 16, photometric=0),
    ):
        (tmp_path / "a.tiff").write_bytes(content)
        np.testing.assert_allclose(pixels(tmp_path / "a.tiff")[..., 0], RAMP * 255, atol=0.51)


def test_a_dark_picture_of_16_bits_stays_dark_and_of_floats_below_one_too(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 2570, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 2570, np.uint16)).save(tmp_path / "a.pgm")
    Image.fromarray(np.full((8, 8), 10 / 255, np.float32)).save(tmp_path / "a.tiff")
    Image.fromarray(np.array([[0, 200.0]] * 8, np.float32)).save(tmp_path / "b.tiff")
    for name in ("a.png", "a.pgm", "a.tiff"):
        assert (pixels(tmp_path / name) == 10).all()
    assert pixels(tmp_path / "b.tiff").max() == 200


def test_floats_that_are_no_numbers_are_black_or_the_end_of_the_range():
    levels = np.array([[np.nan, np.inf, -np.inf, 0.5]], np.float32)
    assert np.asarray(to_rgb(Image.fromarray(levels)))[0, :, 0].tolist() == [0, 255, 0, 128]
    for nothing in (
        np.full((2, 2), np.nan, np.float32),
        np.zeros((2, 2), np.float32),
        -np.ones((1, 1), "f4"),
    ):
        assert not np.asarray(to_rgb(Image.fromarray(nothing))).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX", "LA", "PA", "La", "RGBa"]
)
def test_every_mode_shows_its_colours(mode):
    """White, black and, where the mode has colour, red."""
    colours = Image.fromarray(np.array([[[255] * 3, [0] * 3, [255, 0, 0]]], np.uint8))
    through = {"La": "LA", "RGBa": "RGBA", "PA": "P", "1": "L"}.get(mode)
    shown = np.asarray(to_rgb((colours.convert(through) if through else colours).convert(mode))).astype(int)
    np.testing.assert_allclose(shown[0, :2], [[255] * 3, [0] * 3], atol=2)
    if mode not in ("1", "L", "LA", "La"):
        np.testing.assert_allclose(shown[0, 2], [255, 0, 0], atol=6)  # LAB of 8 bits is coarse


# --- transparency


def drawing(mode: str) -> Image.Image:
    """A black square on transparency; a quarter of it is half transparent."""
    array = np.zeros((16, 16, 4), np.uint8)
    array[4:12, 4:12, 3] = 255
    array[4:8, 4:8, 3] = 128
    image = Image.fromarray(array)
    if mode == "PA":
        image = image.convert("L").convert("P")
        image.putalpha(Image.fromarray(array[..., 3]))
        return image
    through = {"La": "LA"}.get(mode, "RGBA")
    return image.convert(through).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparent_modes_lie_on_white(mode):
    shown = np.asarray(to_rgb(drawing(mode)))
    assert shown[0, 0].tolist() == list(GROUND) == [255, 255, 255]
    assert not shown[10, 10].any() and abs(int(shown[5, 5, 0]) - 127) <= 1


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff", "a.gif", "a.ico", "a.tga", "a.avif", "a.jp2"])
def test_transparent_files_lie_on_white(tmp_path: Path, name):
    if name == "a.avif" and "AVIF" not in pictures._formats():
        pytest.skip("this Pillow reads no AVIF")
    options: dict = {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.avif" else {}
    drawing("RGBA").save(tmp_path / name, **options)
    shown = pixels(tmp_path / name)
    assert shown[0, 0].min() > 250 and shown[10, 10].max() < 5


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.gif"])
def test_of_an_animation_the_first_frame_lies_on_white(tmp_path: Path, name):
    frames = [drawing("RGBA"), Image.new("RGBA", (16, 16), (255, 0, 0, 255))]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    shown = pixels(tmp_path / name)
    assert shown[0, 0].min() > 250 and shown[10, 10].max() < 5


ROWS_8 = b"\0" + bytes([10, 200, 255])
KEYED = {
    "gray of 8 bits": (png(3, 1, 8, 0, ROWS_8, chunk(b"tRNS", b"\0\x0a")), [255, 200, 255]),
    "gray of 4 bits": (png(3, 1, 4, 0, b"\0\x3c\xf0", chunk(b"tRNS", b"\0\x03")), [255, 204, 255]),
    "gray of 2 bits": (png(3, 1, 2, 0, b"\0\x6c", chunk(b"tRNS", b"\0\x01")), [255, 170, 255]),
    "gray of 1 bit": (png(2, 1, 1, 0, b"\0\x40", chunk(b"tRNS", b"\0\0")), [255, 255]),
    "gray of 16 bits": (
        png(3, 1, 16, 0, b"\0" + struct.pack(">3H", 257, 258, 0), chunk(b"tRNS", b"\x01\x01")),
        [255, 1, 0],
    ),
    "colours of 8 bits": (
        png(2, 1, 8, 2, b"\0" + bytes([1, 1, 1, 9, 9, 9]), chunk(b"tRNS", struct.pack(">3H", 1, 1, 1))),
        [255, 9],
    ),
    "colours of 16 bits": (
        png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *[257] * 3, *[2313] * 3), chunk(b"tRNS", b"\1\1" * 3)),
        [255, 9],
    ),
    "palette": (
        png(
            3, 1, 8, 3, b"\0\0\1\2", chunk(b"PLTE", bytes([0] * 3 + [9] * 3 + [8] * 3)), chunk(b"tRNS", b"\0")
        ),
        [255, 9, 8],
    ),
}


@pytest.mark.parametrize("kind", KEYED)
def test_the_transparent_colour_of_a_png_lies_on_white(tmp_path: Path, kind):
    content, shown = KEYED[kind]
    (tmp_path / "a.png").write_bytes(content)
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == shown


# --- which way up


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("turned", range(1, 9))
def test_all_eight_orientations_are_undone(tmp_path: Path, name, turned):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored = {  # what a camera held so writes of it
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[turned]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    options: dict = {"quality": 95} if name == "a.jpg" else {"lossless": True} if name == "a.webp" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **options)
    shown = pixels(tmp_path / name)
    assert shown.shape == upright.shape
    for y, x in ((4, 4), (4, 44), (28, 4), (28, 44)):
        np.testing.assert_allclose(shown[y, x].astype(int), upright[y, x], atol=12)


# --- what is opened


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
STRANGE = {
    "eps": POSTSCRIPT,
    "eps with a preview": struct.pack("<5I", 0xC6D3D0C5, 32, len(POSTSCRIPT), 0, 0) + bytes(12) + POSTSCRIPT,
    "pdf": b"%PDF-1.4\n" + POSTSCRIPT,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
    "iptc around eps": b"\x1c\x08\x0a\0\x01\x01" + POSTSCRIPT,
    "icns around eps": b"icns"
    + struct.pack(">I", 400)
    + b"ic07"
    + struct.pack(">I", 392)
    + POSTSCRIPT
    + bytes(300),
    "ico around eps": b"\0\0\1\0\1\0" + struct.pack("<4B2H2I", 10, 10, 0, 0, 1, 32, 90, 22) + POSTSCRIPT,
    "windows metafile": b"\xd7\xcd\xc6\x9a" + bytes(100),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["a.png", "a.eps"])
def test_no_program_is_started_for_what_calls_itself_a_picture(tmp_path: Path, kind, name, monkeypatch):
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **more: started.append(words))
    (tmp_path / name).write_bytes(STRANGE[kind])
    with pytest.raises(DataError, match=name):
        read_image(tmp_path / name)
    assert not started


def test_content_decides_and_not_the_name(tmp_path: Path):
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.eps")
    assert pixels(tmp_path / "a.eps")[0, 0].tolist() == [9, 8, 7]


def test_pictures_and_videos_are_opened_in_one_place_each():
    root = Path(pictures.__file__).parents[1]
    found = {
        path.relative_to(root).as_posix(): set(
            re.findall(r"\b(?:Image|av)\.open\((?!io\.BytesIO\(frame\), formats)", path.read_text())
        )
        for path in root.rglob("*.py")
    }
    assert {name: calls for name, calls in found.items() if calls} == {
        "data/pictures.py": {"Image.open("},
        "data/containers.py": {"av.open("},
    }


def test_a_format_that_is_not_opened_is_named_beside_those_that_are(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.dds")
    with pytest.raises(DataError, match="a.dds is not a picture of a kind that is read: AVIF, .*PNG.*WEBP"):
        read_image(tmp_path / "a.dds")
    assert not {"EPS", "WMF", "IPTC", "ICNS", "FPX", "PDF", "BLP", "SPIDER"} & set(FORMATS)


@pytest.mark.parametrize(
    "raised",
    [RuntimeError("no"), NotImplementedError("no"), struct.error("no"), SyntaxError("no"), MemoryError()]
    + [
        RecursionError(),
        KeyError("no"),
        OverflowError("no"),
        AssertionError(),
        zlib.error("no"),
        OSError("no"),
    ],
)
@pytest.mark.parametrize("when", ["open", "load"])
def test_whatever_a_decoder_raises_is_one_sentence(tmp_path: Path, monkeypatch, raised, when):
    def fails(*_, **__):
        raise raised

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(*((Image, "open", fails) if when == "open" else (ImageFile.ImageFile, "load", fails)))
    with pytest.raises(DataError, match=r"picture .*a.png.*: \S") as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.webp", "a.bmp", "a.ppm", "a.gif", "a.tiff", "a.qoi", "a.jp2"]
)
def test_a_picture_that_breaks_off_is_refused(tmp_path: Path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for share in (0.9, 0.5, 0.1):
        (tmp_path / name).write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_pixels_are_counted_before_a_picture_is_decoded(tmp_path: Path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(12000, 12000, 8, 2, b""))
    (tmp_path / "a.gif").write_bytes(
        b"GIF89a" + struct.pack("<2H3xB4H2x", 10000, 9000, 44, 0, 0, 10000, 9000)
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as others do who trust their files
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    for name in ("a.png", "a.gif"):
        with pytest.raises(DataError, match=f"{name} has too many pixels; the most is 89,478,485"):
            read_image(tmp_path / name)
