"""Annotations of video data sets: files of captions, or of questions and answers -> entries, one an example.

`CaptionLines` and `QuestionLines` read the official mPLUG-2 layouts, one JSON object a line; `VideoDataInfo`
reads the public MSRVTT json. In `train` every caption is an entry of its own, and every answer that people
gave to a question; in other splits every video is one, with all of its captions, and every question. Whatever
is not as it should be is refused with the file and the line.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

from mplug2.data.inputs import opened, reason
from mplug2.errors import DataError, nearest

SPLITS = ("train", "validation", "test")

LONGEST = 10_000_000
"""The most bytes of a line of a jsonl file."""

LARGEST = 1_000_000_000
"""The most bytes of a json file, which is read as a whole."""


@dataclass(frozen=True)
class Entry:
    """An example before its video is read. `video`: the path of the file below the folder of videos, with or
    without its ending; `where`: the file and line it is from, for refusals."""

    where: str
    video: str
    captions: tuple[str, ...] = ()
    question: str = ""
    answers: tuple[str, ...] = ()


class Annotations(Protocol):
    """A layout of files below a root; `texts` names the fields of its examples."""

    @property
    def texts(self) -> tuple[str, ...]: ...

    def entries(self, root: Path, split: str) -> list[Entry]:
        """The examples of a split ("train", "validation" or "test"). Raises DataError."""
        ...


@dataclass(frozen=True, kw_only=True)
class CaptionLines:
    """Captions, a file a split ("": there is none): lines `{"video_id", "caption"}`, or `{"video_id",
    "golden_captions": [...]}` for all captions of a video."""

    train: str = "train.jsonl"
    validation: str = ""
    test: str = "test.jsonl"
    texts = ("caption", "captions")

    def entries(self, root: Path, split: str) -> list[Entry]:
        return _by_split(self._read(_file_of(self, root, split)), split)

    def _read(self, path: Path) -> Iterator[Entry]:
        for where, row in _lines(path):
            # The official documentation says "golden_caption", its code reads "golden_captions".
            name = next((name for name in ("golden_captions", "golden_caption") if name in row), "caption")
            captions = (_text(where, row, name),) if name == "caption" else tuple(_texts(where, row, name))
            yield Entry(where, _video(where, row), captions)


@dataclass(frozen=True, kw_only=True)
class QuestionLines:
    """Questions, a file a split ("": there is none): lines `{"video_id", "question", "answer"}`, or with
    `"answers": [...]`, what several people answered."""

    train: str = "train.jsonl"
    validation: str = ""
    test: str = "test.jsonl"
    texts = ("question", "answer")

    def entries(self, root: Path, split: str) -> list[Entry]:
        entries = self._read(_file_of(self, root, split))
        if split == "train":
            return [replace(one, answers=(answer,)) for one in entries for answer in one.answers]
        return list(entries)

    def _read(self, path: Path) -> Iterator[Entry]:
        for where, row in _lines(path):
            several = tuple(_texts(where, row, "answers")) if "answers" in row else ()
            answers = several or (_text(where, row, "answer"),)
            yield Entry(where, _video(where, row), (), _text(where, row, "question"), answers)


@dataclass(frozen=True, kw_only=True)
class VideoDataInfo:
    """The public MSRVTT json, `{"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}`,
    a file a split; `train_parts` and so on: what its `split` field calls the videos of a split."""

    train: str = "train_val_videodatainfo.json"
    validation: str = "train_val_videodatainfo.json"
    test: str = "test_videodatainfo.json"
    train_parts: tuple[str, ...] = ("train",)
    validation_parts: tuple[str, ...] = ("validate",)
    test_parts: tuple[str, ...] = ("test",)
    texts = ("caption", "captions")

    def entries(self, root: Path, split: str) -> list[Entry]:
        path = _file_of(self, root, split)
        return _by_split(self._read(path, getattr(self, f"{split}_parts")), split)

    def _read(self, path: Path, parts: tuple[str, ...]) -> Iterator[Entry]:
        content = _whole(path)
        parted = {
            _video(where, row): _text(where, row, "split") for where, row in _rows(path, content, "videos")
        }
        known = sorted(set(parted.values()))
        if missing := [part for part in parts if part not in known]:
            raise DataError(
                f'{path}: no video has split "{missing[0]}"; there are {", ".join(known) or "none"}'
                f"{nearest(missing[0], known)}"
            )
        for where, row in _rows(path, content, "sentences"):
            video = _video(where, row)
            if video not in parted:
                raise DataError(f'{where}: video_id "{video}" is not one of "videos"{nearest(video, parted)}')
            if parted[video] in parts:
                yield Entry(where, video, (_text(where, row, "caption"),))


def read_answers(path: str | Path) -> list[str]:
    """The candidate answers of the official `answer_list`, each once: the keys of a json object, or the
    "answer" of every line of a jsonl file. Raises DataError."""
    path = Path(path)
    if path.suffix == ".jsonl":
        return list(dict.fromkeys(_text(where, row, "answer") for where, row in _lines(path)))
    return [_checked(str(path), "answer", answer) for answer in _whole(path)]


def inside(root: Path, name: str, where: str) -> Path:
    """`root / name`. Raises DataError if the name leads out of the root; links that lie below the root are
    its owner's and are followed."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise DataError(f'{where}: "{name}" is not the path of a file below {root}')
    return root / path


