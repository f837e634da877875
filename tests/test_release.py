"""Released checkpoints: downloaded, converted and verified in one step, and held to what first came."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jsonschema
import pytest
from converting import vocabulary
from misbehaving import (  # pyright: ignore[reportMissingImports]
    CONTENT,
    QUICK,
    Server,
    planned,
)
from safetensors.numpy import load_file
from torch_writer import save

from mplug2 import hub
from mplug2.convert import conversion
from mplug2.convert.shapes import read_settings
from mplug2.errors import CardError, CheckpointError, DataError, DownloadError
from mplug2.hub import release
from mplug2.hub.cache import Cache
from mplug2.hub.download import fetched_first
from mplug2.hub.release import Release
from mplug2.recipes import released
from mplug2.tools.main import main

SHELF, GOLDEN = Path(__file__).parent.parent / "checkpoints", Path(__file__).parent / "golden"
SETTINGS = read_settings(GOLDEN / "oracle" / "qa_stride2.json")


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path):
    monkeypatch.delenv("MPLUG2_OFFLINE", raising=False)
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A small checkpoint with the keys of the official program, as PyTorch writes it."""
    tensors = load_file(GOLDEN / "oracle" / "qa_stride2.params.safetensors")
    return save(tmp_path_factory.mktemp("official") / "mPLUG2_X.pth", {"model": tensors, "epoch": 9})


@pytest.fixture
def wanted(official, tmp_path) -> Release:
    copy = tmp_path / official.name
    copy.write_bytes(official.read_bytes())
    return Release(name="x", family="mplug2", file=copy.name, urls=(copy.as_uri(),), source="a test")


