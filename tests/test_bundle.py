"""Bundles: the same outputs bit for bit without a network; the same content, the same tar; and no tar of a
stranger's writes outside its folder."""

import io
import json
import os
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fresh import drawn
from PIL import Image

from mplug2 import hub, overrides, recipes
from mplug2.card_wording import wording_of
from mplug2.data.handwriting import Handwriting
from mplug2.data.wording import Plain
from mplug2.errors import CardError, RecipeError
from mplug2.hub import archive, bundle, lock, publishing
from mplug2.network import flat
from mplug2.tools import evaluate as evaluate_tool
from mplug2.tools import predict as predict_tool
from mplug2.tools.main import main


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    """(a bundle of image_caption.tiny with a loaded `vision`, its parameters)."""
    folder = tmp_path_factory.mktemp("bundle")
    recipe = recipes.find("image_caption.tiny")
    params = drawn(recipe.modules, seed=3)
    publishing.publish(folder / "cards", "vision-a", "vision", recipe.modules["vision"], params["vision"])
    changes = ["modes.vision=frozen", f"cards.vision={folder / 'cards'}", "execution.dtype=bfloat16"]
    recipe = overrides.apply(recipe, changes)
    trained = {name: tree for name, tree in params.items() if name != "vision"}
    locked = lock.of(recipe, "image_caption.tiny", changes)
    bundle.write(folder / "made", locked, recipe, trained)
    return folder / "made", params


@pytest.fixture
def tar(made, tmp_path) -> Path:
    archive.pack(made[0], tmp_path / "made.tar")
    return tmp_path / "made.tar"


def identical(one, other) -> None:
    one, other = flat(one), flat(other)
    assert set(one) == set(other)
    for name in one:
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


def test_a_bundle_holds_cards_weights_the_tokenizer_and_a_lock(made):
    folder, params = made
    names = {path.name for path in folder.iterdir()}
    assert {"lock.json", "handwriting.model", "vision-a.json", "vision-a.safetensors"} <= names
    assert set(hub.cards(folder)) == set(params)  # whatever reads cards reads a bundle


def test_what_was_bundled_is_what_is_opened(made, tar):
    folder, params = made
    for path in (folder, tar):
        opened = bundle.load(path)
        identical(opened.params, params)
        assert opened.lock.execution.dtype == opened.network.execution.dtype == "bfloat16"
        assert opened.tokenizer.table()["size"] == 96


def test_the_same_content_is_the_same_tar_and_comes_back(made, tar, tmp_path):
    os.utime(made[0] / "lock.json", (1, 1))
    archive.pack(made[0], tmp_path / "again.tar")
    assert tar.read_bytes() == (tmp_path / "again.tar").read_bytes()
    assert main(["bundle", str(tar), "--out", str(tmp_path / "back")]) == 0
    for path in made[0].iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    with tarfile.open(tar) as theirs:  # any tar program reads it
        assert sorted(theirs.getnames()) == sorted(path.name for path in made[0].iterdir())


def test_a_changed_byte_of_a_bundle_is_refused(tar, tmp_path):
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as theirs:
        for name, said in (
            ("vision-a.safetensors", "sha256 is"),
            ("handwriting.model", "sha256|SentencePiece"),
        ):
            at = theirs.getmember(name).offset_data + 700
            content[at] ^= 1
            (tmp_path / "bad.tar").write_bytes(content)
            content[at] ^= 1
            with pytest.raises(CardError, match=said):
                bundle.load(tmp_path / "bad.tar")


def test_of_a_damaged_tar_nothing_is_left(tar, tmp_path, capsys):
    (tmp_path / "bad.tar").write_bytes(tar.read_bytes()[:-20000])
    before = sorted(tmp_path.iterdir())
    assert main(["bundle", str(tmp_path / "bad.tar"), "--out", str(tmp_path / "into")]) == 2
    assert "bytes, the tar has" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_or_a_tar_that_is_there_is_not_written_over(made, tar, capsys):
    kept = tar.read_bytes()
    for what, there in (("image_caption.small", made[0]), ("image_caption.small", tar), (str(tar), made[0])):
        assert main(["bundle", what, "--out", str(there)]) == 2
        assert f"{there} is there already" in capsys.readouterr().err
    assert tar.read_bytes() == kept


