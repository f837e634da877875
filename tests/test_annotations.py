"""Annotation files that are not what is expected: one sentence with the file, the line and what it is."""

import json
from pathlib import Path

import pytest

from mplug2.data import annotations
from mplug2.data.annotations import CaptionLines, QuestionLines, VideoDataInfo, read_answers
from mplug2.errors import DataError

ROW = {"video_id": "a", "caption": "é x"}
LINE = json.dumps(ROW, ensure_ascii=False)
ONE = "one object a line is expected"
STRANGE = {
    "an array on one line": (
        json.dumps([ROW, ROW]),
        f"line 1: expected an object, .*{ONE}, and this is a JSON array",
    ),
    "an array over lines": (
        json.dumps([ROW], indent=1),
        f"line 1: not JSON .*{ONE}, and this is a JSON array",
    ),
    "an array of lines": (f"[\n{LINE},\n{LINE}\n]", f"line 1: not JSON .*{ONE}, and this is a JSON array"),
    "an object over lines": (
        json.dumps(ROW, indent=2),
        f"line 1: not JSON .*{ONE}, and this one does not end on",
    ),
    "a cut line": (f"{LINE}\n{LINE[:-3]}", "line 2: not JSON .*does not end on its line"),
    "two on a line": (LINE + LINE, f"line 1: not JSON .*{ONE}, and more stands on this one"),
    "commas between lines": (f"{LINE},\n{LINE}\n", "line 1: not JSON .*more stands on this one"),
    "lines ended by CR": (f"{LINE}\r{LINE}\r", "line 1: not JSON .*more stands on this one"),
    "a table": ("video_id,caption\na,b\n", f"line 1: not JSON .*{ONE}, and this may be a table"),
    "a table of tabs": ("video_id\tcaption\na\tb\n", "line 1: not JSON .*this may be a table"),
    "Python": ("{'video_id': 'a'}", f"line 1: not JSON .*{ONE}$"),
    "UTF-16": (
        LINE.encode("utf-16"),
        "line 1: not UTF-8 but UTF-16, UTF-32 or no text; save the file as UTF-8",
    ),
    "UTF-16 without mark": (json.dumps(ROW).encode("utf-16-le"), "line 1: not JSON .*in UTF-8, not UTF-16"),
    "UTF-32": (LINE.encode("utf-32"), "line 1: not UTF-8 but UTF-16, UTF-32"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "line 1: not UTF-8 but compressed"),
    "Latin-1": (
        json.dumps(ROW).encode() + b"\n" + LINE.encode("latin-1"),
        "line 2: not UTF-8 .byte 0xE9; Latin-1",
    ),
    "NaN": ('{"video_id": "a", "caption": "x", "weight": NaN}', "line 1: not JSON .NaN is no value of JSON"),
    "infinity": (
        '{"video_id": "a", "caption": "x", "weight": -Infinity}',
        "line 1: not JSON .-Infinity is no value",
    ),
    "a name twice": (
        '{"video_id": "a", "caption": "x", "caption": "y"}',
        'line 1: not JSON ."caption" is there twice',
    ),
    "a name twice within": (
        '{"video_id": "a", "caption": "x", "of": {"b": 1, "b": 2}}',
        '"b" is there twice',
    ),
    "a number for a name": (
        '{"video_id": 7010, "caption": "x"}',
        '"video_id" must be a text, it is 7010.*write "7010"',
    ),
    "a digit too many": ('{"video_id": "a", "caption": ' + "1" * 5000 + "}", "line 1: not JSON"),
    "too deep": ('{"video_id": "a", "caption": ' + "[" * 100_000, "line 1: not JSON"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_not_one_object_a_line_is_named_with_its_line(tmp_path: Path, kind):
    content, said = STRANGE[kind]
    (tmp_path / "train.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        DataError, match=rf"train.jsonl, {said}" if said.startswith("line") else said
    ) as caught:
        CaptionLines().entries(tmp_path, "train")
    assert "train.jsonl, line" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content, said",
    [
        (f"{LINE}\n{LINE}\n", r"not JSON .*; one object is expected, not one a line \(jsonl\)"),
        ("[1, 2]", r"expected an object, got \[1, 2\]; one object is expected"),
        ("a,b\n1,2\n", "not JSON .*; one object is expected"),
        ('{"videos": [], "videos": []}', 'not JSON ."videos" is there twice'),
        ('{"videos": [{"video_id": "a", "split": "train", "from": NaN}]}', "not JSON .NaN"),
        (
            '{"videos": [{"video_id": 1, "split": "train"}]}',
            r'videos\[0\]: "video_id" must be a text, it is 1',
        ),
        ('{"videos": {', "not JSON"),
    ],
)
def test_a_json_that_is_not_one_object_is_named(tmp_path: Path, content, said):
    (tmp_path / "info.json").write_text(content)
    with pytest.raises(DataError, match=f"info.json.*{said}"):
        VideoDataInfo(train="info.json").entries(tmp_path, "train")


def test_answers_that_are_lines_in_a_json_or_an_object_in_lines_are_named(tmp_path: Path):
    (tmp_path / "answers.json").write_text('{"answer": "a"}\n{"answer": "b"}\n')
    with pytest.raises(DataError, match="answers.json: not JSON .*not one a line"):
        read_answers(tmp_path / "answers.json")
    (tmp_path / "answers.jsonl").write_text('{\n "a": 0\n}')
    with pytest.raises(DataError, match="answers.jsonl, line 1: not JSON .*does not end on its line"):
        read_answers(tmp_path / "answers.jsonl")


def test_a_mark_blank_lines_and_windows_line_ends_are_passed_over(tmp_path: Path):
    content = f"\r\n{LINE}\r\n \t\n\n{LINE}"
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode())
    entries = CaptionLines().entries(tmp_path, "train")
    assert [(one.captions, one.where[-6:]) for one in entries] == [(("é x",), "line 2"), (("é x",), "line 5")]


def test_a_line_longer_than_any_example_is_not_read_to_its_end(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(annotations, "LONGEST", 200)
    monkeypatch.setattr(annotations, "LARGEST", 200)
    long = json.dumps({"video_id": "a", "question": "x" * 200, "answer": "b"})
    (tmp_path / "train.jsonl").write_text('{"video_id": "a", "question": "b", "answer": "c"}\n' + long)
    (tmp_path / "info.json").write_text(long)
    with pytest.raises(DataError, match="train.jsonl, line 2: longer than 200 bytes"):
        QuestionLines().entries(tmp_path, "train")
    with pytest.raises(DataError, match="info.json is longer than 200 bytes"):
        VideoDataInfo(train="info.json").entries(tmp_path, "train")
