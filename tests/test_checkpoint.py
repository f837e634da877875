import json
import os
import resource
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disks import small_disk
from orbax.checkpoint import v1 as ocp

from mplug2 import seal
from mplug2.checkpoint import Checkpoints, fingerprint, restore_modules
from mplug2.errors import CheckpointError


def items(value: float, size: int = 3) -> dict:
    return {
        "vision": {"kernel": jnp.full((size, size), value), "norm": {"scale": jnp.full((2,), value)}},
        "text": {"words": jnp.full((4,), value)},
        "ema.vision": {"kernel": jnp.full((size, size), -value), "norm": {"scale": jnp.full((2,), -value)}},
        "ema.text": {"words": jnp.full((4,), -value)},
        "optimizer": {"count": jnp.int32(7)},
        "window": {"count": jnp.int32(1)},
        "iterator": {"step": 5, "batch": {"caption": 64}},
        "metadata": {"step": int(value), "frozen": {}},
    }


def wanted(tree: dict) -> dict:
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {name: item for name, item in tree.items() if name not in ("iterator", "metadata")}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first), arrays)
    return {**shapes, "iterator": None, "metadata": None}


def saved(folder, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, items(float(step)))
    checkpoints.wait()
    return checkpoints


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path, 5)
    step, restored = Checkpoints(tmp_path).restore(wanted(items(5.0))) or pytest.fail("nothing there")
    assert step == 5
    assert restored["iterator"] == {"step": 5, "batch": {"caption": 64}}
    jax.tree.map(np.testing.assert_array_equal, restored, items(5.0))


def test_there_is_an_item_for_each_module_and_json_is_json(tmp_path):
    path = saved(tmp_path, 5).path(5)
    assert {item.name for item in path.iterdir() if item.is_dir()} == set(items(0.0))
    assert json.loads((path / "iterator" / "data.json").read_text())["step"] == 5


def test_buffers_may_be_donated_while_the_save_goes_on(tmp_path):
    checkpoints, tree = Checkpoints(tmp_path), items(1.0, size=500)
    spoil = jax.jit(lambda arrays: jax.tree.map(lambda leaf: leaf * 0 - 9, arrays), donate_argnums=0)
    arrays = {name: item for name, item in tree.items() if name not in ("iterator", "metadata")}
    checkpoints.save(1, tree)
    jax.block_until_ready(spoil(arrays))
    checkpoints.wait()
    _, restored = Checkpoints(tmp_path).restore(wanted(items(1.0, size=500))) or pytest.fail("nothing there")
    jax.tree.map(np.testing.assert_array_equal, restored, items(1.0, size=500))


def test_the_last_n_stay(tmp_path):
    assert saved(tmp_path, 1, 2, 3, 4, keep=2).steps == [3, 4]


def test_modules_are_restored_alone_and_averaged_if_asked(tmp_path):
    path = saved(tmp_path, 5).path(5)
    shutil.rmtree(path / "optimizer")  # would be missed if it were read
    shutil.rmtree(path / "text")
    step, params = restore_modules(tmp_path, ["vision"], ema=False)
    assert (step, list(params)) == (5, ["vision"])
    np.testing.assert_array_equal(params["vision"]["kernel"], np.full((3, 3), 5.0))
    np.testing.assert_array_equal(
        restore_modules(tmp_path, ["vision"])[1]["vision"]["norm"]["scale"], [-5.0, -5.0]
    )


def test_all_trained_modules_are_restored_by_default(tmp_path):
    saved(tmp_path, 5)
    assert set(restore_modules(tmp_path)[1]) == {"vision", "text"}


def test_a_module_that_was_not_trained_is_refused_with_the_nearest_name(tmp_path):
    saved(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r'not \[.visoin.\] \(did you mean "vision"\?\)'):
        restore_modules(tmp_path, ["visoin"])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    assert Checkpoints(tmp_path).restore({}) is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        restore_modules(tmp_path)


