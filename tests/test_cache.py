"""The cache: what is listed, verified, pruned; and cards whose files come from it."""

import dataclasses
import hashlib
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fresh import fresh

from mplug2 import hub
from mplug2.errors import CardError, DownloadError
from mplug2.hub import publishing
from mplug2.hub.cache import Cache
from mplug2.modules import vision
from mplug2.tools.main import main


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Cache:
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MPLUG2_OFFLINE", raising=False)
    return Cache.default()


def put(cache: Cache, content: bytes, name: str = "x") -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    cache.partial(sha256).parent.mkdir(parents=True, exist_ok=True)
    cache.partial(sha256).write_bytes(content)
    cache.note(sha256, {"name": name})
    cache.keep(sha256)
    return sha256


def damage(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"other")


def test_the_folder_is_the_users_word_or_the_platforms(monkeypatch, tmp_path):
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path))
    assert Cache.default().folder == tmp_path
    monkeypatch.delenv("MPLUG2_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache.default().folder == tmp_path / "xdg" / "mplug2"


def test_what_is_kept_is_found_listed_and_cannot_be_edited(cache, capsys):
    sha256 = put(cache, b"one", "vision.safetensors")
    path = cache.find(sha256, 3)
    assert path is not None and path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o444
    assert cache.find(sha256, 4) is None and cache.find("0" * 64, 3) is None
    assert main(["cache", "list"]) == 0
    said = capsys.readouterr().out
    assert "vision.safetensors" in said and sha256[:12] in said and "1 files" in said


def test_pins_are_listed_with_where_they_lie(cache, capsys):
    cache.pin("mplug2_pretrain", {"sha256": "ab" * 32, "bytes": 3})
    assert main(["cache", "list"]) == 0
    said = capsys.readouterr().out
    assert f"pinned  {'ab' * 6}  mplug2_pretrain" in said and str(cache.pin_path("mplug2_pretrain")) in said


def test_an_empty_cache_is_listed_and_pruned(cache, capsys):
    for action in ("list", "verify", "prune"):
        assert main(["cache", action]) == 0
    assert capsys.readouterr().out.count("0 files") == 3


def test_a_damaged_file_is_found_and_removed(cache, capsys):
    good, bad = put(cache, b"one", "a"), put(cache, b"two", "b")
    damage(cache.path(bad))
    assert main(["cache", "verify"]) == 1
    said = capsys.readouterr().out
    assert "a  right" in said and "b  damaged, removed" in said
    assert [entry.sha256 for entry in cache.entries()] == [good]
    assert main(["cache", "verify"]) == 0


def test_prune_removes_what_is_unused_or_broken_and_nothing_else(cache):
    old, new = put(cache, b"old"), put(cache, b"new")
    os.utime(cache.path(old), (0, 0))
    broken, busy = "a" * 64, "b" * 64
    for sha256 in (broken, busy):
        cache.partial(sha256).write_bytes(b"half")
        cache.note(sha256, {"name": "half"})
    with cache.locked(busy):
        removed = cache.prune(days=1)
    assert {entry.sha256 for entry in removed} == {old, broken}
    assert cache.path(new).is_file() and cache.partial(busy).is_file()
    assert not cache.path(old).exists() and not list(cache.folder.glob(f"*/*{broken}*"))[1:]


def test_a_file_that_is_asked_for_while_prune_waits_for_it_stays(cache, monkeypatch):
    sha256 = put(cache, b"one")
    os.utime(cache.path(sha256), (0, 0))
    real = Cache.locked

    def waited(self, wanted, *rest):
        assert cache.find(sha256, 3)  # by another process, which had the lock until now
        return real(self, wanted, *rest)

    monkeypatch.setattr(Cache, "locked", waited)
    assert cache.prune(days=1) == [] and cache.path(sha256).is_file()


def test_what_cannot_be_read_or_removed_is_our_error(cache, capsys):
    cache.path("a" * 64).mkdir(parents=True)  # as for a file of somebody else's
    assert main(["cache", "verify"]) == 2
    assert f"{cache.path('a' * 64)}: cannot be read (" in capsys.readouterr().err
    os.utime(cache.path("a" * 64), (0, 0))
    assert main(["cache", "prune"]) == 2
    assert f"the cache {cache.folder} cannot be written" in capsys.readouterr().err


def test_asking_for_a_file_keeps_it_from_being_pruned(cache):
    sha256 = put(cache, b"one")
    os.utime(cache.path(sha256), (0, 0))
    assert cache.find(sha256, 3)
    assert cache.prune(days=1) == []


def test_a_lock_is_waited_for(cache):
    order: list[str] = []

    def other() -> None:
        with cache.locked("c" * 64, lambda: order.append("waits")):
            order.append("enters")

    with cache.locked("c" * 64):
        thread = threading.Thread(target=other)
        thread.start()
        while not order:
            time.sleep(0.001)
        order.append("leaves")
    thread.join()
    assert order == ["waits", "leaves", "enters"]


# --- cards whose files are elsewhere


@pytest.fixture
def card(tmp_path):
    """A card alone in its folder, its weights at a file:// address."""
    config = vision.tiny()
    made = publishing.publish(tmp_path / "there", "v", "vision", config, fresh({"vision": config})["vision"])
    shutil.move(made.weights, tmp_path / "moved.safetensors")
    file = dataclasses.replace(made.file, urls=((tmp_path / "moved.safetensors").as_uri(),))
    made = dataclasses.replace(made, file=file)
    made.write()
    return made


def test_weights_are_downloaded_on_first_use_and_come_from_the_cache_then(card, cache, tmp_path):
    network, params = hub.compose(card)
    (tmp_path / "moved.safetensors").unlink()
    _, again = hub.compose(card.folder / "v.json")
    np.testing.assert_array_equal(params["vision"]["class_token"], again["vision"]["class_token"])
    assert [entry.name for entry in cache.entries()] == ["v.safetensors"]


def test_a_download_by_command_serves_an_offline_machine(card, cache, capsys, monkeypatch):
    monkeypatch.setenv("MPLUG2_OFFLINE", "1")
    with pytest.raises(DownloadError, match="MPLUG2_OFFLINE is set"):
        hub.load(card)
    monkeypatch.delenv("MPLUG2_OFFLINE")
    assert main(["download", str(card.folder)]) == 0
    said = capsys.readouterr()
    assert str(cache.path(card.file.sha256)) in said.out and "MB/s" in said.err
    monkeypatch.setenv("MPLUG2_OFFLINE", "1")
    hub.load(card)


def test_a_cached_file_that_was_changed_is_not_loaded(card, cache):
    hub.load(card)
    path = cache.path(card.file.sha256)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.raises(CardError, match="sha256 is .*, the card says"):
        hub.load(card)


def test_download_fetches_a_damaged_file_of_the_cache_again_and_refuses_one_beside_its_card(
    card, cache, capsys
):
    hub.load(card)
    content, path = cache.path(card.file.sha256).read_bytes(), cache.path(card.file.sha256)
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    path.chmod(0o644)
    path.write_bytes(damaged)
    for said in ("downloaded", "was here"):
        assert main(["download", str(card.folder)]) == 0
        assert capsys.readouterr().out.strip() == f"v  {path}  {said}"
        assert path.read_bytes() == content
    card.weights.write_bytes(damaged)
    assert main(["download", str(card.folder)]) == 2
    assert "sha256 is" in capsys.readouterr().err and card.weights.read_bytes() == damaged


def test_what_cannot_be_downloaded_is_one_sentence_and_status_two(card, cache, tmp_path, capsys):
    (tmp_path / "moved.safetensors").unlink()
    assert main(["download", str(card.folder)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("mplug2: error: v.safetensors (sha256") and "there is no such file" in said
    assert main(["download", "no-such-card"]) == 2


def test_a_recipes_cards_are_downloaded(cache, capsys, monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from mplug2.recipes import image_caption\n"
        "def mine():\n"
        "    return dataclasses.replace(image_caption.small(), cards={'vision': 'vision-small'})\n"
    )
    assert main(["download", f"{tmp_path}/mine.py:mine"]) == 0
    assert capsys.readouterr().out.startswith("vision-small  ")
