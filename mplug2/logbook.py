"""The logbook of a run: metrics.jsonl, TensorBoard events (without TensorFlow), and progress on the screen.

A line of metrics.jsonl is one JSON object: `step`, the metrics of the window that ends there,
`examples_per_second`, `seconds` since the training step was compiled. On a terminal progress is a bar,
elsewhere a plain line now and then.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from mplug2 import files
from mplug2.console import Console

METRICS = "metrics.jsonl"
PLAIN_SECONDS = 10.0  # between plain lines


class Logbook:
    """Opened at `step`: what an earlier session logged later than that is taken back, since it will be done
    again."""

    def __init__(
        self, folder: Path, *, name: str, step: int, steps: int, examples: int, console: Console | None = None
    ):
        self.steps, self.examples = steps, examples
        path = folder / METRICS
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._console = console or Console()
        self._bar = Progress(
            TextColumn(name, markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[said]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, completed=step, said="compiling")
        self._bar.start()
        self._name, self._printed = name, -math.inf
        self.ready(step)

    def ready(self, step: int) -> None:
        """The clock starts here: what came before was compilation."""
        self._began = self._last = time.perf_counter()
        self._last_step = step

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line: `metrics` of the window that ends with `step`."""
        now = time.perf_counter()
        rate = (step - self._last_step) / max(now - self._last, 1e-9)
        self._last, self._last_step = now, step
        line = {
            "step": step,
            **metrics,
            "examples_per_second": round(rate * self.examples, 2),
            "seconds": round(now - self._began, 3),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for metric, value in line.items():
            if metric != "step":
                self._events.add_scalar(metric, value, step)
        left = (self.steps - step) / rate if rate else math.inf
        said = f"loss {metrics['loss']:.4f}  {rate * self.examples:.0f} examples/s  {clock(left)} left"
        self._bar.update(self._task, completed=step, said=said)
        if not self._console.is_terminal and (now - self._printed > PLAIN_SECONDS or step >= self.steps):
            self._printed = now
            self.say(f"{self._name}: step {step}/{self.steps}  {said}")

    def judge(self, step: int, name: str, score: float) -> None:
        """The score of a checkpoint."""
        self._events.add_scalar(f"checkpoint/{name}", score, step)
        self.say(f"{self._name}: step {step}/{self.steps}  checkpoint: {name} {score:.4f}")

    def say(self, sentence: str) -> None:
        """A line above the bar."""
        self._console.print(sentence, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
        self._file.close()
        self._events.close()

    def __enter__(self) -> "Logbook":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Silence:
    """The logbook of a process whose run another one logs."""

    def ready(self, step: int) -> None: ...

    def advance(self, step: int) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def judge(self, step: int, name: str, score: float) -> None: ...

    def say(self, sentence: str) -> None: ...

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None: ...


def read_metrics(folder: Path | str) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl; a last line that was cut off by a crash is left out."""
    path, lines = Path(folder) / METRICS, []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def clock(seconds: float) -> str:
    """`75 -> "1:15"`, `3700 -> "1:01:40"`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