@pytest.mark.slow
def test_a_bundled_recipe_predicts_and_scores_as_the_shelf_does_without_a_network(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("MPLUG2_OFFLINE", "1")
    assert main(["bundle", "image_caption.small", "--out", str(tmp_path / "b.tar")]) == 0
    scene = Handwriting("scene").source("test")[3]["clips"][0]
    Image.fromarray(scene).save(tmp_path / "scene.png")
    capsys.readouterr()
    said, values = [], []
    for source in ("small", str(tmp_path / "b.tar")):
        assert main(["predict", source, "--image", str(tmp_path / "scene.png")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != "(nothing)\n"
    for source in ("image_caption.small", str(tmp_path / "b.tar")):
        out = tmp_path / "scores.json"
        assert main(["eval", source, "--limit", "4", "--out", str(out)]) == 0
        values.append(json.loads(out.read_text())["tasks"])
    assert values[0] == values[1]


def test_a_recipe_that_changed_since_it_was_bundled_is_refused(made):
    opened = bundle.load(made[0])
    changed = overrides.apply(recipes.find("image_caption.tiny"), ["modules.universal.latents=3"])
    with pytest.raises(CardError, match="modules.universal.latents .card .*, recipe 3."):
        bundle.check_recipe(opened, changed)


def test_cards_of_one_name_are_refused_before_anything_is_written(tmp_path):
    recipe = recipes.find("image_caption.tiny")
    params = drawn(recipe.modules)
    for module, name in (("vision", "lock"), ("universal", "same"), ("decoder", "same")):
        publishing.publish(tmp_path / module, name, module, recipe.modules[module], params[module])
    for modules, said in (
        (["vision"], "vision and the bundle would both write lock.json"),
        (["universal", "decoder"], "universal and decoder would both write same.json"),
    ):
        changes = [f"modes.{module}=frozen" for module in modules]
        # The file itself: a folder's lock.json is taken for no card.
        changes += [f"cards.{m}={next((tmp_path / m).glob('*.json'))}" for m in modules]
        changed = overrides.apply(recipe, changes)
        trained = {name: tree for name, tree in params.items() if name not in modules}
        with pytest.raises(CardError, match=said):
            bundle.write(tmp_path / "b", lock.of(changed), changed, trained)
    assert not (tmp_path / "b").exists()


# --- bundles of strangers


@pytest.fixture
def edited(made, tmp_path):
    """A copy of the bundle, and a function that changes its lock."""
    folder = shutil.copytree(made[0], tmp_path / "edited")

    def edit(change) -> Path:
        value = json.loads((folder / "lock.json").read_text())
        change(value)
        (folder / "lock.json").write_text(json.dumps(value))
        return folder

    return edit


def test_a_strangers_recipe_file_runs_only_where_the_user_names_it(edited, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    code = f"""
import pathlib
pathlib.Path({str(ran)!r}).touch()
from mplug2 import recipes
def mine(): return recipes.find("image_caption.tiny")
"""
    folder = edited(lambda lock: lock.update(recipe="evil.py:mine"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "evil.py").write_text(code)
    monkeypatch.chdir(tmp_path / "here")  # where the name in the lock would find it
    with pytest.raises(RecipeError, match="'evil.py:mine', a file whose code would run.*--recipe"):
        evaluate_tool.opened([str(folder)], [])
    predict_tool.open_predictor([str(folder)])
    assert not ran.exists()
    recipe, *_ = evaluate_tool.opened([str(folder)], [], "evil.py:mine")
    assert ran.exists() and recipe.name == recipes.find("image_caption.tiny").name
    with pytest.raises(RecipeError, match="--recipe x is for a bundle, which small is not"):
        evaluate_tool.opened(["small"], [], "x")


def test_a_bundle_asks_as_its_recipe_does_where_that_is_not_there(tmp_path):
    recipe = recipes.find("msrvtt_qa.tiny")
    bundle.write(tmp_path / "b", lock.of(recipe, "of_another_machine"), recipe, drawn(recipe.modules))
    assert predict_tool.open_predictor([str(tmp_path / "b")]).wording == wording_of(recipe) == Plain()


def test_a_module_without_a_file_takes_no_memory(edited):
    def grow(lock) -> None:
        part = lock["modules"]["vision"]
        for name in ("file", "card", "source"):
            del part[name]
        part["mode"] = "init"
        part["config"]["width"] = 1 << 20

    with pytest.raises(CardError, match="module vision has no file; a bundle holds the weights of every"):
        bundle.load(edited(grow))


@pytest.mark.parametrize("name", ["vision-a.json", "vision-a.safetensors"])
def test_what_lies_outside_of_a_bundle_is_not_read(name, made, edited):
    folder = edited(lambda lock: lock["modules"]["vision"].update(source=str(made[0] / "vision-a.json")))
    (folder / name).unlink()
    with pytest.raises(CardError, match=f"module vision: {name} is not in the bundle"):
        bundle.load(folder)


@pytest.mark.parametrize("name", ["../made/vision-a", "/elsewhere/x", "a\x00b", ""])
def test_a_locks_card_is_a_plain_name(name, edited):
    with pytest.raises(CardError, match="modules.vision.card: is .*, expected a plain file name"):
        bundle.load(edited(lambda lock: lock["modules"]["vision"].update(card=name)))


# --- tars of strangers


def stranger(path: Path, *entries: tarfile.TarInfo | str, kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for entry in entries:
            entry = tarfile.TarInfo(entry) if isinstance(entry, str) else entry
            tar.addfile(entry, io.BytesIO(b"x" * entry.size))
    return path


def info(name: str, **fields) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry


@pytest.mark.parametrize(
    "entry",
    [
        info("../outside", size=1),
        info("/outside", size=1),
        info("folder/file", size=1),
        info("folder", type=tarfile.DIRTYPE),
        info("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        info("hard", type=tarfile.LNKTYPE, linkname="lock.json"),
        info("device", type=tarfile.CHRTYPE),
        info("block", type=tarfile.BLKTYPE),
        info("pipe", type=tarfile.FIFOTYPE),
        info(".hidden", size=1),
        info("long" * 50, size=1),
    ],
    ids=lambda entry: entry.name[:12],
)
def test_only_regular_files_with_plain_names_are_unpacked(entry, tmp_path):
    tar = stranger(tmp_path / "bad.tar", entry)
    with pytest.raises(CardError, match="is not a regular file with a plain name"):
        archive.unpack(tar, tmp_path / "into")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bad.tar", "into"]


def test_a_size_beyond_the_tar_is_refused_before_it_is_read(tmp_path):
    entry = info("a", size=1 << 60)
    (tmp_path / "bad.tar").write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(CardError, match=f"a has {1 << 60} bytes, the tar has 1024 left"):
        archive.unpack(tmp_path / "bad.tar", tmp_path / "into")


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    tar = stranger(tmp_path / "bad.tar", info("a", size=1), info("a", size=1))
    with pytest.raises(CardError, match="a is there twice"):
        archive.unpack(tar, tmp_path / "into")


@pytest.mark.parametrize("turns", [100, pytest.param(1500, marks=pytest.mark.slow)])
def test_mutated_tars_are_unpacked_inside_their_folder_or_refused(turns, tmp_path):
    draw = random.Random(5)
    good = stranger(tmp_path / "good", info("a.json", size=700), info("b.model", size=3), info("c", size=0))
    content = good.read_bytes()[: 512 * 8]
    good.unlink()
    for turn in range(turns):
        found = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            at = draw.choice([0, 1024 + 512, 2048 + 512]) + draw.randrange(512)
            found[at % len(found)] = draw.choice([0, 32, 47, 46, 48, 55, 128, 255, draw.randrange(256)])
        for start in (0, 1536, 2560):  # a right sum, so that what is behind it is tried
            if draw.random() < 0.8:
                header = found[start : start + 512]
                found[start + 148 : start + 156] = b"%06o\0 " % (sum(header[:148] + header[156:]) + 256)
        if draw.random() < 0.2:
            del found[draw.randrange(len(found)) :]
        (tmp_path / "t.tar").write_bytes(found)
        into = tmp_path / "into" / str(turn)
        try:
            archive.unpack(tmp_path / "t.tar", into)
        except CardError as error:
            assert "\n" not in str(error)
        unpacked = list(into.rglob("*"))
        assert sum(path.stat().st_size for path in unpacked) <= len(found)
        assert all(path.is_file() and path.parent == into for path in unpacked)
    assert {path.name for path in tmp_path.iterdir()} == {"t.tar", "into"}
