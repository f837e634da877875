"""What the shell hands over: misspelt words, bytes that are no text, numbers that are none, and variables."""

import json
import os
import sys

import pytest
from PIL import Image

from mplug2 import environment, files
from mplug2.arguments import Parser, UsageError, at_least
from mplug2.errors import DownloadError, Mplug2Error
from mplug2.tools.main import COMMANDS, main


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a command says to words that it does not take."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("mplug2: error: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["predict", "--imge", "a.png"], "--image"),
        (["predict", "--imge=a.png"], "--image"),
        (["train", "image_caption", "--run-dri", "x"], "--run-dir"),
        (["eval", "--limt", "3"], "--limit"),
        (["publish", "run", "--modul", "x", "--tto", "y"], "--to"),
        (["compose", "--visoin", "a"], "--vision"),
        (["bench", "step", "--treads", "3"], "--threads"),
        (["cache", "lsit"], "list"),
        (["cache", "prune", "--day", "1", "--dayz", "2"], "--days"),
        (["bench", "generate", "--size", "tinny"], "tiny"),
        (["eval", "--split", "tset"], "test"),
        (["predikt"], "predict"),
        (["quikstart"], "quickstart"),
        (["recipes", "--hlep"], "--help"),
    ],
)
def test_a_misspelt_word_gets_the_nearest_name(words, name, capsys):
    assert f'(did you mean "{name}"?)' in refused(words, capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_takes_an_option_that_it_does_not_have(command, capsys):
    action = {"bench": ["step"], "cache": ["list"]}.get(command, [])
    assert 'there is no option "--nonsense"' in refused([command, *action, "--nonsense"], capsys)


def parser() -> Parser:
    made = Parser(prog="x")
    made.add_argument("words", nargs="*")
    made.add_argument("--text")
    made.add_argument("--image", required=True)
    made.add_argument("--note", default="")
    made.add_argument("--count", type=int)
    made.add_argument("--share", type=float)
    made.add_argument("--least", type=at_least(1))
    return made


def test_what_argparse_takes_is_taken_still():
    found = parser().parse_args(
        ["-", "a=-1", "--ima", "x", "--text", "--is it --so", "--note", "", "--share", "-1.5"]
    )
    assert found.words == ["-", "a=-1"] and found.image == "x" and found.share == -1.5
    assert found.text == "--is it --so" and found.note == ""
    assert parser().parse_args(["--image", "x", "--", "--imge"]).words == ["--imge"]
    assert parser().parse_args(["--image", "x", "--count", "-3", "--share", "1e-3"]).count == -3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", ""], "argument --image: expected a value, got an empty word"),
        (["--image", " \t"], "got an empty word"),
        (["--image", "x", ""], "argument words: expected a value"),
        (["--image", "x", "--text", "caf\udce9"], "is not UTF-8"),
        (["--image", "x", "--text", "a\0b"], "is not UTF-8"),
        (["--image", "x", "--count", "1e3"], 'expected a whole number, got "1e3"'),
        (["--image", "x", "--count", "9" * 6000], "expected a whole number"),
        (["--image", "x", "--count", str(1 << 63)], "expected a whole number"),
        (["--image", "x", "--count", "nan"], "expected a whole number"),
        (["--image", "x", "--share", "nan"], 'expected a finite number, got "nan"'),
        (["--image", "x", "--share", "1e999"], "expected a finite number"),
        (["--image", "x", "--share=-inf"], "expected a finite number"),
        (["--image", "x", "--share", "half"], "expected a finite number"),
        (["--image", "x", "--least", "0"], "expected at least 1, got 0"),
        ([], "the following arguments are required: --image"),
        (["--image"], "expected one argument"),
    ],
)
def test_words_that_mean_nothing_are_one_sentence(words, said):
    with pytest.raises(UsageError) as refusal:
        parser().parse_args(words)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_file_is_taken_by_whatever_bytes_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (9, 9)).save(name)
    assert parser().parse_args(["--image", name]).image == name
    assert parser().parse_args([f"--image={name}"]).image == name


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--image", "a.png", "--question", "caf\udce9"],
        ["predict", "--image", "a.png", "--classes", "caf\udce9,tea"],
        ["predict", "--image", "caf\udce9.png"],
        ["predict", "caf\udce9", "--image", "a.png"],
        ["train", "image_caption.tiny", "--run-dir", "runs/\udce9"],
        ["train", "image_caption.tiny", "modes.vision=\udce9"],
        ["show", "\udcff"],
        ["\udcff"],
        ["predict", "--image", "a.png", "--classes", ""],
        ["predict", "--image", "a.png", "--classes", "a,,b"],
        ["predict", "--image", "a.png", "--classes", "a,b,a"],
        ["predict", "--image", ""],
        ["predict", "--image", "x" * 5000],
        ["predict", "--image", "-"],
        ["predict", "-", "--image", "a.png"],
        ["eval", "--limit", "-1"],
        ["quickstart", "--limit", "-1"],
        ["plan", "image_caption.tiny", "--batches-times", "nan"],
        ["cache", "prune", "--days", "inf"],
        ["train", "image_caption.tiny", "--steps", "1e999"],
        ["train", "image_caption.tiny", "--steps", "-1"],
        ["train", "image_caption.tiny", ""],
    ],
    ids=lambda words: " ".join(words)[:60].encode("ascii", "backslashreplace").decode(),
)
def test_the_shell_may_hand_over_anything(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(words, capsys)
    assert all(letter.isprintable() for letter in said[:-1]) and not list(tmp_path.iterdir())


# --- variables and limits


@pytest.mark.parametrize("value", ["foo", "", "0", "-3", "1.5", "\u0663"])
def test_a_number_of_devices_that_is_none_is_refused(value, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", value)
    assert f'JAX_NUM_CPU_DEVICES is "{value}", expected' in refused(["recipes"], capsys)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError('Invalid value "big" for JAX flag jax_memory'), "JAX refuses JAX_MEMORY=big: Invalid"),
        (
            ValueError("invalid truth value 'maybe' for environment 'JAX_MEMORY'"),
            "JAX refuses JAX_MEMORY=big",
        ),
        (
            RuntimeError("Unable to initialize backend 'x': no\nsuch"),
            "JAX cannot use JAX_PLATFORMS=x: Unable",
        ),
    ],
)
def test_what_jax_says_of_a_variable_is_one_sentence(error, said, monkeypatch, capsys):
    class Tool:
        @staticmethod
        def main(argv: list[str]) -> None:
            raise error

    monkeypatch.setenv("JAX_MEMORY", "big")
    monkeypatch.setenv("JAX_PLATFORMS", "x")
    monkeypatch.setitem(sys.modules, "mplug2.tools.train", Tool)
    assert said in refused(["train"], capsys)
    assert environment.said_by_jax(ValueError("something else")) == ""


