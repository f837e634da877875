"""A word on the command line is what it must hold, decided once; a folder or a tar from outside runs no
code."""

import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from fresh import drawn

from mplug2 import recipes
from mplug2.errors import CardError, Mplug2Error
from mplug2.hub import archive, bundle, lock, publishing
from mplug2.modules import heads
from mplug2.opening import CARDS, Kind, Word, look, opened
from mplug2.recipes import image_classify
from mplug2.tools.main import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "b"
    recipe = image_classify.tiny()
    bundle.write(folder, lock.of(recipe, "image_classify.tiny"), recipe, drawn(recipe.modules))
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "b")


@pytest.fixture
def places(whole, tmp_path, monkeypatch) -> dict[Kind, str]:
    """A word of each kind that lies on the disk."""
    monkeypatch.chdir(tmp_path)
    config = heads.ContrastiveConfig(width=8, space=4)
    publishing.publish("cards", "mine", "contrastive", config, drawn({"c": config})["c"])
    archive.pack(whole, tmp_path / "b.tar")
    Path("run").mkdir()
    Path("run", "run.json").write_text("{}")
    shutil.copy(whole / "lock.json", "run/lock.json")  # a run keeps its own
    shutil.copy(whole / "lock.json", "my.json")
    return {
        Kind.RUN: "run",
        Kind.TAR: "b.tar",
        Kind.CARD: "cards/mine.json",
        Kind.FOLDER: "cards",
        Kind.LOCK: "my.json",
        Kind.SHELF: "vision-small",
        Kind.FAMILY: "small",
        Kind.RECIPE: "image_qa.tiny",
        Kind.RELEASE: "mplug2_pretrain",
        Kind.MODULE: "universal",
        Kind.ADDRESS: "hf://me/mine",
    }


def kind(text: str | Path) -> Kind:
    found = look(str(text))
    assert isinstance(found, Word), found
    return found.kind


def test_a_word_is_what_it_holds(places, whole):
    assert {kind: look(word) for kind, word in places.items()} == {
        wanted: Word(word, wanted, Path(word) if os.path.exists(word) else Path())
        for wanted, word in places.items()
    }
    assert kind(whole) is Kind.BUNDLE and kind("mine.py:tiny") is Kind.RECIPE
    value = json.loads(Path("cards/mine.json").read_text())
    Path("delta.json").write_text(json.dumps(value | {"base": "0" * 64}))
    assert kind("delta.json") is Kind.DELTA


