"""A mark is made by one user, and is of what it was made of."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from mplug2.errors import CheckpointError
from mplug2.trust import is_ours, mark

FACTS = {"recipe": "mine.py:mine", "kept": {"mine.py": "ab"}}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_mark_is_of_these_facts_and_of_this_user(home, monkeypatch, tmp_path):
    made = mark(FACTS)
    assert is_ours(FACTS, made) and mark(FACTS) == made
    assert not is_ours({**FACTS, "kept": {"mine.py": "cd"}}, made)
    assert not is_ours(FACTS, "") and not is_ours(FACTS, made[:-1] + "x") and not is_ours(FACTS, "é")
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "another"))
    assert not is_ours(FACTS, made)
    assert not (tmp_path / "another").exists()  # to look makes nothing
    assert mark(FACTS) != made


def test_the_secret_is_its_owners_alone(home):
    mark(FACTS)
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert [path.name for path in home.iterdir()] == ["key"]


def test_of_many_who_make_the_secret_at_once_all_have_one(home):
    ready = Barrier(8)

    def one(_: int) -> str:
        ready.wait()
        return mark(FACTS)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(one, range(8)))) == 1
    assert [path.name for path in home.iterdir()] == ["key"]


def test_a_secret_that_was_cut_short_is_made_anew(home):
    home.mkdir()
    (home / "key").write_bytes(b"short")
    assert is_ours(FACTS, mark(FACTS))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_secret_that_others_can_read_or_write_marks_nothing_and_is_made_anew(mode, home):
    known = mark(FACTS)
    (home / "key").chmod(mode)
    assert not is_ours(FACTS, known)
    made = mark(FACTS)
    assert made != known and is_ours(FACTS, made) and not is_ours(FACTS, known)
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600


def test_another_users_secret_in_a_shared_folder_marks_nothing_and_stays_theirs(home, monkeypatch):
    theirs = mark(FACTS)
    other = os.geteuid() + 1
    monkeypatch.setattr("os.geteuid", lambda: other)
    assert not is_ours(FACTS, theirs)
    with pytest.raises(CheckpointError, match="another user's lies there.*MPLUG2_CACHE names another"):
        mark(FACTS)
    monkeypatch.undo()
    monkeypatch.setenv("MPLUG2_CACHE", str(home))
    assert is_ours(FACTS, theirs) and [path.name for path in home.iterdir()] == ["key"]


def test_where_no_secret_can_be_kept_is_said(home, monkeypatch):
    home.write_text("a file")
    monkeypatch.setenv("MPLUG2_CACHE", str(home / "below"))
    with pytest.raises(CheckpointError, match="cannot be kept at .*key.*MPLUG2_CACHE names another"):
        mark(FACTS)
