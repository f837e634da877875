"""A run needs only itself, runs nobody's code but its user's, and says what differs."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from recipe_files import MINE, write
from toy import toy

from mplug2 import files, places, recipes
from mplug2.data.inventory import Inventory, inventories
from mplug2.data.tokens import SentencePiece
from mplug2.errors import CheckpointError, DataError, RecipeError
from mplug2.hub import lock
from mplug2.overrides import apply
from mplug2.recipes.runs import recipe_of
from mplug2.run import Run, open_run, read_run
from mplug2.settings import settings
from mplug2.tools.evaluate import opened
from mplug2.tools.main import main

OLD = Path(__file__).parent / "golden" / "old_run"
COMMANDS = {
    "train": [],
    "predict": ["--image", "grey.png"],
    "eval": [],
    "publish": ["--to", "out"],
    "bundle": ["--out", "out"],
    "show": [],
    "lock": [],
}


def begun(folder: Path, name: str, *changes: str) -> Path:
    """A run as training begins it, before anything is compiled."""
    recipe, sources = recipes.found(name)
    recipe = apply(recipe, changes)
    data = inventories(recipe.feeds)
    run = open_run(folder / "run", recipe, name, changes, sources=sources, data=data)
    lock.of(places.fixed(recipe), name, changes).write(run.path / lock.FILE)
    (run.path / "metrics.jsonl").write_text("{}\n")  # it has logged a step
    return run.path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of a recipe file whose data is a class of its own."""
    return begun(tmp_path, f"{write(tmp_path / 'src')}:mine", "seed=3")


@pytest.mark.parametrize("fate", ["edited", "moved", "deleted", "broken"])
def test_a_run_is_what_it_was_whatever_became_of_its_recipe_file(fate, run, tmp_path, monkeypatch):
    file, recipe = tmp_path / "src" / "mine.py", recipe_of(read_run(run))
    if fate == "edited":
        write(tmp_path / "src", MINE.replace("steps=2", "steps=9"))
        (tmp_path / "src" / "network.py").write_text("MODULES = {}")
    elif fate == "broken":
        file.write_text("1 / 0")
    else:
        (file.parent.rename if fate == "moved" else lambda _: shutil.rmtree(file.parent))(tmp_path / "gone")
    moved = run.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(moved)
    again = recipe_of(read_run("."))
    assert settings(again, operation=True) == settings(recipe, operation=True) and again.seed == 3
    assert again.objectives["bright"].data.source("train")[1]["label"] == 1  # by a neighbour imported late
    assert main(["lock", "."]) == 0


def test_a_recipe_file_of_the_zoos_own_parts_needs_no_code_at_all(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "short.py").write_text(
        "from mplug2.recipes import image_classify\ndef short():\n    return image_classify.tiny()\n"
    )
    run = begun(tmp_path, f"{folder / 'short.py'}:short", "steps=3")
    (run / "recipe" / "short.py").write_text("1 / 0")
    shutil.rmtree(folder)
    values = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(values | {"mark": ""}))
    assert recipe_of(read_run(run)) == apply(recipes.find("image_classify.tiny"), ["steps=3"])


# --- no stranger's code


def strangers(run: Path, how: str) -> None:
    """The run as a stranger might have made it, with code that leaves a trace."""
    evil = "from pathlib import Path\nPath('trace').touch()\n"
    told = json.loads((run / "run.json").read_text())
    if how == "another user's":
        (run / "recipe" / "mine.py").write_text(evil + MINE)
    elif how == "another word":
        shutil.copy(run / "recipe" / "mine.py", run / "recipe" / "evil.py")
        (run / "recipe" / "evil.py").write_text(evil + MINE)
        told["recipe"], told["main"] = "evil.py:mine", "evil.py"
    elif how == "an older version's":
        (run / "evil.py").write_text(evil + MINE)
        told = {name: told[name] for name in ("recipe", "overrides", "fingerprint", "settings", "sessions")}
        told["recipe"] = f"{run / 'evil.py'}:mine"
    elif how == "out of the folder":
        (run.parent / "evil.py").write_text(evil)
        told["main"], told["kept"] = "../../evil.py", {"../../evil.py": "00"}
    elif how == "a planted neighbour":
        (run / "recipe" / "random.py").write_text(evil)
        (run / "recipe" / "network.py").write_text(evil)
    (run / "run.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    "how",
    ["another user's", "another word", "an older version's", "out of the folder", "a planted neighbour"],
)
def test_a_strangers_code_is_not_run_by_any_command(how, run, tmp_path, monkeypatch, capsys):
    strangers(run, how)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "another user's"))
    Image.new("RGB", (9, 9)).save("grey.png")
    for command, more in COMMANDS.items():
        status = main([command, str(run), *more])
        said = capsys.readouterr().err
        assert status == 2 or command == "lock", (command, said)  # a lock holds no code
        assert said.count("\n") == (status == 2) and not list(tmp_path.rglob("trace")), said
        assert "--trust" in said or status == 0
    assert not (tmp_path / "out").exists()


