import io
import json

from mplug2.console import Console
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
