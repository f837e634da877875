"""A run's folder is the one that was opened, whatever it is called and wherever it goes."""

import os
import shutil
from pathlib import Path

import pytest

from mplug2 import open_folder, processes
from mplug2.errors import CheckpointError
from mplug2.open_folder import OpenFolder


def test_what_is_written_follows_a_folder_that_is_moved(tmp_path):
    (tmp_path / "here").mkdir()
    folder = OpenFolder(tmp_path / "here").open()
    assert (folder.name, folder.moved) == (tmp_path / "here", False)
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "here").mkdir()  # another one of the same name
    (folder.path / "file").write_text("kept")
    assert (tmp_path / "there" / "file").read_text() == "kept" and not any((tmp_path / "here").iterdir())
    folder.check()
    assert (folder.name, folder.moved) == (tmp_path / "there", True)
    assert folder.told(f"{folder.path}/file: full") == f"{tmp_path}/there/file: full"


def test_a_folder_that_is_removed_is_noticed_and_not_made_again(tmp_path):
    (tmp_path / "here").mkdir()
    folder = OpenFolder(tmp_path / "here").open()
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(CheckpointError, match=r"here was removed while it was trained in"):
        folder.check()
    with pytest.raises(OSError):
        (folder.path / "checkpoints").mkdir(parents=True)
    assert not (tmp_path / "here").exists()


def test_a_path_from_the_working_directory_is_told_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    folder = OpenFolder("runs").open()
    monkeypatch.chdir("/")
    assert (folder.name, folder.moved) == (Path("runs"), False)


def test_a_folder_is_closed_with_its_last_holder(tmp_path):
    folder = OpenFolder(tmp_path).open()
    number = int(folder.path.name)
    assert folder.open() is folder
    del folder
    with pytest.raises(OSError):
        os.fstat(number)


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere cannot be opened: No such file or directory"):
        OpenFolder(tmp_path / "nowhere").open()


def test_all_processes_open_it_by_the_same_number(tmp_path, monkeypatch):
    folder, other = OpenFolder(tmp_path), OpenFolder(tmp_path).open()
    theirs = int(other.path.name) + 300  # a number that nobody has
    monkeypatch.setattr(
        processes, "exchange", lambda mine: [mine, max(mine, theirs) if isinstance(mine, int) else mine]
    )
    assert folder.open().path.name == str(theirs)
    assert os.path.samestat(os.stat(folder.path), os.stat(tmp_path))


def test_where_the_system_knows_no_way_around_names_a_plain_one_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(open_folder, "DESCRIPTORS", tmp_path / "nothing")
    for name in ("plain-1.0", "lr[0.1]"):
        (tmp_path / name).mkdir()
    plain = OpenFolder(tmp_path / "plain-1.0").open()
    assert plain.path == tmp_path / "plain-1.0"
    with pytest.raises(CheckpointError, match=r"lr\[0.1\]: this system cannot keep a run"):
        _ = OpenFolder(tmp_path / "lr[0.1]").open().path
    (tmp_path / "plain-1.0").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="was moved away while it was trained in"):
        plain.check()