def damages():
    def gone(path):
        shutil.rmtree(path / "vision")

    def cut(path):
        for file in (path / "vision").rglob("*"):
            if file.is_file():
                os.truncate(file, file.stat().st_size // 2)

    def flipped(path):
        for file in (path / "vision" / "d").iterdir():
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)

    def emptied(path):
        for file in path.rglob("*"):
            if file.is_file():
                file.write_bytes(b"")

    return [gone, cut, flipped, emptied]


@pytest.mark.parametrize("damage", damages(), ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_gives_a_warning_and_the_one_before(damage, tmp_path):
    checkpoints = saved(tmp_path, 4, 5)
    damage(checkpoints.path(5))
    with pytest.warns(UserWarning, match="trying the one before"):
        step, restored = checkpoints.restore(wanted(items(4.0))) or pytest.fail("nothing there")
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, restored, items(4.0) | {"iterator": restored["iterator"]})
    checkpoints.continue_from(step)
    assert checkpoints.steps == [4]


def test_if_none_can_be_read_all_reasons_are_given(tmp_path):
    checkpoints = saved(tmp_path, 4, 5)
    for step in (4, 5):
        shutil.rmtree(checkpoints.path(step) / "vision")
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match=r"(?s)checkpoints/5 .*checkpoints/4 "),
    ):
        checkpoints.restore(wanted(items(4.0)))


def test_what_a_crash_left_half_written_is_not_a_checkpoint(tmp_path):
    checkpoints = saved(tmp_path, 4)
    (checkpoints.folder / "5.orbax-checkpoint-tmp").mkdir()
    shutil.copytree(checkpoints.path(4), checkpoints.path(6))
    (checkpoints.path(6) / "files.json").unlink()
    assert checkpoints.steps == [4]
    checkpoints.continue_from(4)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["4"]