def test_a_release_is_downloaded_converted_verified_and_recorded_in_one_step(wanted, official, tmp_path):
    said, file = release.install(wanted, tmp_path / "out", settings=SETTINGS)
    content = official.read_bytes()
    assert (file.sha256, file.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert Cache.default().pinned("x")["sha256"] == file.sha256
    assert "keys are in modules" in said
    conversion.convert(official, "mplug2", tmp_path / "by-hand", conversion.Options("x", SETTINGS))
    cards, by_hand = hub.cards(tmp_path / "out"), hub.cards(tmp_path / "by-hand")
    assert {name: card.file for name, card in cards.items()} == {n: c.file for n, c in by_hand.items()}
    Path(wanted.urls[0].removeprefix("file://")).unlink()  # nothing is asked for again
    said, again = release.install(wanted, tmp_path / "out", settings=SETTINGS)
    assert again == file and "is there already" in said


def test_a_folder_of_a_release_is_used_again_if_it_is_of_the_same_file_and_words_and_whole(
    wanted, official, tmp_path
):
    vocabulary(tmp_path, load_file(GOLDEN / "oracle" / "qa_stride2.params.safetensors"))
    words, folder = tmp_path / "vocab.txt", tmp_path / "out"
    _, file = release.install(wanted, folder, settings=SETTINGS, vocabulary=words)
    reworded = dataclasses.replace(wanted, source="said otherwise", urls=("https://example.org/x",))
    assert release.install(reworded, folder, vocabulary=words)[1] == file
    with pytest.raises(CardError, match="holds name 'x', expected 'y'; prompt '', expected 'p'$"):
        release.install(dataclasses.replace(wanted, name="y", prompt="p"), folder)
    with pytest.raises(CardError, match=f"holds a file of sha256 {file.sha256}, expected {'a' * 64}"):
        release.install(dataclasses.replace(wanted, sha256="a" * 64, bytes=1), folder)
    words.write_text(words.read_text().replace("w7", "other"))
    with pytest.raises(CardError, match="was converted with a vocabulary of .* remove the folder to convert"):
        release.install(wanted, folder, vocabulary=words)
    (folder / "text-x.json").unlink()
    with pytest.raises(CardError, match=r"cards \['text-x'\] are gone; it holds"):
        release.install(wanted, folder)
    (folder / "conversion" / release.NOTE).write_text('{"release": 7}')
    with pytest.raises(CardError, match=f"release {folder}/conversion/release.json: file: missing"):
        release.install(wanted, folder)


def test_an_installation_that_was_killed_is_complete_or_not_there(wanted, tmp_path, monkeypatch):
    def killed(report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(conversion, "told", killed)  # the first thing after the folder has its name
        release.install(wanted, tmp_path / "out", settings=SETTINGS)
    assert "is there already" in release.install(wanted, tmp_path / "out", settings=SETTINGS)[0]


def test_a_vocabulary_that_is_not_there_is_refused_before_the_download(wanted, tmp_path):
    with pytest.raises(DataError, match="none.txt"):
        release.install(wanted, tmp_path / "out", vocabulary=tmp_path / "none.txt")
    assert not Cache.default().entries()


def test_what_was_converted_is_verified_each_time(wanted, tmp_path):
    release.install(wanted, tmp_path / "out", settings=SETTINGS)
    weights = hub.find(tmp_path / "out", "universal").weights
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CardError, match="sha256 is .*, the card says"):
        release.install(wanted, tmp_path / "out", settings=SETTINGS)


def test_another_file_than_the_first_is_never_taken(wanted, tmp_path):
    cache = Cache.default()
    with release.downloaded(wanted, cache) as (path, file):
        pass
    path.unlink()
    with Path(wanted.urls[0].removeprefix("file://")).open("r+b") as there:
        there.write(b"other")
    pin = cache.folder / "pins" / "x.json"
    refused = f"sha256 {file.sha256}.*sent a file of sha256.* was recorded in {pin} when it first came"
    with pytest.raises(DownloadError, match=refused), release.downloaded(wanted, cache):
        pass
    stated = dataclasses.replace(wanted, name="stated", sha256="a" * 64, bytes=file.bytes)
    refused = f"sha256 {'a' * 64}.*sent a file of sha256"
    with pytest.raises(DownloadError, match=refused), release.downloaded(stated, cache):
        pass
    pin.write_text("{}")
    refused = "does not say what was taken for x; remove it"
    with pytest.raises(DownloadError, match=refused), release.downloaded(wanted, cache):
        pass


def test_a_first_file_that_does_not_convert_is_not_believed_and_the_right_one_is_taken_after_it(
    wanted, official, tmp_path
):
    cache, there = Cache.default(), Path(wanted.urls[0].removeprefix("file://"))
    there.write_bytes(b"<html>Please log in</html>")
    refused = f"; what came from {wanted.urls[0]} is not believed"
    with pytest.raises(CheckpointError, match=refused):
        release.install(wanted, tmp_path / "out", settings=SETTINGS)
    assert not cache.pinned("x") and not cache.entries()
    there.write_bytes(official.read_bytes())
    _, file = release.install(wanted, tmp_path / "out", settings=SETTINGS)
    assert cache.pinned("x")["sha256"] == file.sha256


def first(*tricks: str, cache: Cache) -> tuple[dict, list[int]]:
    """What is known after a first download, and the first byte of each request."""
    with (
        Server(CONTENT, planned(*tricks)) as server,
        fetched_first("f.pth", (server.url("f"),), "x", cache, patience=QUICK) as known,
    ):
        assert not cache.pinned("x")  # before anybody has looked at it
    return known, [start for *_, start in server.log]


@pytest.mark.parametrize(
    "tricks",
    [
        ("drop", "drop", "good"),
        ("no_tag", "weak_tag", "good"),
        ("busy", "good"),
        ("broken", "good"),
        ("stall", "good", "good"),
    ],
)
def test_the_first_download_is_whole_whatever_the_connection_does(tricks, tmp_path):
    cache = Cache(tmp_path / "c")
    known, _ = first(*tricks, cache=cache)
    assert known["sha256"] == hashlib.sha256(CONTENT).hexdigest() and known["bytes"] == len(CONTENT)
    path = cache.find(known["sha256"], known["bytes"])
    assert path and path.read_bytes() == CONTENT and cache.pinned("x") == known


def test_answers_are_not_glued_together_while_no_sha256_would_tell(tmp_path):
    _, starts = first("drop", "wrong_tail", cache=Cache(tmp_path / "c"))
    assert starts == [0, 0]  # the second is of another file with the same tag, and all of it


@pytest.mark.parametrize(
    ("tricks", "said"),
    [
        (("endless",), "does not say how many bytes it has"),
        (("missing",), "answers 404"),
        (("drop",), "in a row"),
        (("to_file",), "redirects to 'file:///etc/hostname'"),
    ],
)
def test_a_first_download_that_is_not_whole_is_refused_and_nothing_is_recorded(tricks, said, tmp_path):
    cache = Cache(tmp_path / "c")
    with pytest.raises(DownloadError, match=said) as refused:
        first(*tricks, cache=cache)
    assert not cache.pinned("x") and not cache.entries()
    assert "sha256" not in str(refused.value) and "belongs at" not in str(refused.value)


def test_a_first_download_that_fails_says_how_a_file_from_elsewhere_is_taken(wanted, tmp_path):
    Path(wanted.urls[0].removeprefix("file://")).unlink()
    with pytest.raises(DownloadError, match='there is no such file; .*"mplug2 convert FILE --from mplug2'):
        release.install(wanted, tmp_path / "out", settings=SETTINGS)


def test_the_shelfs_releases_follow_the_schema_and_are_asked_over_https():
    schema = json.loads((SHELF / "release.schema.json").read_text())
    for name in release.releases():
        jsonschema.validate(json.loads((SHELF / f"{name}.release.json").read_text()), schema)
        found = release.find(name)
        assert found.name == name and all(url.startswith("https://") for url in found.urls)
        assert found.family in conversion.FAMILIES
    fields = {field.name for field in dataclasses.fields(Release)}
    assert set(schema["properties"]) == fields
    with pytest.raises(CardError, match='no release "mplug2_pretrian".*did you mean "mplug2_pretrain"'):
        release.find("mplug2_pretrian")
    with pytest.raises(CardError, match="bytes: is None, expected a size where a sha256 is stated"):
        dataclasses.replace(release.find("mplug2_pretrain"), sha256="a" * 64)


def test_the_command_installs_a_release_and_refuses_without_a_network(
    official, wanted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(release, "find", lambda name: wanted)
    real = conversion.Options
    monkeypatch.setattr(
        conversion, "Options", lambda **said: dataclasses.replace(real(**said), settings=SETTINGS)
    )
    words = ["download", "mplug2_pretrain", "--out", str(tmp_path / "out")]
    monkeypatch.setenv("MPLUG2_OFFLINE", "1")
    assert main(words) == 2
    assert "MPLUG2_OFFLINE is set and mPLUG2_X.pth was never downloaded" in capsys.readouterr().err
    monkeypatch.delenv("MPLUG2_OFFLINE")
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "every file and array verified" in said and hashlib.sha256(official.read_bytes()).hexdigest() in said
    )
    assert "its authors state no sha256; this one was recorded" in said
    assert main(["show", str(tmp_path / "out")]) == 0
    assert "Its weights are " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vision-small", "--out", "d"], "--out is the folder of one release, given are vision-small"),
        (["mplug2_pretrain", "clip_vit_l14", "--out", "d"], "--out is the folder of one release"),
        (["mplug2_pretrain", "vision-small", "--out", "d"], "--out is the folder of one release"),
        (["vision-small", "--vocabulary", "v.txt"], "--vocabulary v.txt: travels with a release's cards"),
        (["image_qa.tiny", "--vocabulary", "v.txt"], "none is installed for image_qa.tiny"),
    ],
)
def test_an_option_that_nothing_would_heed_is_refused(words, said, capsys):
    assert main(["download", *words]) == 2
    assert said in capsys.readouterr().err


def test_what_a_recipe_lacks_is_named_with_the_commands_that_bring_it(capsys):
    hint = release.hint(released.PRETRAINED)
    assert f"mplug2 download mplug2_pretrain --out {released.PRETRAINED}" in hint
    assert f"mplug2 convert mPLUG2_Pretrain.pth --from mplug2 --out {released.PRETRAINED}" in hint
    assert release.hint("data/mine") == ""
    assert main(["download", "image_qa.tiny"]) == 0
    assert "names no cards" in capsys.readouterr().out
