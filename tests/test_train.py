"""Runs of a toy: what they keep, how they stop and go on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from exact import RTOL, in_float64
from toy import Numbers, losses, run, same, toy, trainer

from mplug2 import files
from mplug2.checkpoint import Checkpoints, fingerprint, restore_modules
from mplug2.errors import CheckpointError, DataError, RecipeError
from mplug2.logbook import read_metrics
from mplug2.network import Network, flat
from mplug2.recipe import AdamW, Recipe
from mplug2.roles import Execution
from mplug2.run import alone, default_folder, open_run, read_run
from mplug2.sharding import Mesh
from mplug2.train import DivergedError, train


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(log_every, tmp_path):
    recipe = toy(accumulate=2, ema=0.9, dropout=True, log_every=log_every)
    whole = run(recipe, tmp_path / "whole")
    # a stream that ends stands for a crash: nothing is saved after step 10, though step 11 is logged
    with pytest.raises(DataError, match="has ended"):
        run(recipe, tmp_path / "stopped", end=11)
    resumed = run(recipe, tmp_path / "stopped")
    assert whole.finished and resumed.finished
    same(resumed.params, whole.params)
    same(resumed.ema, whole.ema)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert [dict(line)["step"] for line in losses(tmp_path / "whole")] == list(
        range(log_every, 13, log_every)
    )


def test_a_run_directory_is_trained_in_by_one_job_at_a_time(tmp_path):
    open_run(tmp_path, toy())
    with alone(tmp_path):
        said = rf"{tmp_path}: process {os.getpid()} on .* trains there: stop it first"
        with pytest.raises(CheckpointError, match=said):
            run(toy(), tmp_path)
    assert len(read_run(tmp_path).sessions) == 1
    assert run(toy(), tmp_path).finished


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path, capsys):
    first = run(toy(), tmp_path)
    log = (tmp_path / "metrics.jsonl").read_text()
    again = run(toy(), tmp_path)
    assert "this run is finished" in capsys.readouterr().out
    same(again.params, first.params)
    assert (tmp_path / "metrics.jsonl").read_text() == log
    assert len(read_run(tmp_path).sessions) == 2


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_run_ends_the_same(tmp_path):
    whole = run(toy(), tmp_path / "whole")
    with pytest.raises(DataError):
        run(toy(), tmp_path / "damaged", end=11)
    newest = tmp_path / "damaged" / "checkpoints" / "10"
    (newest / "iterator" / "data.json").write_text("{}")
    with pytest.warns(UserWarning, match="trying the one before"):
        same(run(toy(), tmp_path / "damaged").params, whole.params)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_cleanly_and_the_same_command_resumes(number, tmp_path):
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    here = Path(__file__).parent
    environ = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    process = subprocess.Popen([sys.executable, "-c", WAITING, str(tmp_path / "run")], **pipes, env=environ)
    folder, until = tmp_path / "run", time.monotonic() + 600
    while len(read_metrics(folder)) < 7 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert f"{number.name}: finishing this step" in said and "the same command continues" in said
    (step,) = Checkpoints(folder).steps[-1:]
    assert 7 <= step < 300 and len(read_metrics(folder)) == step
    recipe = dataclasses.replace(
        patient(), log_every=50
    )  # not what is learned: the run may be continued with it
    resumed = run(recipe, folder)
    whole = run(recipe, tmp_path / "whole")
    same(resumed.params, whole.params)


# a program that trains until it is interrupted; imported, so that its modules have the names they have here
WAITING = "import sys, test_train as t; t.run(t.patient(), t.Path(sys.argv[1]), wait=0.1)"


def patient() -> Recipe:
    return toy(steps=300, checkpoint_every=1000)


def test_a_run_of_another_recipe_is_refused_with_the_fields_that_differ(tmp_path):
    run(toy(steps=2), tmp_path)
    other = toy(steps=2, optimizer=AdamW(learning_rate=0.02, warmup=3), seed=1)
    with pytest.raises(
        RecipeError, match="optimizer.learning_rate is 0.01 there, 0.02 here; seed is 0 there, 1 here$"
    ):
        run(other, tmp_path)
    assert default_folder(other) != default_folder(toy(steps=2))


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RecipeError, match="not empty and not a run directory"):
        open_run(tmp_path, toy())
    with pytest.raises(CheckpointError, match="it has no run.json"):
        read_run(tmp_path)


def test_a_run_that_was_killed_as_it_wrote_its_first_file_can_be_begun_again(tmp_path):
    writing = files.replacing(tmp_path / "run.json")
    writing.__enter__()  # and never left, as after kill -9
    assert len(list(tmp_path.iterdir())) == 1
    open_run(tmp_path, toy())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_run_directory_says_what_was_asked_and_on_what(tmp_path):
    recipe = toy(steps=2)
    network = Network(recipe.modules)
    composed = (network, network.init(0))
    train(
        recipe, tmp_path, source="toy.tiny", overrides=["steps=2"], batches=Numbers(recipe), composed=composed
    )
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["recipe"], told["overrides"]) == ("toy.tiny", ["steps=2"])
    assert told["settings"]["modules.vision.inputs"] == "12"
    assert told["settings"]["objectives.count.task"].endswith("toy.count")
    session = told["sessions"][0]
    assert {"commit", "versions", "machine", "began"} <= set(session) and session["machine"][
        "device_count"
    ] == 1
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_each_line_of_the_log_is_the_mean_of_its_window(tmp_path):
    run(toy(), tmp_path / "each")
    run(toy(log_every=5), tmp_path / "windows")
    each = {line["step"]: line["loss/count"] for line in read_metrics(tmp_path / "each")}
    windows = {line["step"]: line["loss/count"] for line in read_metrics(tmp_path / "windows")}
    means = {
        last: np.mean([each[step] for step in steps]) for last, steps in ((5, range(1, 6)), (12, (11, 12)))
    }
    assert set(windows) == {5, 10, 12}
    assert {step: windows[step] for step in means} == pytest.approx(means, rel=1e-6)


def test_a_loss_that_is_not_finite_stops_with_the_step_the_task_and_the_examples(tmp_path):
    recipe = toy(log_every=100, checkpoint_every=4)
    with pytest.raises(DivergedError) as stopped:
        run(recipe, tmp_path, spoiled=(603,))  # the seventh step's fourth example
    said = str(stopped.value)
    assert said.startswith(
        "step 7: the loss of classify is inf (examples [600, 601, 602, 603, 604, 605, 606, 607])"
    )
    assert "count" not in said
    assert Checkpoints(tmp_path).steps == [4]


def test_frozen_modules_do_not_change_and_have_no_moments_no_average_and_no_copy(tmp_path):
    recipe = toy(
        modes={"vision": "frozen"},
        cards={"vision": "a card"},
        ema=0.9,
        objectives={"classify": toy().objectives["classify"]},
    )
    before = Network(recipe.modules).init(recipe.seed)
    after = run(recipe, tmp_path)
    same(after.params["vision"], before["vision"])
    assert not np.array_equal(after.params["head"]["kernel"], before["head"]["kernel"])
    made, state = trainer(recipe)
    for part in ("params", "ema"):
        assert list(state[part]) == ["head"]
    assert {leaf.shape for leaf in jax.tree.leaves(state["moments"])} == {(), (8, 4), (4,)}
    path = Checkpoints(tmp_path).path(12)
    assert not (path / "vision").exists() and list(restore_modules(tmp_path)[1]) == ["head"]
    told = json.loads((path / "metadata" / "data.json").read_text())
    assert told["frozen"] == {"vision": fingerprint(before["vision"])}


def test_a_run_does_not_continue_on_another_frozen_module(tmp_path):
    recipe = toy(modes={"vision": "frozen"}, cards={"vision": "a card"})
    run(recipe, tmp_path)
    network = Network(recipe.modules)
    with pytest.raises(CheckpointError, match="frozen module vision is not the one"):
        train(recipe, tmp_path, batches=Numbers(recipe), composed=(network, network.init(5)))


@pytest.mark.devices(8)
def test_on_a_mesh_the_losses_are_those_of_one_device_and_state_lies_as_the_table_says(tmp_path):
    with in_float64():
        run(toy(), tmp_path / "one")
        with pytest.raises(DataError):
            run(toy(mesh=Mesh(data=2, fsdp=2)), tmp_path / "mesh", end=11)
        sharded = run(toy(mesh=Mesh(data=2, fsdp=2)), tmp_path / "mesh")
    one, mesh = ([line["loss"] for line in read_metrics(tmp_path / name)] for name in ("one", "mesh"))
    np.testing.assert_allclose(mesh, one, rtol=RTOL)
    assert sharded.params["vision"]["kernel"].sharding.spec[0] == "fsdp"
    made, state = trainer(toy(mesh=Mesh(data=2, fsdp=2)))
    moments = flat(optax.tree.get(state["moments"], "mu"))
    place = flat(state["params"])["vision.kernel"].sharding
    assert moments["vision.kernel"].sharding == place
    _, averaged = trainer(toy(mesh=Mesh(data=2, fsdp=2), ema=0.9))
    assert flat(averaged["ema"])["vision.kernel"].sharding == place


def test_the_command_finds_the_recipe_changes_it_and_says_where_it_goes(monkeypatch):
    from mplug2.tools.train import main

    calls = []
    monkeypatch.setattr("mplug2.train.train", lambda *given, **named: calls.append((*given, named)))
    assert main(["image_caption.tiny", "seed=3", "--steps", "7"]) == 0
    main(["--run-dir", "elsewhere", "image_caption.tiny"])
    (recipe, folder, named), (_, elsewhere, _) = calls
    assert (recipe.seed, recipe.steps, elsewhere) == (3, 7, "elsewhere")
    assert folder == default_folder(recipe) and folder.parent == Path("runs")
    assert (named["source"], named["overrides"]) == ("image_caption.tiny", ["seed=3", "steps=7"])


def test_the_checkpoint_of_lowest_loss_is_kept(tmp_path):
    run(toy(best="loss/count", checkpoint_every=2, keep=1, log_every=2), tmp_path)
    losses = {int(line["step"]): line["loss/count"] for line in read_metrics(tmp_path)}
    best = min(losses, key=losses.__getitem__)
    assert best != 12  # or the test would show nothing
    assert Checkpoints(tmp_path).steps == [best, 12]


def test_a_best_that_nothing_measures_is_refused():
    with pytest.raises(RecipeError, match=r"best is 'loss/cont', expected.*did you mean \"loss/count\""):
        toy(best="loss/cont")


def test_a_run_that_was_refused_before_its_first_step_may_become_another(tmp_path):
    with pytest.raises(RecipeError, match="needs TPUs"):
        run(toy(execution=Execution(attention="splash")), tmp_path)
    assert run(toy(), tmp_path).finished
    with pytest.raises(RecipeError, match="holds a run of another recipe; seed is 0 there, 1 here"):
        run(toy(seed=1), tmp_path)