def test_what_a_kill_leaves_of_a_checkpoint_that_is_removed_is_none(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)
        checkpoints = judged(tmp_path, {1: 0.5, 2: 0.4, 3: 0.6}, "loss")
        assert checkpoints.path(1).is_dir() and checkpoints.steps == [2, 3]
        checkpoints.continue_from(2)
    assert checkpoints.path(3).is_dir() and (checkpoints.steps, checkpoints.best) == ([2], 2)
    checkpoints.continue_from(2)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["2"]


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_survives(tmp_path):
    checkpoints = saved(tmp_path, 4, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tree = items(5.0) | {"text": {"words": jax.random.normal(jax.random.key(0), (100_000,))}}
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (50_000, hard)
        )  # writes fail from here on, as on a full disk
        with pytest.raises(CheckpointError) as refused:
            checkpoints.save(5, tree)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "could not be written" in str(refused.value) and "checkpoint 4 is whole" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["4"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step, _ = Checkpoints(tmp_path).restore(wanted(items(4.0))) or pytest.fail("nothing there")
    assert step == 4
    checkpoints.save(5, tree)  # once there is room again
    checkpoints.wait()
    assert checkpoints.steps == [5]


def test_a_fingerprint_covers_names_types_shapes_and_values():
    arrays = {"a": {"kernel": np.arange(6.0).reshape(2, 3)}, "b": np.zeros(2)}
    others = [
        {"a": {"kernel": np.arange(6.0).reshape(3, 2)}, "b": np.zeros(2)},
        {"a": {"kernels": np.arange(6.0).reshape(2, 3)}, "b": np.zeros(2)},
        {"a": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "b": np.zeros(2)},
        {"a": {"kernel": np.arange(6.0).reshape(2, 3)}, "b": np.array([0, 1e-300])},
    ]
    assert len({fingerprint(tree) for tree in (arrays, *others)}) == 5


def judged(folder, scores: dict[int, float], judged_by: str) -> Checkpoints:
    checkpoints = Checkpoints(folder, 2, judged_by)
    for step, score in scores.items():
        metadata = {"step": step, "frozen": {}, "scores": {judged_by: score}}
        checkpoints.save(step, items(float(step)) | {"metadata": metadata})
    checkpoints.wait()
    return checkpoints


@pytest.mark.parametrize("said", ["NaN", "-Infinity", "true", '"2"', "9" * 400, "[" * 9999 + "]" * 9999])
def test_a_score_that_is_no_finite_number_is_not_the_best(said, tmp_path):
    for step, score in ((1, said), (2, "0.5"), (3, "0.25")):
        (tmp_path / f"checkpoints/{step}/metadata").mkdir(parents=True)
        text = f'{{"step": {step}, "scores": {{"answer": {score}}}}}'
        (tmp_path / f"checkpoints/{step}/metadata/data.json").write_text(text)
        (tmp_path / f"checkpoints/{step}/files.json").write_text("{}")
    assert Checkpoints(tmp_path, judged_by="answer").best == 2


def test_a_pipe_in_a_strangers_checkpoint_is_not_waited_for(tmp_path):
    (tmp_path / "checkpoints/1/metadata").mkdir(parents=True)
    os.mkfifo(tmp_path / "checkpoints/1/metadata/data.json")
    os.mkfifo(tmp_path / "checkpoints/1/files.json")
    assert Checkpoints(tmp_path, judged_by="answer").best is None
    with pytest.warns(UserWarning, match="trying"), pytest.raises(CheckpointError, match="a named pipe"):
        Checkpoints(tmp_path).restore({"metadata": None})


@pytest.mark.parametrize("judged_by, best", [("loss/caption", 3), ("image_answer", 2)])
def test_the_best_one_stays_beside_the_last_n_and_is_what_the_run_has_learned(judged_by, best, tmp_path):
    checkpoints = judged(tmp_path, {1: 0.5, 2: 0.9, 3: 0.1, 4: 0.2, 5: 0.3}, judged_by)
    assert (checkpoints.steps, checkpoints.best) == ([best, 4, 5], best)
    assert restore_modules(tmp_path, best=judged_by)[0] == best
    assert restore_modules(tmp_path, best="another")[0] == restore_modules(tmp_path)[0] == 5
    newest, _ = checkpoints.restore(wanted(items(0.0))) or pytest.fail("nothing there")
    assert newest == 5  # what a run goes on from
    checkpoints.path(best).joinpath("files.json").write_text("{}")
    with pytest.warns(UserWarning, match="trying"):
        assert restore_modules(tmp_path, best=judged_by)[0] == 5


NAMES = ["lr[0.1]", "a*b?c", "{x}%20#&", "back\\slash", " a b\nc ", "-x", "gs:bucket", "file::zip", "é"]


@pytest.mark.parametrize("name", ["lr[0.1]", "/".join(NAMES), os.fsdecode(b"%2e\xff\xfe")], ids=ascii)
def test_a_folder_of_any_name_keeps_its_checkpoints_in_itself(name, tmp_path):
    folder = tmp_path / "around" / name
    folder.mkdir(parents=True)
    saved(folder, 5)
    assert [path.name for path in (folder / "checkpoints" / "5" / "vision").glob("manifest*")]
    np.testing.assert_array_equal(
        restore_modules(folder, ["vision"], ema=False)[1]["vision"]["kernel"], np.full((3, 3), 5.0)
    )
    (tmp_path / "around").rename(tmp_path / "plain")
    assert restore_modules(tmp_path / "plain" / name)[0] == 5


def test_a_folder_that_is_moved_between_two_saves_stays_one(tmp_path):
    (tmp_path / "here").mkdir()
    checkpoints = saved(tmp_path / "here", 4)
    (tmp_path / "here").rename(tmp_path / "there")
    checkpoints.save(5, items(5.0))
    checkpoints.wait()
    assert Checkpoints(tmp_path / "there").steps == checkpoints.steps == [4, 5]
    assert checkpoints.path(5) == tmp_path / "there" / "checkpoints" / "5"
    assert not (tmp_path / "here").exists()


def test_a_folder_that_is_removed_between_two_saves_is_not_begun_again(tmp_path):
    (tmp_path / "here").mkdir()
    checkpoints = saved(tmp_path / "here", 4)
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(CheckpointError, match="here was removed while it was trained in"):
        checkpoints.save(5, items(5.0))
    assert not (tmp_path / "here").exists()


def lost(path):
    shutil.rmtree(path / "vision" / "d")
    (path / "vision" / "manifest.ocdbt").unlink()


def another_text(path):
    (path / "iterator" / "data.json").write_text('{"step": 6}')


def another_array(path):
    shutil.rmtree(path / "vision")
    shutil.copytree(path / "text", path / "vision")


@pytest.mark.parametrize("loss", [lost, another_text, another_array], ids=lambda loss: loss.__name__)
def test_what_cannot_be_read_back_is_not_complete(loss, tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, 4)
    opened = ocp.checkpointables_metadata
    monkeypatch.setattr(ocp, "checkpointables_metadata", lambda path: loss(Path(path)) or opened(path))
    with pytest.raises(CheckpointError, match=r"checkpoints/5 could not be written .*checkpoint 4 is whole"):
        checkpoints.save(5, items(5.0))
        checkpoints.wait()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["4"]


def test_checkpoints_that_changed_names_are_refused_and_the_next_older_one_is_used(tmp_path):
    checkpoints = saved(tmp_path, 100, 200, 400)
    checkpoints.path(200).rename(checkpoints.path(0))
    checkpoints.path(400).rename(checkpoints.path(200))
    checkpoints.path(0).rename(checkpoints.path(400))
    with pytest.warns(UserWarning, match=r"its folder is named \d00, and it is of step \d00"):
        assert restore_modules(tmp_path)[0] == 100
        step, _ = checkpoints.restore(wanted(items(0.0))) or pytest.fail("nothing there")
    assert step == 100
    checkpoints.continue_from(100)  # whole as they are, they are not thrown away
    assert {path.name for path in checkpoints.folder.iterdir()} == {"100", "refused-200", "refused-400"}
    assert checkpoints.steps == [100]


def test_a_renamed_checkpoint_alone_is_a_sentence_that_says_its_step(tmp_path):
    checkpoints = saved(tmp_path, 200)
    checkpoints.path(200).rename(checkpoints.path(300))
    said = r"checkpoints/300 is not what its name says \(its folder is named 300, and it is of step 200"
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match=said):
        restore_modules(tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    for name, recipe in (("one", "aaaa"), ("other", "bbbb")):
        values = {"recipe": "toy", "overrides": [], "fingerprint": recipe, "settings": {}, "sessions": []}
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(values))
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(5, items(5.0) | {"metadata": {"step": 5, "recipe": recipe, "frozen": {}}})
        checkpoints.wait()
    assert restore_modules(tmp_path / "one")[0] == 5
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "one" / "checkpoints")
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match="it is of a run of another recipe"),
    ):
        restore_modules(tmp_path / "one")