def test_code_that_was_changed_since_is_not_run_either(run, tmp_path, monkeypatch, capsys):
    strangers(run, "another user's")
    monkeypatch.chdir(tmp_path)
    assert main(["show", str(run)]) == 2
    assert "mine.py is not the file that the run kept: its sha256 is another" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


def test_trust_runs_it_this_once(run, tmp_path, monkeypatch, capsys):
    strangers(run, "another user's")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "another user's"))
    assert main(["show", str(run), "--trust"]) == 0
    assert (tmp_path / "trace").exists()
    assert main(["show", str(run)]) == 2


def test_a_run_that_is_copied_stays_its_users(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    assert recipe_of(read_run(tmp_path / "copy")).name == "mine.bright"


# --- what differs is said


def test_eval_names_the_field_that_differs(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"other settings than are asked for: dropout is True there"):
        opened([str(run)], ["dropout=false"])
    with pytest.raises(CheckpointError, match="checkpoint"):
        opened([str(run)], ["evaluations.bright.batch=3"])  # decides nothing: goes on to the weights


def test_train_by_the_file_compares_as_ever_and_keeps_what_is_new(run, tmp_path):
    file = tmp_path / "src" / "mine.py"
    with pytest.raises(RecipeError, match="another recipe; seed is 3 there, 4 here$"):
        begun(tmp_path, f"{file}:mine", "seed=4")
    file.write_text(f"# a comment\n{file.read_text()}")
    recipe, sources = recipes.found(f"{file}:mine")
    again = open_run(run, apply(recipe, ["seed=3"]), f"{file}:mine", ["seed=3"], sources=sources)
    assert again.notes == ("mine.py changed since this run was last started; its settings did not",)
    assert recipe_of(read_run(run)).seed == 3
    assert (run / "recipe" / "mine.py").read_text().startswith("# a comment")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.clear(), "recipe: missing"),
        (lambda told: told.update(overrides="steps=2"), "overrides: is 'steps=2', expected a list"),
        (lambda told: told.update(settings={"a": 1}), "settings.a: is 1, expected a text"),
        (lambda told: told.update(sessions=[3]), r"sessions\[0\]: is 3, expected an object"),
        (
            lambda told: told["sessions"][0].update(commit=[]),
            r"sessions\[0\].commit: is \[\], expected",
        ),
        (lambda told: told["sessions"][0].update(machine="x"), r"sessions\[0\].machine: .*an object"),
        (lambda told: told.update(kept={"mine.py": None}), "kept.mine.py: is None, expected a text"),
        (
            lambda told: told.update(data={"a": [{"examples": "3"}]}),
            r"data.a\[0\].examples: is '3'",
        ),
    ],
)
def test_a_run_json_of_another_shape_is_refused_by_its_field(change, said, run):
    told = json.loads((run / "run.json").read_text())
    change(told)
    (run / "run.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=f"run.json cannot be read: .*{said}"):
        read_run(run)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff{}", b'{"recipe": NaN}', b"{" * 4000])
def test_a_run_json_that_is_none_is_refused(content, run):
    (run / "run.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="run.json"):
        read_run(run)


# --- runs of before


def test_a_run_of_an_older_version_opens_by_its_name(capsys):
    old = read_run(OLD)
    assert (old.values, old.kept, old.mark) == (None, {}, "")
    recipe = recipe_of(old)
    assert settings(recipe) == old.settings
    assert main(["lock", str(OLD)]) == 0


def test_where_the_zoo_has_changed_since_the_runs_own_network_is_used_and_the_fields_are_said(
    tmp_path, capsys, monkeypatch
):
    now = recipes.find("image_classify.tiny")
    vision: Any = now.modules["vision"]
    changed = dataclasses.replace(
        now,
        modules={**now.modules, "vision": dataclasses.replace(vision, depth=3)},
        optimizer=dataclasses.replace(now.optimizer, clip=2.0),
    )
    monkeypatch.setattr(recipes, "find", lambda name: changed)
    recipe = recipe_of(read_run(OLD))
    assert recipe.modules == now.modules
    said = capsys.readouterr().err
    assert "modules.vision.depth is 2 there, 3 here" in said and "optimizer.clip is 1.0 there, 2.0" in said
    shutil.copy(OLD / "run.json", tmp_path)  # without its lock
    with pytest.raises(CheckpointError, match="modules.vision.depth is 2 there, 3 .*trained by c4c49a8"):
        recipe_of(read_run(tmp_path))


# --- data and places


def data(examples: int = 4, sha256: str = "aa") -> dict[str, tuple[Inventory, ...]]:
    return {"classify": (Inventory(examples=examples, annotations={"train.jsonl": sha256}, bytes=10**13),)}


def test_data_that_changed_is_refused_unless_that_is_wanted(tmp_path):
    open_run(tmp_path, toy(), data=data())
    assert open_run(tmp_path, toy(), data=data(3)).notes == ()  # nothing was learned yet
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    said = "the data of classify is not what .*train.jsonl has another content; it has 2 .* had 3.*--changed"
    with pytest.raises(DataError, match=said):
        open_run(tmp_path, toy(), data=data(2, "bb"))
    assert len(read_run(tmp_path).sessions) == 2
    assert "other data" in open_run(tmp_path, toy(), data=data(2, "bb"), changed_data=True).notes[0]
    assert open_run(tmp_path, toy(), data=data(2, "bb")).notes == ()


def test_train_refuses_to_go_on_with_other_data(run, tmp_path, capsys):
    lazily = tmp_path / "src" / "lazily.py"
    lazily.write_text(lazily.read_text().replace("40 * index", "41 * index"))
    words = ["train", f"{tmp_path / 'src' / 'mine.py'}:mine", "seed=3", "--run-dir", str(run)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "the data of bright is not what this run was trained on: of 6 examples some have another" in said
    assert len(read_run(run).sessions) == 1


def test_a_run_that_was_started_a_thousand_times_still_opens(tmp_path):
    run = open_run(tmp_path, toy())
    dataclasses.replace(run, sessions=run.sessions * 500).write()
    assert len(open_run(tmp_path, toy()).sessions) == len(read_run(tmp_path).sessions) == 500


def test_data_at_another_place_continues_and_the_place_is_said(tmp_path, monkeypatch):
    def at(root: str) -> Run:
        recipe = apply(recipes.find("msvd_caption.tiny"), [f"objectives.video_caption.data.root={root}"])
        return open_run(tmp_path / "run", recipe, data={"video_caption": data()["classify"]})

    monkeypatch.chdir(tmp_path)
    for name in ("ds", "moved"):
        (tmp_path / name).mkdir()
    run = at("ds")
    (run.path / "metrics.jsonl").write_text("{}\n")
    assert at(f"{tmp_path}/ds").notes == at("./ds/").notes == ()
    (note,) = at("moved").notes
    assert note.endswith(f"data.root is now {tmp_path}/moved, was {tmp_path}/ds: the same content")
    monkeypatch.chdir("/")
    (objective,) = recipe_of(read_run(run.path)).objectives.values()
    assert objective.data.root == f"{tmp_path}/moved"


def test_a_tokenizers_file_is_kept(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "my.model").write_bytes(SentencePiece().content)
    run = begun(tmp_path, "image_classify.tiny", f"tokenizer.model={tmp_path}/words/my.model")
    shutil.rmtree(tmp_path / "words")
    recipe = recipe_of(read_run(run))
    assert recipe.tokenizer == SentencePiece(str(run / "recipe" / "my.model")) and recipe.tokenizer.size == 96
    with files.replacing(run / "recipe" / "my.model") as file:
        file.write(b"another")
    with pytest.raises(CheckpointError, match="my.model is not the file that the run kept"):
        recipe_of(read_run(run))
    (run / "recipe" / "my.model").unlink()
    os.mkfifo(run / "recipe" / "my.model")  # would be waited for
    with pytest.raises(CheckpointError, match="my.model cannot be read .it is a named pipe"):
        recipe_of(read_run(run))


# --- commands


@pytest.mark.parametrize(
    "words",
    [["compose", "--vision", "{run}", "--out", "o"], ["merge", "soup", "{run}", "{run}", "--out", "o"]],
)
def test_commands_of_cards_say_what_to_do_with_a_run(words, run, capsys):
    assert main([word.format(run=run) for word in words]) == 2
    said = capsys.readouterr().err
    assert f"{run} is a run directory" in said and f'"mplug2 publish {run} --to DIR"' in said
    assert said.count("\n") == 1


def test_train_continues_a_run_that_is_named_alone(run, monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr("mplug2.train.train", lambda *given, **named: calls.append((*given, named)))
    for words in ([str(run)], ["--run-dir", str(run)], [str(run), "log_every=5"]):
        assert main(["train", *words]) == 0
    for recipe, folder, named in calls:
        assert (recipe.seed, str(folder), named["source"]) == (3, str(run), read_run(run).recipe)
        assert sorted(named["sources"].files) == ["dots.py", "lazily.py", "mine.py", "network.py"]
    assert calls[-1][0].log_every == 5 and calls[-1][2]["overrides"] == ["seed=3", "log_every=5"]


@pytest.mark.slow
def test_a_run_is_evaluated_published_bundled_asked_and_continued_without_its_file(tmp_path, monkeypatch):
    file = write(tmp_path / "src", MINE.replace("steps=2", "steps=3"))
    trained = ["train", f"{file}:mine", "--run-dir", str(tmp_path / "run")]
    assert main([*trained, "workers=1"]) == 0  # a worker imports what the file defines
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")  # as if it had been stopped after step 2
    shutil.rmtree(tmp_path / "src")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    Image.new("RGB", (9, 9)).save("grey.png")
    assert main(["eval", "../moved"]) == main(["publish", "../moved", "--to", "cards"]) == 0
    assert main(["bundle", "../moved", "--out", "bundle"]) == 0
    assert main(["train", "../moved"]) == 0
    assert os.path.isdir("../moved/checkpoints/3")
    assert main(["predict", "../moved", "--image", "grey.png"]) == 2  # it opens, and has no decoder
