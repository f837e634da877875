"""TensorBoard's events never hold up the work."""

import errno
import threading

import pytest
from tensorboardX.record_writer import RecordWriter

from mplug2 import events
from mplug2.events import Events


def test_every_value_is_written(tmp_path):
    written = Events(tmp_path / "tensorboard", 1)
    for step in range(1, 300):
        written.add(step, {"loss": 0.5, "loss/caption": 0.25})
    written.close()
    (file,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    data = file.read_bytes()
    assert data.count(b"loss/caption") == 299 and data.count(b"brain.Event:2") == 1
    assert written.failure == ""


def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def a_file(monkeypatch, tmp_path):
    (tmp_path / "tensorboard").write_text("")


def a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(RecordWriter, "write", full)


def a_bug(monkeypatch, tmp_path):
    monkeypatch.setattr(RecordWriter, "flush", lambda self: 1 / 0)


@pytest.mark.parametrize("trouble", [a_file, a_full_disk, a_bug], ids=lambda trouble: trouble.__name__)
def test_a_file_that_cannot_be_written_is_given_up(trouble, monkeypatch, tmp_path):
    trouble(monkeypatch, tmp_path)
    written = Events(tmp_path / "tensorboard", 1)
    for step in range(1, 2000):
        written.add(step, {"loss": 0.5})
    written.close()
    assert written.failure in (
        "File exists",
        "No space left on device",
        "ZeroDivisionError: division by zero",
    )


def test_a_disk_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path):
    answer = threading.Event()
    monkeypatch.setattr(RecordWriter, "write", lambda self, data: answer.wait(60))
    monkeypatch.setattr(events, "ROOM", 10)
    monkeypatch.setattr(events, "PATIENCE", 0.05)
    written = Events(tmp_path / "tensorboard", 1)
    for step in range(1, 20):
        written.add(step, {"loss": 0.5})
    written.close()
    assert written.failure == "its disk does not answer"
    answer.set()