def test_what_is_on_the_disk_comes_before_names_but_those_of_the_shelf(places):
    os.rename("run", "image_qa")
    os.rename("cards", "small")
    shutil.copytree("small", "vision-small")
    Path("universal").mkdir()  # which holds nothing
    assert [kind(word) for word in ("image_qa", "small", "vision-small", "universal")] == [
        Kind.RUN,
        Kind.FOLDER,
        Kind.SHELF,
        Kind.MODULE,
    ]
    assert kind("./vision-small") is Kind.FOLDER


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("merge soup {RUN} {RUN} --out o", '"mplug2 publish run --to DIR" makes cards of it'),
        (
            "compose --vision {RUN} --out o",
            "run is a run directory, mplug2 compose takes a bundle's folder or cards",
        ),
        ("compose --vision {RECIPE} --out o", '"mplug2 train image_qa.tiny" makes a run of it'),
        (
            "merge soup {LOCK} {FAMILY} --out o",
            "my.json is a lock, mplug2 merge takes a bundle's folder or cards",
        ),
        (
            "publish {TAR} --to o",
            "b.tar is a bundle's tar, mplug2 publish takes a run directory: predict and eval take it",
        ),
        ("publish {FOLDER} --to o", "cards is a folder of cards, mplug2 publish takes a run directory"),
        ("publish {RECIPE} --to o", "is a recipe, mplug2 publish takes a run directory"),
        ("predict {RECIPE} --image my.json", "is a recipe, mplug2 predict takes a run directory, a bundle"),
        ("predict {FAMILY} {RUN} --image my.json", "run is a run directory, mplug2 predict takes cards"),
        ("eval {MODULE}", 'is a module of the zoo, mplug2 eval takes .* "mplug2 show universal" explains it'),
        ("eval {RELEASE}", '"mplug2 download mplug2_pretrain" makes cards of it'),
        ("lock {FOLDER}", "cards is a folder of cards, mplug2 lock takes a recipe"),
        ("bundle {FAMILY} --out o", "small is a family of the shelf, mplug2 bundle takes a recipe"),
        ("show {TAR}", "b.tar is a bundle's tar, mplug2 show takes a recipe"),
        ("compose --vision {TAR} --out o", '"mplug2 bundle b.tar --out DIR" makes a folder of it'),
        ("download {RUN}", "run is a run directory, mplug2 download takes"),
        ("download {ADDRESS}", "hf://me/mine is an address, mplug2 download takes"),
    ],
)
def test_a_word_of_another_kind_is_answered_with_what_takes_it(words, said, places, capsys):
    command = words.format(**{kind.name: word for kind, word in places.items()}).split()
    assert main(command) == 2
    assert re.search(said, told := capsys.readouterr().err), told
    assert told.count("\n") == 1 and not Path("o").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no file or folder has that name"),
        (lambda path: path.mkdir(), "holds no run.json, lock.json or card"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "has checkpoints and no run.json"),
        (os.mkfifo, "is neither a regular file nor a folder"),
        (lambda path: path.symlink_to("nothing"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "is none by its name"),
    ],
)
def test_what_is_nothing_is_refused_with_the_reason(make, said, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(Mplug2Error, match=said):
        opened(str(tmp_path / "x"), "predict", Kind.RUN, *CARDS)


def test_a_file_of_a_run_names_its_folder_and_a_name_the_nearest(tmp_path):
    (tmp_path / "run.json").write_text('{"fingerprint": "", "settings": {}}')
    with pytest.raises(Mplug2Error, match=f"is a file of a run: name the folder {tmp_path}"):
        opened(str(tmp_path / "run.json"), "eval", Kind.RUN, Kind.RECIPE)
    with pytest.raises(Mplug2Error, match='did you mean "image_qa"'):
        opened("image_qs", "eval", Kind.RUN, Kind.RECIPE)
    with pytest.raises(Mplug2Error, match="no file or folder"):
        opened("a\0b", "eval", Kind.RUN)


# --- What a bundle holds


EVIL = "import pathlib\npathlib.Path({!r}).touch()\n"

FOREIGN = {
    "evil.py": lambda folder: (folder / "evil.py").write_text(""),
    "run.json": lambda folder: (folder / "run.json").write_text("{}"),
    "recipe": lambda folder: (folder / "recipe").mkdir(),
    "__pycache__": lambda folder: (folder / "__pycache__").mkdir(),
    "x.pyc": lambda folder: (folder / "x.pyc").write_bytes(b""),
    ".hidden": lambda folder: (folder / ".hidden").write_text(""),
    ".published": lambda folder: (folder / ".published").mkdir(),
    "LOCK.json": lambda folder: (folder / "LOCK.json").write_text("{}"),
    "link": lambda folder: (folder / "link").symlink_to("lock.json"),
    "pipe.json": lambda folder: os.mkfifo(folder / "pipe.json"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_bundle_with_a_foreign_file_is_not_opened(name, copy):
    FOREIGN[name](copy)
    with pytest.raises(CardError, match=f"holds {name}, which its lock does not list"):
        bundle.load(copy)


def test_what_a_bundle_lists_is_a_regular_file(copy, tmp_path):
    shutil.move(copy / "handwriting.model", tmp_path / "elsewhere")
    (copy / "handwriting.model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CardError, match="handwriting.model is no regular file"):
        bundle.load(copy)


@pytest.mark.parametrize(
    "command", ["predict {} --image lock.json", "eval {}", "publish {} --to o", "bundle {} --out o"]
)
def test_a_bundle_that_calls_itself_a_run_runs_nothing(command, copy, tmp_path, monkeypatch, capsys):
    """The recipe lies where each of the ways to name it would find it."""
    code = EVIL.format(str(tmp_path / "ran")) + "def f(): ...\n"
    monkeypatch.chdir(copy)
    facts = {"overrides": [], "fingerprint": "", "settings": {}, "sessions": []}
    (copy / "run.json").write_text(json.dumps({"recipe": "evil.py:f", **facts}))
    for place in (copy, copy / "recipe"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(code)
    assert main(command.format(copy).split()) == 2
    assert not (tmp_path / "ran").exists() and not Path("o").exists()
    assert "bundle" in capsys.readouterr().err


def test_a_tar_unpacks_what_its_lock_lists_and_nothing_else(whole, tmp_path, capsys):
    archive.pack(whole, tmp_path / "b.tar")
    for name in ("evil.py", "run.json", "Lock2.json"):
        shutil.copy(tmp_path / "b.tar", tmp_path / "more.tar")
        with tarfile.open(tmp_path / "more.tar", "a", format=tarfile.GNU_FORMAT) as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        for command in (["bundle", "--out", str(tmp_path / "o")], ["predict", "--image", __file__], ["eval"]):
            assert main([command[0], str(tmp_path / "more.tar"), *command[1:]]) == 2
            assert f"more.tar holds {name}, which its lock does not list" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "more.tar"]
    with tarfile.open(tmp_path / "none.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("evil.py"), io.BytesIO())
    with pytest.raises(CardError, match="holds no lock.json"):
        bundle.unpack(tmp_path / "none.tar", tmp_path / "o")


def test_a_card_in_a_bundle_names_the_file_that_was_locked(copy, tmp_path):
    path = next(path for path in copy.glob("*.json") if path.name != "lock.json")
    value = json.loads(path.read_text())
    value["file"] |= {"path": "other.safetensors", "urls": ["https://example.org/other"]}
    path.write_text(json.dumps(value))
    with pytest.raises(CardError, match="names other.safetensors"):
        bundle.load(copy)


def test_a_recipe_that_is_a_file_is_run_only_where_the_user_names_it(places, capsys):
    """Not where a lock does."""
    Path("evil.py").write_text(EVIL.format(str(Path("ran").absolute())))
    shutil.copytree("cards", "evil.py:f")
    for word in ("evil.py:f", "./evil.py:f"):
        assert kind(word) is Kind.FOLDER
    assert recipes.is_file("evil.py:f") and main(["show", "evil.py:f"]) == 0
    assert not Path("ran").exists()
