"""Training: `train(recipe, run_dir)` begins a run, or continues it exactly where its newest checkpoint
stands.

The loop hands batches to the compiled step (mplug2.step) and never waits for a step that was just begun:
metrics stay on the devices until a line of the log is due. Ctrl-C, SIGTERM or SIGHUP (mplug2.interruption)
finishes the step, saves and returns; a second one, later than a moment, aborts. Of several processes
(mplug2.processes) all stop after the same step, whichever was told to; there a second SIGTERM changes
nothing.

The run's folder is held open (mplug2.open_folder): it may have any name, and be moved.
"""

import dataclasses
import re
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mplug2 import hub, places, processes, sharding
from mplug2.checkpoint import AVERAGE, Checkpoints, fingerprint
from mplug2.data.inventory import inventories
from mplug2.data.stream import stream
from mplug2.errors import CheckpointError, DataError, Mplug2Error, RecipeError
from mplug2.hub import lock
from mplug2.interruption import Interruption
from mplug2.judge import Judge
from mplug2.logbook import Logbook, Silence
from mplug2.network import Network, Parameters
from mplug2.open_folder import OpenFolder
from mplug2.prefetch import Batches, Prefetch, Ready
from mplug2.recipe import Recipe
from mplug2.run import Run, alone, open_run, read_run, write_json
from mplug2.settings import in_words, settings
from mplug2.source import Sources
from mplug2.step import NEVER, Metrics, State, Trainer

IN_FLIGHT = 2
"""Steps that may be begun before the oldest of them is done."""

PATIENCE = 0.5
"""Seconds after which a training that waits for a batch looks whether it is told to stop."""


class DivergedError(Mplug2Error):
    """A loss or a gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a session ended: at `step`, `finished` or interrupted. `params` are all modules'; `ema` the running
    averages of the trained ones (empty if the recipe keeps none)."""

    run: Run
    step: int
    finished: bool
    params: Parameters
    ema: Parameters


def train(
    recipe: Recipe,
    run_dir: Path | str,
    *,
    source: str = "",
    overrides: Sequence[str] = (),
    sources: Sources | None = None,
    changed_data: bool = False,
    batches: Batches | None = None,
    composed: tuple[Network, Parameters] | None = None,
) -> Outcome:
    """Trains `recipe` up to its number of steps; everything is kept in `run_dir`.

    `source` and `overrides` are how the recipe was found, for whoever reads the run later, `sources` its
    file's, which the run keeps. `changed_data`: go on though the data is not what it was. `batches`
    (default: the recipe's own data) and `composed` (default: the network assembled as the modes and cards
    say) may be given.

    Raises RecipeError if `run_dir` holds a run of another recipe or is an address, DataError if it was
    trained on other data, ProcessError if the mesh leaves one of several processes out, CheckpointError if
    `run_dir` cannot be read or written or is trained in by another job, DivergedError with the step, the
    tasks and the example ids when a loss is not finite.
    """
    _check_same(recipe)
    if re.match(r"\w[\w+.-]*://", str(run_dir)):
        raise RecipeError(f"{run_dir} is an address; a run is kept in a folder of this machine")
    processes.check_all_used(recipe.mesh.build())
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        processes.of_first(lambda: stack.enter_context(alone(run_dir)))

        def opened() -> Run:
            data = inventories(recipe.feeds) if batches is None else None
            return open_run(
                run_dir, recipe, source, overrides, sources=sources, data=data, changed_data=changed_data
            )

        run = processes.of_first(opened)
        _check_shared(run)
        folder = OpenFolder(run.path).open()
        if composed is None:
            processes.of_first(
                lambda: lock.keep(run.path, lock.of(places.fixed(recipe), run.recipe, run.overrides))
            )
            network, params, report = hub.assemble(recipe)
            with folder.written():
                processes.of_first(
                    lambda: write_json(folder.path / "load_report.json", dataclasses.asdict(report))
                )
        else:
            network, params = composed
        session = _Session(run, folder, recipe, network, params)
        del composed, params  # the session's to let go
        return session.go(batches or data_stream(recipe), interruption)


def data_stream(recipe: Recipe) -> Batches:
    """The training batches that a recipe asks for: of each, the examples that this process's devices hold."""
    return stream(
        recipe.feeds,
        tokenizer=recipe.tokenizer,
        seed=recipe.seed,
        workers=recipe.workers,
        held=partial(processes.held, recipe.mesh.build()),
    )


def _check_same(recipe: Recipe) -> None:
    """Raises RecipeError unless all processes were given the same recipe."""
    told = processes.exchange(settings(recipe, operation=True))
    for process, other in enumerate(told):
        if differing := sorted(name for name in {*told[0], *other} if told[0].get(name) != other.get(name)):
            raise RecipeError(
                f"process {process} (here) was given another recipe than process 0 (there): "
                + in_words(differing, told[0], other)
            )


