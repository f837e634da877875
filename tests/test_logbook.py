import errno
import io
import json
import os
import resource
import signal

import pytest
from tensorboardX.record_writer import RecordWriter

from mplug2 import files
from mplug2.console import Console
from mplug2.errors import CheckpointError
from mplug2.logbook import Logbook, clock, read_metrics


def kept(folder, *, step: int = 0, terminal: bool = False) -> tuple[Logbook, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=160, color_system=None)
    return Logbook(folder, name="toy", step=step, steps=10, examples=8, console=console), screen


def test_a_line_has_the_step_the_metrics_and_the_clock(tmp_path):
    logbook, _ = kept(tmp_path)
    with logbook:
        logbook.log(2, {"loss": 0.5, "loss/caption": 0.25})
    (line,) = read_metrics(tmp_path)
    assert (line["step"], line["loss"], line["loss/caption"]) == (2, 0.5, 0.25)
    assert line["examples_per_second"] > 0 and line["seconds"] >= 0


def test_tensorboard_gets_every_metric_without_tensorflow(tmp_path):
    logbook, _ = kept(tmp_path)
    with logbook:
        logbook.log(2, {"loss": 0.5, "loss/caption": 0.25})
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    written = events.read_bytes()
    assert all(tag in written for tag in (b"loss/caption", b"examples_per_second"))


def test_what_was_logged_after_the_step_that_is_continued_is_taken_back(tmp_path):
    logbook, _ = kept(tmp_path)
    with logbook:
        for step in (2, 4, 6):
            logbook.log(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # cut off by a crash
    logbook, _ = kept(tmp_path, step=5)
    with logbook:
        logbook.log(6, {"loss": 60.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 2.0), (4, 4.0), (6, 60.0)]


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(tmp_path):
    logbook, screen = kept(tmp_path, terminal=True)
    with logbook:
        logbook.log(5, {"loss": 1.25})
        logbook.advance(5)
    shown = screen.getvalue()
    assert all(part in shown for part in ("5/10", "loss 1.2500", "examples/s", "left"))


def test_elsewhere_a_plain_line_is_printed_now_and_then_and_at_the_end(tmp_path):
    logbook, screen = kept(tmp_path)
    with logbook:
        for step in range(1, 11):
            logbook.log(step, {"loss": 1.0})
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("toy: step 1/10  loss 1.0000")
    assert lines[1].startswith("toy: step 10/10")


def test_time_left_reads_like_a_clock():
    assert [clock(5), clock(75), clock(3700), clock(float("inf"))] == ["0:05", "1:15", "1:01:40", "?"]


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": 0.5}).encode() + b"\n" for step in steps)


STRANGE = [
    b"5\n",
    b"null\n",
    b"\xff\xfe\n",
    b'{"loss": 1.0}\n',
    b'{"step": "3"}\n',
    b"[" * 50_000 + b"\n",
    b"\0\0\n",
]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda strange: repr(strange[:12]))
def test_a_line_that_is_none_of_ours_stays_and_so_does_what_follows_it(strange, tmp_path):
    before = lines(1, 2) + strange + lines(3, 3, 4)
    (tmp_path / "metrics.jsonl").write_bytes(before)
    with pytest.warns(UserWarning, match=r"metrics.jsonl: line 3: not JSON objects with a step; they stay"):
        logbook, _ = kept(tmp_path, step=9)
    with logbook:
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        logbook.log(10, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 3, 4, 10]


@pytest.mark.parametrize("cut", [b'{"step": 5, "lo', b"\0\0\0", b"5", b"\xff", b'{"step": 9, "loss": 0.5}'])
def test_a_last_line_that_was_cut_off_is_taken_back_and_nothing_else(cut, tmp_path):
    before = b'{"loss": 0.25,   "step": 1}\n' + lines(2)
    (tmp_path / "metrics.jsonl").write_bytes(before + cut)
    kept(tmp_path, step=5)[0].close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_what_has_nothing_to_be_taken_back_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "replacing", lambda path: pytest.fail("written again"))
    (tmp_path / "metrics.jsonl").write_bytes(lines(1, 2))
    kept(tmp_path, step=2)[0].close()
    (tmp_path / "metrics.jsonl").write_bytes(lines(1) + lines(2)[:-1])
    with pytest.raises(pytest.fail.Exception):  # a last line that only lacks its end gets it
        kept(tmp_path, step=2)


def test_a_log_that_is_no_file_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="metrics.jsonl cannot be read or written: it is not a file"):
        kept(tmp_path)
    with pytest.raises(CheckpointError, match="it is not a file"):
        read_metrics(tmp_path)


def test_a_disk_that_fills_within_a_line_leaves_whole_lines_and_the_line_can_come_later(tmp_path):
    logbook, _ = kept(tmp_path)
    with logbook:
        logbook.log(1, {"loss": 0.5})
        whole = (tmp_path / "metrics.jsonl").read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
            with pytest.raises(CheckpointError, match=rf"{tmp_path}/metrics.jsonl .*: File too large"):
                logbook.log(2, {"loss": 0.25})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        logbook.log(2, {"loss": 0.25})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_whatever_keeps_a_line_from_being_written_is_told_with_the_file(number, tmp_path, monkeypatch):
    logbook, _ = kept(tmp_path)
    write = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 40:
            raise OSError(number, os.strerror(number))
        return write(file, data[:40])

    with logbook, monkeypatch.context() as patched:
        patched.setattr(os, "write", half)
        said = f"{tmp_path}/metrics.jsonl cannot be read or written: {os.strerror(number)}"
        with pytest.raises(CheckpointError, match=said):
            logbook.log(1, {"loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_log_that_is_moved_away_is_told_and_goes_on_in_a_new_file(tmp_path):
    logbook, _ = kept(tmp_path)
    with logbook:
        logbook.log(1, {"loss": 0.5})
        (tmp_path / "metrics.jsonl").rename(tmp_path / "old.jsonl")
        with pytest.warns(UserWarning, match="metrics.jsonl is gone: a new one begins with step 2"):
            logbook.log(2, {"loss": 0.5})
        logbook.log(3, {"loss": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 3]


def test_without_room_for_tensorboard_it_is_told_once_and_the_log_goes_on(tmp_path, monkeypatch):
    def full(self: RecordWriter, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    logbook, screen = kept(tmp_path)
    with logbook:
        for step in range(1, 50):
            logbook.log(step, {"loss": 0.5})
    told = f"{tmp_path}/tensorboard: No space left on device; training goes on without TensorBoard"
    assert screen.getvalue().count(told) == 1
    assert len(read_metrics(tmp_path)) == 49
