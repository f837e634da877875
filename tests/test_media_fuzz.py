"""Damaged pictures and videos by the thousand: an array or one of our refusals, in bounded memory, and
nothing is started, fetched or written. In a child process each, so that a decoder that crashes is reported
with the file that it crashed on."""

import io
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_containers import KINDS, film

from mplug2.data.clips import read_video
from mplug2.data.pictures import FORMATS, read_image
from mplug2.errors import Mplug2Error

ROOM = 4 << 30
"""Bytes of address space that a child has at most."""

CHILD = """
import sys, warnings
sys.path[:0] = [{tests!r}]
warnings.simplefilter("ignore")
import test_media_fuzz as fuzz
fuzz.child({what!r}, {seed}, {count}, {folder!r})
"""

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.")


def watched(folder: str, heard: list[str]) -> None:
    """Keeps what this process does and reading a file does not need: programs, connections, written files."""

    def hook(event: str, words: tuple) -> None:
        if event.startswith(FORBIDDEN) and event != "socket.gethostname":
            heard.append(f"{event} {words!r:.200}")
        if event == "open" and isinstance(words[0], str):
            flags = words[2] if isinstance(words[2], int) else 0
            written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if written and not words[0].startswith((folder, "/dev/null")):
                heard.append(f"wrote {words[0]}")

    sys.addaudithook(hook)


def originals(what: str) -> list[tuple[str, bytes]]:
    return list(pictures().items()) if what == "pictures" else list(videos().items())


def pictures() -> dict[str, bytes]:
    """Small pictures of every format that Pillow writes, of those that are opened and others, in every mode
    that it holds: turned, packed, moving."""
    Image.init()
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 4), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"save_all": True, "append_images": [Image.fromarray(noise[::-1].copy())]}
    found: dict[bytes, str] = {}
    for kind in Image.SAVE:
        for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"):
            for options in ({}, {"exif": exif}, {"compression": "tiff_lzw"}, more):
                file = io.BytesIO()
                try:
                    of_mode(Image.fromarray(noise), mode).save(file, kind, **options)
                except Exception:  # a format that does not hold this mode
                    continue
                found.setdefault(file.getvalue(), f"{kind}-{mode}-{len(found)}")
    return {name: content for content, name in found.items()}


def of_mode(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    through = {"LAB": "RGB", "PA": "LA", "I": "L", "F": "L"}.get(mode)
    return (picture.convert(through) if through else picture).convert(mode)


def videos() -> dict[str, bytes]:
    return {name: film(name) for name in KINDS}


def damaged(content: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """Some of its bytes changed, cut off, put twice, or those of another file put in."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, min(len(data), draw.choice([64, 512, len(data) or 1]))))
        way = draw.randrange(7)
        if way == 0:
            del data[draw.randrange(len(data) + 1) :]
        elif way == 1:
            del data[place : place + draw.randint(1, 20)]
        elif way == 2:
            data[place:place] = data[place : place + draw.randint(1, 40)]
        elif way == 3:
            other = draw.choice(others)
            start = draw.randrange(len(other))
            data[place:place] = other[start : start + draw.randint(1, 200)]
        elif way == 4:
            data[place : place + 4] = draw.choice(
                [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]
            )
        else:
            for at in range(place, min(len(data), place + draw.randint(1, 6))):
                data[at] = draw.randrange(256) if way == 5 else data[at] ^ 1 << draw.randrange(8)
    return bytes(data)


def child(what: str, seed: int, count: int, folder: str) -> None:
    """Reads `count` damaged files; the last one stays in `folder`, and what happened is printed."""
    path, heard = Path(folder) / "damaged", []
    begun = originals(what)
    contents = [content for _, content in begun]
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))
    watched(folder, heard)
    kinds = sorted({name.partition("-")[0] for name, _ in begun})
    told = {"read": 0, "refused": 0, "wrong": [], "slowest": [0.0, ""]}
    for number in range(count):
        name, content = begun[number % len(begun)]
        path.write_bytes(damaged(content, contents, random.Random(f"{seed}/{number}")))
        start = time.monotonic()
        try:
            shown = np.asarray(read_image(path)) if what == "pictures" else read_video(path, 3)
            assert shown.dtype == np.uint8 and shown.shape[-1] == 3
            told["read"] += 1
        except Mplug2Error:
            told["refused"] += 1
        except BaseException as error:
            told["wrong"].append(f"{number} {name}: {type(error).__name__}: {error}")
        told["slowest"] = max(told["slowest"], [round(time.monotonic() - start, 2), f"{number} {name}"])
    kept = {entry.name for entry in Path(folder).iterdir()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps({**told, "heard": heard, "kept": sorted(kept), "peak": peak, "kinds": kinds}))


def run(what: str, count: int, folder: Path, seed: int = 20) -> dict:
    script = CHILD.format(
        tests=str(Path(__file__).parent), what=what, seed=seed, count=count, folder=str(folder)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, (
        f"exit {done.returncode}; the file is {folder}/damaged\n{done.stderr[-2000:]}"
    )
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {told}")
    return told


def check(told: dict, count: int) -> None:
    assert not told["wrong"] and not told["heard"] and told["kept"] == ["damaged"]
    assert told["read"] + told["refused"] == count and told["read"] and told["refused"]


@pytest.mark.slow
def test_20000_damaged_pictures_are_read_or_refused(tmp_path: Path):
    told = run("pictures", 20_000, tmp_path)
    check(told, 20_000)
    assert {*told["kinds"]} >= {*FORMATS, "EPS", "DDS", "BLP", "SPIDER"} - {"AVIF"}
    assert told["peak"] < 2500


@pytest.mark.slow
def test_3000_damaged_videos_are_read_or_refused(tmp_path: Path):
    told = run("videos", 3000, tmp_path)
    check(told, 3000)
    assert told["peak"] < 2000
