"""Publishing: a page that people read, and the Hugging Face Hub."""

import dataclasses
import re
from pathlib import Path

import huggingface_hub
import pytest
from fresh import drawn

from mplug2 import hub
from mplug2.errors import CardError, DownloadError
from mplug2.hub import publishing, readme, upload
from mplug2.hub.card import Parent, Parents, Score, Trained
from mplug2.modules import vision
from mplug2.modules.forms import BitFit
from mplug2.predict import Predictor
from mplug2.tools.main import main


@pytest.fixture
def card(tmp_path):
    config = vision.tiny()
    return publishing.publish(
        tmp_path,
        "vision-a",
        "vision",
        config,
        drawn({"vision": config})["vision"],
        trained=Trained(
            recipe="r.tiny",
            commit="abc",
            steps=7,
            seed=1,
            data="digits",
            machine="2 cores",
            data_sha256="d" * 64,
        ),
        scores={"image_caption": Score(metric="exact match", value=0.9, low=0.88, high=0.92, n=1000)},
        licence="MIT",
    )


def test_the_page_states_what_a_person_asks(card, tmp_path):
    said = readme.write(tmp_path, [card]).read_text()
    for fact in ("vision-a", "MIT", card.file.sha256, "r.tiny", "7 steps", "2 cores", "clips → vision"):
        assert fact in said
    assert f"| data | digits, sha256 of a sample of the train split `{'d' * 64}` |" in said
    assert "| image_caption | exact match | 90.0% | 88.0% to 92.0% | 1000 |" in said
    assert "library_name: mplug2\nlicense: mit\n" in said and "└── decoder" in said


def test_the_pages_five_lines_run(card, tmp_path, monkeypatch):
    said = readme.write(tmp_path, [card], str(tmp_path)).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", said, re.S)
    assert len(code.splitlines()) == 5
    lines = code.splitlines()
    scope: dict = {}
    exec("\n".join(lines[:3]), scope)  # the fourth joins modules of the shelf, which are wider
    assert scope["config"] == vision.tiny()
    with pytest.raises(CardError, match="vision-a has width 32"):
        exec(lines[3], scope)


def test_the_page_of_a_delta_adapts_the_base_it_names(tmp_path, monkeypatch):
    base = hub.find("vision-small")
    config = BitFit().delta(base.config)
    params = drawn({"vision_delta": config})["vision_delta"]
    card = publishing.publish(tmp_path, "mine", "vision_delta", config, params, base=base.file.sha256)
    (code,) = re.findall(r"```python\n(.*?)```", readme.text([card], str(tmp_path)), re.S)
    two = Predictor.of("vision-small", "text-small")  # the whole family is eight modules to load
    monkeypatch.setattr(Predictor, "of", {"small": two}.get)
    scope: dict = {}
    exec("\n".join(code.splitlines()[:4]), scope)  # the fifth captions a file of the user's
    assert "vision_delta" in scope["mine"].network.configs and "vision_delta" not in scope["predictor"].params


def test_a_stranger_cannot_break_out_of_the_table(card, tmp_path):
    source = "a | b\n# Not a heading"
    said = readme.text([dataclasses.replace(card, source=source)], "x")
    assert "a \\| b # Not a heading" in said


def test_a_strangers_text_is_shown_and_never_obeyed_by_a_terminal(card, tmp_path, capsys):
    hostile = "\x1b]0;owned\x07\x1b[2J\u202ereversed\x9b1m"
    card = dataclasses.replace(card, source=hostile, paper=hostile, licence=hostile)
    card.write()
    for command in (["show", str(card.folder)], ["show", hostile], ["lock", hostile]):
        main(command)
        said = "".join(capsys.readouterr())
        assert "]0;owned" in said
        assert all(letter.isprintable() or letter == "\n" for letter in said)
    assert "\x1b" not in readme.text([card], "x")


class Api:
    """The part of huggingface_hub.HfApi that publishing uses."""

    calls: list = []

    def create_repo(self, name, exist_ok):
        self.calls.append(("repository", name))

    def upload_folder(self, repo_id, folder_path, path_in_repo, revision, commit_message):
        self.calls.append((repo_id, Path(folder_path), path_in_repo, revision))
        return type("Commit", (), {"commit_url": "https://hub/commit"})()


@pytest.fixture
def api(monkeypatch):
    monkeypatch.delenv("MPLUG2_OFFLINE", raising=False)
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return Api


def test_an_address_of_another_kind_is_refused(tmp_path, capsys):
    assert main(["publish", str(tmp_path), "--to", "ftp://foo/bar"]) == 2
    assert "--to is ftp://foo/bar, expected a directory or hf://OWNER/NAME" in capsys.readouterr().err


def test_a_folder_becomes_one_commit(api, tmp_path):
    assert upload.upload(tmp_path, "hf://me/mine@v1") == "https://hub/commit"
    assert api.calls == [("repository", "me/mine"), ("me/mine", tmp_path, None, "v1")]


def test_without_a_token_or_a_network_the_hub_is_refused_in_a_sentence(api, tmp_path, monkeypatch):
    def broken(self, *_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(Api, "create_repo", broken)
    with pytest.raises(CardError, match=r"hf://a/b: could not be published \(no route\)"):
        upload.upload(tmp_path, "hf://a/b")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(CardError, match="needs a token .*HF_TOKEN"):
        upload.upload(tmp_path, "hf://a/b")
    monkeypatch.setenv("MPLUG2_OFFLINE", "1")
    with pytest.raises(CardError, match="MPLUG2_OFFLINE is set"):
        upload.upload(tmp_path, "hf://a/b")
    with pytest.raises(DownloadError, match="is not of the form"):
        upload.upload(tmp_path, "hf://a")


MARKUP = "<script>alert(1)</script> ![x](http://h/x.png) [y](javascript:z) `a` <!-- & | \x1b]0;t\x07 \u202e"


def test_what_a_card_says_is_neither_html_nor_markdown_on_its_page(card, tmp_path):
    """In every text that a stranger may fill."""
    facts = {name: MARKUP for name in ("recipe", "commit", "data", "machine")}
    hostile = dataclasses.replace(
        card,
        licence=MARKUP,
        source=MARKUP,
        paper=MARKUP,
        trained=Trained(steps=1, seed=1, **facts),
        scores={MARKUP: Score(metric=MARKUP, value=1, low=0, high=1, n=1)},
        parents=Parents(
            method="soup", merged=(Parent(name="a", sha256="0" * 64),), settings={MARKUP: 1.0}, take=(MARKUP,)
        ),
        interface=dataclasses.replace(card.interface, reads=(MARKUP,), writes=(MARKUP,)),
    )
    page = readme.text([hostile], MARKUP)
    assert "<script" not in page and "<!--" not in page and "javascript" in page
    prose = "".join(page.split("```")[::2])
    assert re.findall(r"(?<!\\)\[[^]]*\]\(", prose) == ["[mplug2]("]
    assert page.splitlines()[2] == "license: other"
    assert all(letter.isprintable() or letter == "\n" for letter in page)
    cells = [line for line in page.splitlines() if line.startswith("| ") and MARKUP[:3] not in line]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in cells if "metric" not in line} <= {3, 6}
