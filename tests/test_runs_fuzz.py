"""A seeded fuzz of run folders: whatever became of a run's files, opening it gives our own errors or the run,
and runs no code of the folder."""

import json
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from recipe_files import write
from test_runs import begun

from mplug2.errors import Mplug2Error
from mplug2.hub import lock
from mplug2.logbook import METRICS, read_metrics
from mplug2.opening import look
from mplug2.recipes.runs import recipe_of
from mplug2.run import FILE, read_run
from mplug2.settings import settings

STRANGE: list[Any] = [
    None,
    True,
    -1,
    1e308,
    "",
    "x" * 999,
    "evil.py:f",
    "../..",
    "\x00",
    [],
    {},
    [[]],
    {"": 0},
]


def changed(value: Any, draw: random.Random) -> Any:
    """A JSON value of which one part is another."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.9:
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        other = dict(value) if isinstance(value, dict) else list(value)
        way = draw.randrange(8)
        if way == 0:
            del other[key]
        elif way == 1 and isinstance(other, dict):
            other[draw.choice(["type", "", "recipe", "x"])] = other.pop(key)
        else:
            other[key] = changed(other[key], draw)
        return other
    return draw.choice(STRANGE)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Another value somewhere in the JSON, or other bytes."""
    if draw.random() < 0.7:
        try:
            return json.dumps(changed(json.loads(content), draw)).encode()
        except ValueError:
            pass
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        way = draw.randrange(4)
        if way == 0:
            del data[place:]
        elif way == 1:
            data[place : place + draw.randint(1, 9)] = draw.randbytes(draw.randint(0, 9))
        elif way == 2:
            data[place:place] = draw.choice(
                [b"\n", b"\xff", b"\x00", b"5\n", b"null\n", b"[" * 5000, b"\xef\xbb\xbf"]
            )
        else:
            data += data[place:]
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["of the zoo", "of a recipe file"])
def test_a_damaged_run_folder_is_a_sentence_or_the_run_and_runs_no_code(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a file of that name would be found
    name = "image_caption.tiny" if kind == "of the zoo" else f"{write(tmp_path / 'src')}:mine"
    run = begun(tmp_path, name)
    (run / METRICS).write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(9)))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef f(): return None\n")
    whole = settings(recipe_of(read_run(run)), operation=True)
    files = {file: file.read_bytes() for file in sorted(run.rglob("*")) if file.is_file()}
    assert {run / FILE, run / lock.FILE, run / METRICS} <= set(files)
    started: list[str] = []
    sys.addaudithook(
        lambda event, _: (
            started.append(event) if event in ("os.system", "subprocess.Popen", "os.exec") else None
        )
    )
    opened = refused = 0
    for number in range(3000):
        draw = random.Random(f"{kind}/{number}")
        file = draw.choice(list(files))
        file.write_bytes(damaged(files[file], draw))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                look(str(run))
                read_metrics(run)
                told = settings(recipe_of(read_run(run)), operation=True)
                opened += 1
                if file.suffix == ".py":  # what is not what was kept is not run
                    assert told == whole
            except Mplug2Error as error:
                refused += 1
                assert str(error)
        file.write_bytes(files[file])
    assert opened > 100 and refused > 100, (opened, refused)
    assert not started and not Path(tmp_path / "ran").exists()