def test_a_checkpoint_that_says_nothing_of_itself_is_refused(tmp_path):
    checkpoints = saved(tmp_path, 5)
    path = checkpoints.path(5)
    (path / "metadata" / "data.json").write_text("5")
    seal.write(path)
    with (
        pytest.warns(UserWarning),
        pytest.raises(CheckpointError, match="metadata is int, expected an object"),
    ):
        restore_modules(tmp_path)


@pytest.mark.parametrize("name", ["٣", "²", "007", "5.orbax", "-1"])
def test_only_a_number_as_we_write_it_is_a_step(name, tmp_path):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / name / "files.json").write_text("{}")
    assert Checkpoints(tmp_path).steps == []
    Checkpoints(tmp_path).continue_from(0)


@pytest.mark.parametrize("inodes", [30, 86])
def test_where_no_inodes_are_left_a_save_ends_and_says_so(inodes, tmp_path, capfd):
    with small_disk(tmp_path, f"size=4m,nr_inodes={inodes}"):
        checkpoints, before = Checkpoints(tmp_path), threading.active_count()
        with pytest.raises(CheckpointError) as refused:
            for step in (4, 5):
                checkpoints.save(step, items(float(step)))
                checkpoints.wait()
        assert "No space left on device: there are no inodes left for new files" in str(refused.value)
        until = time.monotonic() + 5  # threads that wait for a word from one that failed wait five minutes
        while threading.active_count() > before and time.monotonic() < until:
            time.sleep(0.01)
        stuck = [t.name for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
        assert stuck == [] and "Traceback" not in capfd.readouterr().err
        assert Checkpoints(tmp_path).steps == ([] if inodes == 30 else [4])
        del checkpoints
