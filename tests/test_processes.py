"""Several processes on loopback are one training and one evaluation: the same numbers, one log, one set of
checkpoints; and they end together.

Most tests look at what one job of two processes with two devices each has done (`together`).
"""

import json
import os
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import test_evaluate
import test_meshes
from cluster import finish, start
from exact import IN_FLOAT32, RTOL, in_float64
from jax.sharding import NamedSharding, PartitionSpec
from toy import losses, run, toy

from mplug2 import processes
from mplug2.checkpoint import Checkpoints, restore_modules
from mplug2.errors import CheckpointError, DataError, Mplug2Error
from mplug2.evaluate import Classification, Retrieval
from mplug2.hub import publishing
from mplug2.logbook import read_metrics
from mplug2.network import Network
from mplug2.recipe import Recipe
from mplug2.recipes import text_classify
from mplug2.run import read_run
from mplug2.sharding import Mesh
from mplug2.step import Trainer
from mplug2.tools.evaluate import opened
from mplug2.train import train

MESHES = {
    "both hold the same examples": Mesh(fsdp=2, tensor=2),
    "each holds half of them": Mesh(data=2, sequence=2),
}
ONE, FSDP = Mesh(), Mesh(fsdp=4)


def recipe(mesh: Mesh = ONE, **changes) -> Recipe:
    return toy(mesh=mesh, **changes)


# ------------------------------------------------------------------------------------------------------------
# One job


def job(place: str) -> None:
    """What `together` starts, in every process."""
    folder, said = Path(place), {}
    # Runs on the same mesh have the same programs.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with in_float64():
        for name, mesh in MESHES.items():
            run(recipe(mesh), folder / name)
        with pytest.raises(DataError):  # a stream that ends stands for a crash
            run(recipe(FSDP), folder / "stopped", end=7)
    train(of_cards(folder, FSDP), folder / "of cards")
    train(of_cards(folder, FSDP), folder / "of cards")  # finds that what is frozen is what it was
    said["opened"] = all(
        leaf.is_fully_addressable for leaf in jax.tree.leaves(opened(["text_classify.small"], [])[2])
    )
    said |= {"refused": refused(folder), "skipped": skipped(folder), "scores": scores(folder)}
    said["restored"] = float(restore_modules(folder / "damaged")[1]["head"]["bias"].sum())
    said["unseen"] = unseen(folder)
    said["exchanged"] = processes.exchange(
        {"process": jax.process_index(), "text": "x" * jax.process_index()}
    )
    said["scanned"] = Trainer(recipe(FSDP), Network(recipe(FSDP).parts)).network.execution.scan
    (folder / f"said-{jax.process_index()}.json").write_text(json.dumps(said))
    run(recipe(FSDP, steps=3000, checkpoint_every=5000), folder / "preempted", wait=0.02)


def publish(folder: Path) -> None:
    modules = text_classify.tiny().modules
    params = jax.jit(Network(modules).init, static_argnums=0)(1)
    for name in ("text", "universal"):
        publishing.publish(folder / "cards", name, name, modules[name], params[name], dtype="bfloat16")


def of_cards(folder: Path, mesh: Mesh = ONE) -> Recipe:
    """Text is trained on from its card, the universal module stays as its card has it."""
    return replace(
        text_classify.tiny(),
        modes={"text": "full", "universal": "frozen"},
        cards=dict.fromkeys(("text", "universal"), str(folder / "cards")),
        evaluations={},
        steps=2,
        log_every=1,
        checkpoint_every=2,
        compiler=test_meshes.QUICK_TO_COMPILE,
        mesh=mesh,
    )


def refused(folder: Path) -> dict[str, str]:
    """The sentences of errors that must be the same everywhere."""

    def missing() -> None:
        raise DataError("only process 0 looked")

    def diverged() -> None:
        run(recipe(Mesh(data=4), log_every=100), folder / "diverged", spoiled=(605,))

    asked = {
        "of_first": lambda: processes.of_first(missing),
        "diverged": diverged,
        "small mesh": lambda: train(of_cards(folder), folder / "small"),
        "large mesh": lambda: run(recipe(Mesh(data=8)), folder / "large"),
        "batch": lambda: run(recipe(Mesh(data=4), accumulate=2), folder / "batch"),
        "different": lambda: run(recipe(FSDP, keep=3 + jax.process_index()), folder / "different"),
        "another": lambda: run(recipe(FSDP, seed=5), folder / "stopped"),
    }
    said = {}
    for name, ask in asked.items():
        with pytest.raises(Mplug2Error) as error:
            ask()
        said[name] = str(error.value)
    return said