def test_flags_are_tried_where_a_mistake_ends_no_work_of_ours(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_nonsense=3")
    monkeypatch.delitem(sys.modules, "jax")
    with pytest.raises(Mplug2Error, match="XLA refuses XLA_FLAGS=--xla_nonsense=3: Unknown flag"):
        environment.check("recipes")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    environment.check("recipes")


def test_too_few_open_files_are_said_before_the_work(monkeypatch):
    import resource

    given, limits = [], (64, 100)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: given.append(both))
    with pytest.raises(Mplug2Error, match="100 files may be open at once, expected 128 or more"):
        environment.check("train")
    environment.check("recipes")
    limits = (64, resource.RLIM_INFINITY)
    environment.check("train")
    assert given == [(100, 100), (4096, resource.RLIM_INFINITY)]


def test_a_cache_is_a_folder(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPLUG2_CACHE", str(tmp_path / "file"))
    assert "is a file, expected a folder for the cache" in refused(["cache", "list"], capsys)
    monkeypatch.setenv("MPLUG2_CACHE", "~nobody-of-that-name/cache")
    with pytest.raises(DownloadError, match="name one by MPLUG2_CACHE"):
        files.cache_folder()
    monkeypatch.setenv("MPLUG2_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "mplug2"


def test_json_of_a_file_with_a_strange_name_is_json(tmp_path, monkeypatch, capsys):
    class Silent:
        length = 32
        image = staticmethod(lambda path: __import__("numpy").zeros((1, 1, 2, 2, 3), "uint8"))
        caption = staticmethod(lambda clips: ["a\x1b[31m\rb"] * len(clips))
        unknown = staticmethod(lambda text: [])
        is_cut = staticmethod(lambda text: False)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mplug2.tools.predict.open_predictor", lambda source, **_: Silent)
    names = [os.fsdecode(b"caf\xe9.png"), "b\x1b.png"]
    for name in names:
        (tmp_path / name).touch()
    several = [word for name in names for word in ("--image", name)]
    assert main(["predict", *several, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": name, "caption": "a\x1b[31m\rb"} for name in names
    ]
    assert main(["predict", *several]) == 0
    said = capsys.readouterr().out
    assert said == "caf\\udce9.png:\na\\u001b[31m b\nb\\u001b.png:\na\\u001b[31m b\n"