def _file_of(files: Any, root: Path, split: str) -> Path:
    if split not in SPLITS:
        raise DataError(f'unknown split "{split}"; known are {", ".join(SPLITS)}{nearest(split, SPLITS)}')
    if not (name := getattr(files, split)):
        raise DataError(f"the {type(files).__name__} of {root} names no file for the {split} split")
    return inside(root, name, f"the {split} split")


def _by_split(entries: Iterable[Entry], split: str) -> list[Entry]:
    """One entry a caption for training; otherwise one a video, where it comes first."""
    if split == "train":
        return [Entry(one.where, one.video, (caption,)) for one in entries for caption in one.captions]
    videos: dict[str, Entry] = {}
    for one in entries:
        first = videos.setdefault(one.video, Entry(one.where, one.video))
        videos[one.video] = Entry(first.where, one.video, first.captions + one.captions)
    return list(videos.values())


# ------------------------------------------------------------------------------------------------------------
# JSON


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a jsonl file, each with where it is from; blank lines are passed over."""
    with opened(path) as file:
        for number in itertools.count(1):
            content = _read(path, file, LONGEST, number)
            if not content:
                return
            where = f"{path}, line {number}"
            if (text := _decoded(path, content, number)).strip():
                yield where, _object(where, text, _one_a_line)


def _whole(path: Path) -> Mapping[str, Any]:
    """The one object of a json file."""
    with opened(path) as file:
        return _object(str(path), _decoded(path, _read(path, file, LARGEST)), _one_alone)


def _read(path: Path, file: IO[bytes], most: int, line: int | None = None) -> bytes:
    """The next line of a file, or all of it, which has at most `most` bytes."""
    try:
        content = file.read(most + 1) if line is None else file.readline(most + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {reason(error)}") from None
    if len(content) > most:
        longer = f"{path} is longer" if line is None else f"{path}, line {line}: longer"
        raise DataError(f"{longer} than {most:,} bytes")
    return content


def _rows(path: Path, content: Mapping[str, Any], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of the list `name` of a json file, each with where it is from."""
    if not isinstance(rows := _field(str(path), content, name), list):
        raise DataError(f'{path}: "{name}" must be a list, it is {_kind(rows)}')
    for number, row in enumerate(rows):
        where = f"{path}, {name}[{number}]"
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: expected an object, got {_kind(row)}")
        yield where, row


def _decoded(path: Path, content: bytes, line: int = 1) -> str:
    """Text of the lines from `line` on; only the first may begin with a byte order mark."""
    try:
        return content.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        if content.startswith(b"\x1f\x8b"):
            what = "but compressed (gzip)"
        elif content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
            what = "but UTF-16, UTF-32 or no text"
        else:
            what = f"(byte 0x{content[error.start]:02X}; Latin-1?)"
        raise DataError(f"{path}, line {line}: not UTF-8 {what}; save the file as UTF-8") from None


def _object(where: str, text: str, advice: Callable[[str, Any], str]) -> Mapping[str, Any]:
    """The object that `text` is; `advice` (the text, and what it is or why it is not JSON) ends the refusal
    of anything else."""
    text = text.strip()
    try:
        row = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        said = str(error).replace(": line 1 column", " at character")
        raise DataError(f"{where}: not JSON ({said}){advice(text, error)}") from None
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object, got {_kind(row)}{advice(text, row)}")
    return row


def _one_a_line(text: str, found: Any) -> str:
    """What a line probably is that is not one object."""
    ends = isinstance(found, json.JSONDecodeError) and (
        found.pos >= len(text) or found.msg.startswith("Unterminated string")
    )
    if isinstance(found, list) or text.startswith("[") and ends:
        likely = ", and this is a JSON array"
    elif text.startswith("{") and ends:
        likely = ", and this one does not end on its line"
    elif _is_more(found):
        likely = ", and more stands on this one"
    elif "\0" in text[:4]:
        likely = ", in UTF-8, not UTF-16 or UTF-32"
    elif text[0] not in "[{" and ("," in text or "\t" in text):
        likely = ", and this may be a table (csv)"
    else:
        likely = ""
    return f"; one object a line is expected{likely}"


def _one_alone(text: str, found: Any) -> str:
    """What a file probably is that is not one object."""
    return "; one object is expected" + (", not one a line (jsonl)" if _is_more(found) else "")


def _is_more(found: Any) -> bool:
    return isinstance(found, json.JSONDecodeError) and found.msg.startswith("Extra data")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f'"{twice[:40]}" is there twice')
    return found


def _field(where: str, row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        known = ", ".join(f'"{key}"' for key in row) or "nothing"
        raise DataError(f'{where}: has no "{name}"; it has {known}')
    return row[name]


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    return _checked(where, name, _field(where, row, name))


def _texts(where: str, row: Mapping[str, Any], name: str) -> list[str]:
    texts = _field(where, row, name)
    if not isinstance(texts, list) or not texts:
        raise DataError(f'{where}: "{name}" must be a list of texts, it is {_kind(texts)}')
    return [_checked(where, name, text) for text in texts]


def _checked(where: str, name: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        quoted = f', without quotes: write "{text}"' if type(text) in (int, float) else ""
        raise DataError(f'{where}: "{name}" must be a text, it is {_kind(text)}{quoted}')
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f'{where}: "{name}" holds half of a character (a lone surrogate)')
    return text


def _video(where: str, row: Mapping[str, Any]) -> str:
    video = _text(where, row, "video_id")
    inside(Path(), video, where)
    return video


def _kind(value: Any) -> str:
    """A JSON value in words, short enough for a message."""
    if value in ("", [], {}):
        return "empty"
    said = json.dumps(value)
    return said if len(said) <= 40 else said[:40] + "..."