def skipped(folder: Path) -> list[str]:
    """Warnings of a run that goes on from the checkpoint before a damaged one."""
    run(recipe(FSDP, steps=10), folder / "damaged")
    expected = losses(folder / "damaged")
    if processes.first():
        for file in (folder / "damaged" / "checkpoints" / "10" / "head" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)
    processes.exchange(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(recipe(FSDP, steps=10), folder / "damaged")
    assert losses(folder / "damaged") == expected
    return [str(one.message) for one in caught if "cannot be read" in str(one.message)]


def unseen(folder: Path) -> list[str]:
    """What is said where process 1 alone finds no folder, or not the module, in a checkpoint."""

    def without_folder(path: Path) -> dict[str, None]:
        if jax.process_index() == 1:
            raise FileNotFoundError("no folder")
        return {"metadata": None}

    def without_module(path: Path) -> dict[str, None]:
        if jax.process_index() == 1:
            raise CheckpointError("no module")
        return {"metadata": None}

    said = []
    for wanted in (without_folder, without_module):
        with warnings.catch_warnings(), pytest.raises(CheckpointError) as error:
            warnings.simplefilter("ignore")
            Checkpoints(folder / "stopped").restore(wanted)
        said.append(str(error.value))
    return said


CAPTIONED = test_evaluate.Memory(
    tuple(
        {"index": place, "clips": test_evaluate.clip(place % 7), "label": place % 3, "caption": word}
        for place, word in enumerate("red two left nine a five one red two left".split())
    )
)


def scores(folder: Path | None) -> dict[str, list[float]]:
    """Values and intervals of evaluations whose last batches are not full, or of which some are nobody's."""
    found = {}
    for batch in (1, 3, 4, 100):
        evaluations = {
            "digit": Classification(data=CAPTIONED, batch=batch),
            "retrieval": Retrieval(data=CAPTIONED, length=4, batch=batch),
        }
        results = test_evaluate.measured(
            evaluations, predictions=None if folder is None else folder / f"predictions-{batch}"
        )
        found |= {
            f"{name} {batch}": [score.value, score.low, score.high, score.n]
            for name, score in results.tasks.items()
        }
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, list[dict], list[str]]:
    """(folder, what each process found, what each printed) of the job, which SIGTERM to process 1 ends."""
    folder = tmp_path_factory.mktemp("together")
    publish(folder)
    started = start("test_processes.job", folder, count=2, devices=2)
    until = time.monotonic() + 900
    while len(read_metrics(folder / "preempted")) < 5 and time.monotonic() < until:
        if any(process.poll() is not None for process in started):
            break
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    ended = finish(started)
    assert [status for status, _ in ended] == [0, 0], "\n".join(text for _, text in ended)
    found = [json.loads((folder / f"said-{process}.json").read_text()) for process in range(2)]
    return folder, found, [text for _, text in ended]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The toy's run in one process, in float64."""
    folder = tmp_path_factory.mktemp("alone")
    with in_float64():
        run(recipe(), folder)
    return folder


@pytest.mark.parametrize("mesh", MESHES)
def test_two_processes_learn_what_one_does_on_any_mesh(mesh, together, alone):
    one, two = ([line["loss"] for line in read_metrics(folder)] for folder in (alone, together[0] / mesh))
    assert len(two) == 12
    np.testing.assert_allclose(two, one, rtol=RTOL)


def test_two_processes_place_cards_as_one_does_and_frozen_ones_have_the_same_hash(together):
    folder, found, _ = together
    train(of_cards(folder), folder / "of cards alone")
    frozen, first = [], []
    for name in ("of cards", "of cards alone"):
        checkpoints = Checkpoints(folder / name)
        _, items = checkpoints.restore({"metadata": None}) or pytest.fail("no checkpoint")
        frozen.append(items["metadata"]["frozen"])
        first.append([line["loss"] for line in read_metrics(folder / name)])
    assert frozen[0] == frozen[1] and list(frozen[0]) == ["universal"]
    # In float32. Adam divides a gradient by its own size: one that is but rounding moves its parameter by the
    # whole rate, where the loss is flat, so that it changes with the rate's square.
    flat = 100 * text_classify.tiny().optimizer.learning_rate ** 2
    for step, bound in enumerate((IN_FLOAT32, IN_FLOAT32 + flat)):
        np.testing.assert_allclose(first[0][step], first[1][step], rtol=bound)
    assert [one["opened"] for one in found] == [True, True]


def test_process_0_alone_writes_and_prints(together):
    folder, _, said = together
    assert "finished after step 12" in said[0] and "examples/s" in said[0]
    assert "finished" not in said[1] and "examples/s" not in said[1]  # XLA itself may say something
    (session,) = read_run(folder / "each holds half of them").sessions
    assert (session["machine"]["process_count"], session["machine"]["device_count"]) == (2, 4)
    assert len(list((folder / "each holds half of them" / "tensorboard").iterdir())) == 1


