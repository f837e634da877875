"""Handwriting as raw examples: composed for training, built by TFDS for validation and test."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug2.data.builders import VERSION
from mplug2.data.handwriting import TEXT_VIEWS, VIEWS, Composed, Handwriting
from mplug2.errors import DataError

FIELDS = {
    "digit": {"caption", "label"},
    "caption": {"caption"},
    "describe": {"text"},
    "question": {"question", "answer", "type"},
    "scene": {"caption", "text", "question", "answer", "type"},
    "retrieval": {"caption"},
    "text": {"text"},
    "entail": {"text", "label"},
    "text_question": {"text", "target", "type"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    place = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLUG2_HOME", str(place))
        yield place


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_has_its_fields(view, frames):
    example = Handwriting(view, frames).source("train")[5]
    assert set(example) == FIELDS[view] | {"index"} | (set() if view in TEXT_VIEWS else {"clips"})
    if view not in TEXT_VIEWS:
        assert example["clips"].shape == (frames, 32, 32, 3)


def test_an_example_is_a_function_of_view_seed_and_index():
    data = Handwriting("caption")
    assert_same(data.source("train")[7], Handwriting("caption", examples=10).source("train")[7])
    for other in (data.source("train")[8], Handwriting("caption", seed=1).source("train")[7]):
        assert not np.array_equal(data.source("train")[7]["clips"], other["clips"])


def test_half_of_the_descriptions_are_of_one_digit_and_some_are_plain():
    source = Handwriting("describe").source("train")
    counts = [len(source.draw(index)[0].digits) for index in range(1000)]
    assert abs(counts.count(1) / 1000 - 0.5) < 0.06
    plain = sum(len(source.texts(index)["text"].split()) == 2 for index in range(1000))
    assert plain > 50


def test_an_unknown_view_or_split_names_the_nearest():
    with pytest.raises(DataError, match='unknown view "captions".*did you mean "caption"'):
        Handwriting("captions")
    with pytest.raises(DataError, match='unknown split "valid".*did you mean "validation"'):
        Handwriting("caption").source("valid")


@pytest.mark.parametrize("view, frames", [("question", 1), ("question", 4), ("entail", 1)])
def test_built_examples_equal_composed_ones(home: Path, view, frames):
    built = Handwriting(view, frames).source("test")
    composed = Composed(Handwriting(view, frames), "test")
    assert len(built) == 1000 and len(Handwriting(view, frames).source("validation")) == 600
    for index in (0, 1, 10, 100, 999):
        example = built[index]
        boxes = example.pop("boxes", None)
        assert_same(example, composed[index])
        if view not in TEXT_VIEWS:
            np.testing.assert_array_equal(boxes, composed.draw(index)[0].boxes())


def test_built_scenes_show_only_glyphs_of_their_split(home: Path):
    from mplug2.data.glyphs import bank

    used = {
        digit.glyph
        for index in range(500)
        for digit in Composed(Handwriting("caption"), "test").draw(index)[0].digits
    }
    assert max(used) < 300 and len(bank("test", 8).scans) == 300


@pytest.mark.parametrize("frames, size", [(1, 200), (4, 100)])
def test_the_retrieval_gallery_has_distinct_captions(home: Path, frames, size):
    source = Handwriting("retrieval", frames).source("test")
    captions = [source[index]["caption"] for index in range(len(source))]
    assert len(captions) == len(set(captions)) == size


def test_a_built_set_reads_as_a_standard_tfds_directory(home: Path):
    Handwriting("digit").source("test")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(home / "data" / "handwriting" / "digit_1x32" / VERSION)
    assert builder.info.splits["test"].num_examples == 1000
    features: Any = builder.info.features
    assert set(features) == {"caption", "label", "clips", "boxes"}
    assert "tensorflow" not in sys.modules


def test_two_processes_building_at_once_leave_one_whole_set(tmp_path: Path):
    code = (
        "from mplug2.data.handwriting import Handwriting\n"
        "source = Handwriting('text').source('test')\n"
        "print(len(source), source[999]['text'])"
    )
    command = [sys.executable, "-c", code]
    environ = {"MPLUG2_HOME": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    both = [
        subprocess.Popen(
            command, cwd=root, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    printed = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert printed[0][0] == printed[1][0] and printed[0][0].startswith("1000 a ")
    assert [path.name for path in (tmp_path / "data" / "handwriting" / "text_1x32").iterdir()] == [VERSION]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPLUG2_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot keep handwriting in .*file.*MPLUG2_HOME"):
        Handwriting("text").source("test")
