"""A publication is one transaction: whatever happens, its folder opens as the old one or the new one, whole.

The default run cuts it off at each of its calls. Two hundred races, kills and full disks:
make test-slow TEST_ARGS='-k two_hundred -s'
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import publishers
import pytest
from publishers import MODULES, files_of, full, opened, publish, starved

from mplug2 import files, hub
from mplug2.errors import CardError
from mplug2.hub import publishing, readme, weights
from mplug2.hub.card import COMMITTED
from mplug2.hub.publication import check_free, publication
from mplug2.network import nested
from mplug2.report import Report
from mplug2.tools.main import main


def test_what_is_published_anew_replaces_the_old_and_leaves_nothing_of_it(tmp_path):
    for number in (1, 2, 3, 3):
        publish(tmp_path / "new" / "folder", number)
        assert opened(tmp_path / "new" / "folder") == number
        there, named = files_of(tmp_path / "new" / "folder")
        assert there == named


def test_a_full_disk_at_any_call_leaves_the_old_publication_or_the_new_one(tmp_path):
    publish(tmp_path, 0)
    _, (_, calls) = starved(tmp_path, 1, lambda used: False)
    assert calls > 20
    before = 1
    for call in range(1, calls + 1):
        there = files_of(tmp_path)[0]
        through, _ = starved(tmp_path, call + 1, lambda used, last=call: used[1] == last)
        found = opened(tmp_path)
        assert found in (before, call + 1) and (found == call + 1 or not through)
        if found == before:
            assert files_of(tmp_path)[0] <= there  # nothing half is left
        before = found


def test_a_full_disk_leaves_no_folder_that_was_not_there(tmp_path):
    for call in (2, 5, 15):
        starved(tmp_path / "new", 1, lambda used, last=call: used[1] >= last)
        assert not (tmp_path / "new").exists()


def test_a_process_killed_at_any_call_leaves_the_old_publication_or_the_new_one(tmp_path):
    """What a kill would leave is what is there at each call."""
    publish(tmp_path / "cards", 1)
    copies: list[Path] = []

    def copy(used: list[int]) -> bool:
        copies.append(tmp_path / f"killed-{len(copies)}")
        subprocess.run(["cp", "-r", str(tmp_path / "cards"), str(copies[-1])], check=True)
        return False

    with full(copy):
        publish(tmp_path / "cards", 2)
    found = [opened(killed) for killed in copies]
    assert found == sorted(found) and set(found) == {1, 2}  # one instant parts the old from the new
    waiting = [killed for killed in copies if (killed / COMMITTED).is_dir() and any(killed.glob(".p*/*"))]
    assert waiting
    for killed in (copies[len(copies) // 2], waiting[0], waiting[-1]):
        publish(killed, 3)
        there, named = files_of(killed)
        assert opened(killed) == 3 and there - named <= {"words.txt"}


@pytest.mark.parametrize("before", [True, False])
def test_an_interruption_at_the_instant_of_the_commit_takes_no_weights_away(before, tmp_path, monkeypatch):
    publish(tmp_path, 1)
    rename = os.rename

    def interrupted(source, place):
        if Path(place).name == COMMITTED and before:
            raise KeyboardInterrupt
        rename(source, place)
        if Path(place).name == COMMITTED:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 2)
    assert opened(tmp_path) == (1 if before else 2)


def test_of_two_that_publish_at_once_one_is_there_whole(tmp_path):
    publish(tmp_path, 0)
    threads = [threading.Thread(target=publish, args=(tmp_path, number)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert opened(tmp_path) in (0, 1, 2)
    assert opened(tmp_path) in (1, 2)
    there, named = files_of(tmp_path)
    assert there == named


@pytest.mark.slow
@pytest.mark.parametrize("what", ["races", "kills", "disks"])
def test_two_hundred_leave_the_old_publication_or_the_new_one(what, tmp_path):
    program = [sys.executable, publishers.__file__, what, "200", "1", str(tmp_path / "cards")]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    print(what, done.stdout)
    counts = json.loads(done.stdout)
    assert counts.get("old", counts.get("first")) and counts.get("new", counts.get("second"))


# --- What is there already


def one(folder: Path, name: str = "mine", value: float = 1.0, config=MODULES["contrastive"], **more) -> None:
    module = next(name for name, kind in MODULES.items() if type(kind) is type(config))
    shapes = hub.gate.shapes(config, module)
    params = nested({tuple(key.split(".")): np.full(s.shape, value, np.float32) for key, s in shapes.items()})
    with publication(folder, **{"page": "", **more}) as new:
        publishing.write(new.staged, name, module, config, params)


def value_of(place: Path) -> float:
    return float(next(iter(hub.stored(hub.find(place)).values())).ravel()[0])


def test_what_is_there_is_named_and_kept_until_it_is_to_be_replaced(tmp_path):
    one(tmp_path)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CardError, match=r"holds mine.json already: .* or --overwrite"):
        one(tmp_path, value=2.0, overwrite=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    one(tmp_path, "other", overwrite=False)  # beside it
    assert {card.stem for card in tmp_path.glob("*.json")} == {"mine", "other"}
    assert (
        "## mine" in (tmp_path / readme.NAME).read_text()
        and "## other" in (tmp_path / readme.NAME).read_text()
    )
    one(tmp_path, value=2.0, overwrite=True)
    assert value_of(tmp_path / "mine.json") == 2.0


def test_a_page_that_somebody_wrote_is_kept_until_it_is_to_be_replaced(tmp_path):
    (tmp_path / readme.NAME).write_text("my notes")
    with pytest.raises(CardError, match="holds README.md, which is not the page of its cards"):
        one(tmp_path, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == [readme.NAME]
    one(tmp_path)
    (tmp_path / readme.NAME).write_text((tmp_path / readme.NAME).read_text() + "\nand mine")
    with pytest.raises(CardError, match="README.md"):
        check_free(tmp_path, ["other"], "")


def test_a_file_that_is_no_cards_is_never_replaced(tmp_path):
    for name in ("mine.safetensors", "notes.txt"):
        (tmp_path / name).write_text("a user's")
    one(tmp_path)
    one(tmp_path, value=2.0)
    assert all((tmp_path / name).read_text() == "a user's" for name in ("mine.safetensors", "notes.txt"))
    assert value_of(tmp_path) == 2.0


def test_a_damaged_card_can_be_replaced_and_costs_no_other_its_weights(tmp_path):
    one(tmp_path)
    one(tmp_path, "other")
    (tmp_path / "mine.json").write_text("{")
    one(tmp_path, page=None)
    assert {card.name for card in hub.read_cards(tmp_path)} == {"mine", "other"}
    (tmp_path / "other.json").write_text("{")
    one(tmp_path, value=3.0, page=None)
    assert (tmp_path / "other.safetensors").is_file()


def test_a_folder_in_the_place_of_a_card_is_refused_before_anything_is_there(tmp_path):
    (tmp_path / "mine.json").mkdir()
    with pytest.raises(CardError, match="mine.json: cannot be written .Is a directory"):
        one(tmp_path, page=None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


# --- What is used is what was verified


ALIGNED = dataclasses.replace(MODULES["vision_classifier"], width=64, classes=64)


@pytest.fixture
def card(tmp_path):
    """Of float32 arrays that JAX uses where they lie, wherever that is."""
    one(tmp_path / "cards", config=ALIGNED)
    return hub.find(tmp_path / "cards")


def spoil(path: Path) -> None:
    """As `cp` and `rsync --inplace` write, of another file that is shorter. (The last page stays: who reads
    behind the end gets a bus error, which would end the tests.)"""
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
        file.truncate(path.stat().st_size - 100)


def test_what_was_opened_stays_what_it_was_when_its_file_is_written_over_or_cut_short(card):
    opened = hub.load(card)[1], hub.compose(card)[1][card.module]
    spoil(card.weights)
    for params in opened:
        assert all((np.asarray(array) == 1.0).all() for array in hub.flat(params).values())


def test_what_was_opened_stays_what_it_was_when_it_is_published_anew(card):
    arrays, mapped = hub.load(card)[1], hub.stored(card)
    one(card.folder, value=2.0, config=ALIGNED)
    assert all((np.asarray(array) == 1.0).all() for array in hub.flat(arrays).values())
    assert all(
        (array == 1.0).all() for array in mapped.values()
    )  # though mapped: no file is written in place


def test_a_card_whose_file_is_gone_since_it_was_published_anew_says_so(card):
    one(card.folder, value=2.0, config=ALIGNED)
    with pytest.raises(hub.Republished, match="mine was published anew while it was opened"):
        hub.load(card)


def test_files_of_the_cache_are_mapped_since_nobody_may_write_into_them(card, cache, monkeypatch):
    monkeypatch.setenv("MPLUG2_CACHE", str(cache.folder))
    cache.partial(card.file.sha256).parent.mkdir(parents=True)
    shutil.copyfile(card.weights, cache.partial(card.file.sha256))
    path = cache.keep(card.file.sha256)
    card.weights.unlink()
    assert path.stat().st_mode & 0o777 == 0o444
    monkeypatch.setattr(weights, "read_own", None)
    assert hub.load(card)[1]


def test_a_file_that_is_written_into_while_it_is_read_is_refused(tmp_path):
    weights.write(tmp_path / "w", {"a": np.ones(64, np.float32)})
    with pytest.raises(CardError, match="w: was changed while it was read"):
        with weights.unchanged([tmp_path / "w"]):
            weights.read(tmp_path / "w")
            with (tmp_path / "w").open("r+b") as file:
                file.write(b"x")


# --- Files


def test_a_full_disk_is_told_with_the_file_that_did_not_fit(tmp_path):
    with full(lambda used: used[0] > 3), pytest.raises(OSError) as told:
        files.write_text(tmp_path / "report.json", "long")
    assert told.value.filename == str(tmp_path / "report.json")
    assert told.value.strerror == "No space left on device" and not list(tmp_path.iterdir())


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(OSError, match="expected a regular file"):
            files.write_text(path, "x")
        assert not path.is_file()


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match=r"mine/a"), files.new_folder(tmp_path / "mine") as fresh:
        with full(lambda used: used[0] > 3):
            files.write_text(fresh / "a", "long")
    assert not list(tmp_path.iterdir())
    with files.new_folder(tmp_path / "mine") as fresh:
        files.write_text(fresh / "a", "x")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a"]
    with pytest.raises(FileExistsError), files.new_folder(tmp_path / "mine"):
        pass


def test_the_folder_that_one_stands_in_is_filled_and_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with files.new_folder(Path()) as fresh:
        files.write_text(fresh / "a", "x")
    assert os.listdir() == ["a"] and os.stat(".").st_ino == tmp_path.stat().st_ino


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device", "link to nothing"])
def test_only_regular_files_are_read_and_none_is_waited_for(kind, card, tmp_path):
    path = card.folder / "x.json"
    {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "link to nothing": lambda path: path.symlink_to(tmp_path / "nothing"),
    }[kind](path)
    for read in (hub.cards, lambda folder: hub.find(folder / "x.json")):
        with pytest.raises(CardError, match="x.json"):
            read(card.folder)


# --- No command writes a published or cached file in place


_watched: list[Path] = []
_in_place: list[str] = []


def _audit(event: str, words: tuple) -> None:
    if not _watched or event not in ("open", "os.truncate") or not isinstance(words[0], str | Path):
        return
    path = Path(words[0])
    writes = event == "os.truncate" or (words[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC)
    if writes and path.is_file() and any(path.is_relative_to(root) for root in _watched):
        _in_place.append(f"{event} {path}")


@pytest.fixture
def watch():
    """Notes every opening of a file that is there, below the given folders, to be written into."""
    if not hasattr(sys, "_mplug2_audited"):
        sys.addaudithook(_audit)
        sys._mplug2_audited = True  # type: ignore[attr-defined]  # a hook stays for good
    _in_place.clear()
    yield _watched.extend
    _watched.clear()
    assert _in_place == []


def test_the_watch_sees_what_is_written_in_place(tmp_path, watch):
    (tmp_path / "x").write_text("1")
    watch([tmp_path])
    (tmp_path / "x").write_text("2")
    os.truncate(tmp_path / "x", 0)
    assert len(_in_place) == 2
    _in_place.clear()


def test_no_command_writes_into_a_file_that_is_there(tmp_path, watch, cache, monkeypatch):
    """What can be written twice is; the others refuse what is there."""
    monkeypatch.setenv("MPLUG2_CACHE", str(cache.folder))
    one(tmp_path / "a", value=1.0)
    one(tmp_path / "b", value=2.0)
    watch([tmp_path])
    for _ in range(2):
        one(tmp_path / "a")
        one(tmp_path / "b", value=2.0)
        lock = ["lock", "image_qa.tiny", "--out", str(tmp_path / "lock.json")]
        assert main(lock) == 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for command in (
            f"merge soup {tmp_path}/a {tmp_path}/b --out {tmp_path}/out/merged",
            f"compose --contrastive {tmp_path}/a --out {tmp_path}/out/composed",
            f"bundle image_classify.small --out {tmp_path}/out/b.tar",
            f"bundle {tmp_path}/out/b.tar --out {tmp_path}/out/bundle",
            f"download {tmp_path}/a",
            "cache list",
            "cache verify",
            "cache prune --days 0",
        ):
            assert main(command.split()) == 0, command
    Report(title="t", about=[], scores={}, curves={}).write(tmp_path / "report.html")
    Report(title="t", about=[], scores={}, curves={}).write(tmp_path / "report.html")


def test_what_is_there_is_not_written_over(tmp_path, capsys):
    one(tmp_path / "a")
    for out in ("full", "file"):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "x").write_text("x")
        (tmp_path / "file").write_text("x")
        for command in (
            f"merge soup {tmp_path}/a {tmp_path}/a --out {tmp_path}/{out}",
            f"compose --contrastive {tmp_path}/a --out {tmp_path}/{out}",
            f"bundle image_classify.small --out {tmp_path}/{out}",
        ):
            assert main(command.split()) == 2, command
            assert f"{out} is there already" in capsys.readouterr().err