def test_sigterm_to_one_process_saves_all_at_the_same_step(together):
    folder, _, said = together
    (step,) = Checkpoints(folder / "preempted").steps
    assert 5 <= step < 3000 and len(read_metrics(folder / "preempted")) == step
    assert f"stopped after step {step} of 3000; the same command continues" in said[0]


def test_what_two_processes_saved_goes_on_in_one_on_another_mesh(together, alone):
    folder, _, _ = together
    assert Checkpoints(folder / "stopped").steps == [5]
    with in_float64():
        resumed = run(recipe(), folder / "stopped")
    assert [session["machine"]["process_count"] for session in resumed.run.sessions] == [2, 1]
    found, expected = ([line["loss"] for line in read_metrics(one)] for one in (folder / "stopped", alone))
    np.testing.assert_allclose(found, expected, rtol=RTOL)


def test_errors_are_the_same_sentence_everywhere(together):
    _, (first, second), _ = together
    assert first["refused"] == second["refused"]
    refused = first["refused"]
    assert refused["of_first"] == "only process 0 looked"
    assert "examples [600, 601, 602, 603, 604, 605, 606, 607]" in refused["diverged"]
    assert "uses 1 of the 4 devices of 2 processes" in refused["small mesh"]
    assert "needs 8 devices, there are 4" in refused["large mesh"]
    assert "into 2 part(s) (accumulate) for each of 4 device(s) (mesh data x fsdp); 8" in refused["batch"]
    assert "process 1 (here) was given another recipe" in refused["different"]
    assert refused["different"].endswith("keep is 3 there, 4 here")
    assert "seed is 0 there, 5 here" in refused["another"]


def test_a_damaged_checkpoint_is_passed_over_by_all_alike(together):
    folder, found, _ = together
    for one in found:
        (warning,) = one["skipped"]
        assert "checkpoints/10 cannot be read (head/d/" in warning and "trying the one before" in warning
    assert Checkpoints(folder / "damaged").steps == [5, 10]


def test_a_checkpoint_that_one_process_does_not_see_is_refused_by_all(together):
    for one in together[1]:
        damaged, refused = one["unseen"]
        assert damaged.endswith("checkpoints/5 cannot be read (FileNotFoundError: no folder)")
        assert refused == "no module"


def test_processes_of_cpus_unroll_their_layers(together):
    assert [one["scanned"] for one in together[1]] == [False, False]
    assert Trainer(recipe(Mesh()), Network(recipe(Mesh()).parts)).network.execution.scan


def test_what_is_exchanged_arrives_whole(together):
    for one in together[1]:
        assert one["exchanged"] == [{"process": 0, "text": ""}, {"process": 1, "text": "x"}]


def test_each_process_can_read_modules_of_a_run(together):
    one = float(restore_modules(together[0] / "damaged")[1]["head"]["bias"].sum())
    assert [found["restored"] for found in together[1]] == [one, one]


@pytest.mark.filterwarnings("ignore")
def test_evaluations_in_two_processes_are_those_of_one_to_the_last_bit(together):
    folder, found, _ = together
    expected = scores(None)
    assert found[0]["scores"] == found[1]["scores"] == expected
    lines = (folder / "predictions-3" / "digit.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(10))


def save_many_items(folder: str) -> None:
    spread = NamedSharding(Mesh(data=2).build(), PartitionSpec("data"))
    array = jax.make_array_from_callback((2,), spread, lambda place: np.arange(2.0)[place])
    names = [f"module{number}" for number in range(70)]
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, {name: {"kernel": array} for name in names[:: -1 if jax.process_index() else 1]})
    checkpoints.wait()


def test_items_that_processes_write_in_different_orders_do_not_wait_for_each_other(tmp_path):
    """More than twice as many as asyncio ever has threads by itself."""
    ended = finish(start("test_processes.save_many_items", tmp_path, count=2, devices=1), timeout=300)
    assert [status for status, _ in ended] == [0, 0], ended
    assert Checkpoints(tmp_path).steps == [1]


# ------------------------------------------------------------------------------------------------------------
# Jobs that end too early


def lost(folder: str) -> None:
    """Process 1 alone finds its data missing."""
    run(recipe(Mesh(data=2)), Path(folder), end=4 if jax.process_index() else None)


def test_what_one_process_meets_all_are_told(tmp_path):
    ended = finish(start("test_processes.lost", tmp_path, count=2, devices=1))
    assert [status for status, _ in ended] == [2, 2], ended
    assert "process 1 has ended (DataError: the stream of batches has ended before" in ended[0][1]
    assert "Traceback" not in ended[0][1]