def _check_shared(run: Run) -> None:
    """Raises CheckpointError unless every process finds the run that process 0 has opened."""

    def there() -> bool:
        try:
            return read_run(run.path).sessions == run.sessions
        except CheckpointError:
            return False

    blind = [index for index, found in enumerate(processes.exchange(there())) if not found]
    if blind:
        raise CheckpointError(
            f"{run.path}: process(es) {', '.join(map(str, blind))} do not find what process 0 wrote there: a "
            "run of several processes needs a folder that all of them share"
        )


class _Session:
    """One start of a run: restores, loops, logs, saves."""

    def __init__(self, run: Run, folder: OpenFolder, recipe: Recipe, network: Network, params: Parameters):
        self.run, self.folder, self.recipe = run, folder, recipe
        self.trainer = Trainer(recipe, network)
        self.frozen_hashes = {
            name: fingerprint(params[name]) for name in params if name not in self.trainer.names
        }
        self.checkpoints = Checkpoints(folder, recipe.keep, recipe.best)
        self.judge = Judge(recipe, network)
        self.losses: dict[str, float] = {}  # as the log has them, of the last step that is known to be done
        self.params = params
        self.position: Any = None
        self.recent: deque[tuple[int, dict[str, list[int]]]] = deque()  # steps not yet known to be finite
        self.begun: deque[tuple[int, Metrics]] = deque()  # steps not yet known to be done

    def go(self, batches: Batches, interruption: Interruption) -> Outcome:
        recipe, trainer = self.recipe, self.trainer
        step, state = self._restored(batches)
        # The state holds a copy of what is trained: from here on only frozen modules are kept beside it.
        self.params = frozen = trainer.place_frozen(self.params)
        examples = sum(feed.batch for feed in recipe.feeds.values())
        with ExitStack() as stack:
            logbook = stack.enter_context(
                Logbook(self.folder, name=recipe.name, step=step, steps=recipe.steps, examples=examples)
                if processes.first()
                else Silence()
            )
            for note in self.run.notes:
                logbook.say(f"{self.run.path}: {note}")
            if step >= recipe.steps:
                logbook.say(f"{self.folder.name}: this run is finished, all its {step} steps are done")
                return self._outcome(step, state)
            if step:
                logbook.say(f"{self.folder.name}: continuing after step {step}")
            if idle := sharding.idle(trainer.mesh):
                logbook.say(idle)
            stack.callback(self.checkpoints.join)  # an error may come while a save still goes on
            feed = stack.enter_context(Prefetch(batches, trainer.place_batch))
            interruption.hold(logbook.say)
            first = step + 1
            while step < recipe.steps and not interruption.asked(step):
                ready = self._next(feed, interruption)
                if ready is None:
                    continue
                state, metrics = trainer.step(state, frozen, ready.arrays)
                step += 1
                self.position = ready.position
                self.recent.append((step, ready.ids))
                self.begun.append((step, metrics))
                if step == first:
                    self._settle(logbook, down_to=0)
                    logbook.ready(step)
                self._settle(logbook, down_to=IN_FLIGHT)
                if step % recipe.checkpoint_every == 0:
                    self._settle(logbook, down_to=0)
                    self._save(step, state, self._scores(step, state, logbook))
            self._settle(logbook, down_to=0)
            if step >= first and step % recipe.checkpoint_every:
                # Whoever stops a run has no time for its score.
                scores = self._scores(step, state, logbook) if step == recipe.steps else {}
                self._save(step, state, scores)
            self.checkpoints.wait()
            if step < recipe.steps:
                ended = f"stopped after step {step} of {recipe.steps}; the same command continues"
                ended += f" with --run-dir {self.folder.name}" if self.folder.moved else ""
            else:
                ended = f"finished after step {step}"
            logbook.say(f"{self.folder.name}: {ended}")
        return self._outcome(step, state)

    def _next(self, feed: Prefetch, interruption: Interruption) -> Ready | None:
        """The next batches; None if this process is told to stop while they do not come."""
        try:
            while (ready := feed.next(PATIENCE)) is None:
                if interruption.noted and not jax.distributed.is_initialized():
                    break  # of several processes all take the same steps
            return ready
        except StopIteration:
            raise DataError("the stream of batches has ended before the recipe's last step") from None

    def _settle(self, logbook: Logbook | Silence, *, down_to: int) -> None:
        """Waits until at most `down_to` begun steps are not done; writes the lines of the log that are
        due."""
        while len(self.begun) > down_to:
            step, metrics = self.begun.popleft()
            due = step % self.recipe.log_every == 0 or step == self.recipe.steps
            if due or not (self.begun or down_to):
                metrics = jax.device_get(metrics)
                self._check(metrics["bad"])
                while self.recent and self.recent[0][0] <= step:
                    self.recent.popleft()
                self.losses = {name: float(value) for name, value in metrics["metrics"].items()}
                if due:
                    self._log(step, logbook)
            else:
                jax.block_until_ready(metrics)
            logbook.advance(step)

    def _log(self, step: int, logbook: Logbook | Silence) -> None:
        self._check_folder()
        try:
            logbook.log(step, self.losses)
        except CheckpointError as error:
            self.checkpoints.join()
            raise CheckpointError(f"{error}; {self.checkpoints.kept}") from error

    def _check(self, bad: State) -> None:
        """Raises DivergedError if a step had a loss or a gradient that is not finite."""
        step = int(bad["step"])
        if step == NEVER:
            return
        ids = _joined(processes.exchange(dict(self.recent)[step]))
        values = {name.removeprefix("loss/"): float(value) for name, value in bad["values"].items()}
        tasks = [name for name in self.recipe.objectives if not _finite(values[name])]
        told = [
            f"the loss of {name} is {values[name]} (examples {ids.get(self.recipe.feed_of(name), 'unknown')})"
            for name in tasks
        ]
        if not tasks:
            told = [
                f"the losses are finite but the gradient's norm is {values['gradient_norm']} (examples {ids})"
            ]
        steps = self.checkpoints.steps
        before = (
            f"the newest checkpoint, of step {steps[-1]}, is from before"
            if steps
            else "there is no checkpoint yet"
        )
        raise DivergedError(f"step {step}: {'; '.join(told)}; {before}")

    # --------------------------------------------------------------------------------------------------------
    # Checkpoints

    def _items(self, state: State) -> dict[str, Any]:
        items = {**state["params"], "optimizer": state["moments"], "window": state["window"]}
        return items | {AVERAGE + name: tree for name, tree in state.get("ema", {}).items()}

    def _scores(self, step: int, state: State, logbook: Logbook | Silence) -> dict[str, float]:
        if not self.recipe.best:
            return {}
        score = self.judge.score(self.losses, {**self.params, **state["params"], **state.get("ema", {})})
        logbook.judge(step, self.recipe.best, score)
        return {self.recipe.best: score}

    def _check_folder(self) -> None:
        """Raises CheckpointError if what is kept from here on could not be continued from."""
        self.folder.check()
        if not (self.folder.path / "run.json").exists():
            raise CheckpointError(
                f"run directory {self.folder.name} was emptied while it was trained in: it has no run.json"
            )

    def _save(self, step: int, state: State, scores: dict[str, float]) -> None:
        self._check_folder()
        metadata = {
            "step": step,
            "recipe": self.run.fingerprint,
            "frozen": self.frozen_hashes,
            "scores": scores,
        }
        self.checkpoints.save(step, {**self._items(state), "iterator": self.position, "metadata": metadata})

    def _restored(self, batches: Batches) -> tuple[int, State]:
        """(steps done, state) of the newest readable checkpoint, or of a run that begins."""
        restored = self.checkpoints.restore(
            {**self._items(self.trainer.abstract), "iterator": None, "metadata": None}
        )
        if restored is None:
            self.checkpoints.continue_from(0)
            return 0, self.trainer.begin(self.params)
        step, items = restored
        for name, digest in items["metadata"]["frozen"].items():
            if self.frozen_hashes.get(name) != digest:
                raise CheckpointError(
                    f"{self.folder.name}: frozen module {name} is not the one that this run began with"
                )
        self.checkpoints.continue_from(step)
        batches.set_state(items["iterator"])
        self.position = items["iterator"]
        names = self.trainer.names
        saved = {"params": {name: items[name] for name in names}, "moments": items["optimizer"]}
        if self.recipe.ema:
            saved["ema"] = {name: items[AVERAGE + name] for name in names}
        return step, self.trainer.resume(step, saved | {"window": items["window"]})

    def _outcome(self, step: int, state: State) -> Outcome:
        params = {**self.params, **state["params"]}
        run = dataclasses.replace(self.run, path=self.folder.name)
        return Outcome(run, step, step >= self.recipe.steps, params, state.get("ema", {}))


def _joined(ids: Sequence[dict[str, list[int]]]) -> dict[str, list[int]]:
    """The ids by feed of all processes, of which some may hold the same examples."""
    return {
        feed: list(dict.fromkeys(number for one in ids for number in one.get(feed, ()))) for feed in ids[0]
    }


def _finite(value: float) -> bool:
    return value - value == 0
