"""What a training split held is remembered: a run notices that it is another, and is not misled by a move."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug2.data.annotations import CaptionLines
from mplug2.data.inventory import changes, inventory
from mplug2.data.videos import Videos


def lines(root: Path, *captions: str) -> None:
    rows = [json.dumps({"video_id": f"v{n}", "caption": caption}) for n, caption in enumerate(captions)]
    (root / "train.jsonl").write_text("".join(f"{row}\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "ds" / "videos").mkdir(parents=True)
    for number in range(4):
        (tmp_path / "ds" / "videos" / f"v{number}.mp4").write_bytes(bytes(100 + number))
    lines(tmp_path / "ds", "one", "two", "three", "four")
    return tmp_path / "ds"


def taken(root: Path) -> Any:
    return inventory(Videos(root=str(root), annotations=CaptionLines()), "train", "it")


def rewritten(root: Path) -> None:
    text = (root / "train.jsonl").read_text()
    (root / "train.jsonl").write_text(text.replace(": ", ":") + "\n\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda root: lines(root, "one", "two"),
            "has another content; it has 2 examples, and had 4",
        ),
        (lambda root: lines(root, "one", "two", "thre", "four"), "train.jsonl has another content"),
        (
            lambda root: (root / "videos" / "v1.mp4").write_bytes(bytes(50)),
            "4 of 355 bytes, and were 4 of 406",
        ),
        (
            lambda root: (
                (root / "videos" / "v0.mp4").write_bytes(bytes(101)),
                (root / "videos" / "v1.mp4").write_bytes(bytes(100)),
            ),
            "its other files have other names or sizes",
        ),
        (rewritten, ""),
        (lambda root: (root / "videos" / "unused.mp4").write_bytes(b"x"), ""),
    ],
)
def test_what_changed_is_said(change, said, root):
    before = taken(root)
    change(root)
    told = "; ".join(changes(before, taken(root)))
    assert said in told and bool(said) == bool(told)


def test_data_that_was_moved_is_the_same(root):
    before = taken(root)
    root.rename(root.parent / "moved")
    assert changes(before, taken(root.parent / "moved")) == []


@dataclass
class Rows:
    rows: list[Any]

    def source(self, split: str) -> Any:
        return self.rows


class Random(list):
    def __getitem__(self, index: Any) -> Any:
        return {"index": index, "clips": np.random.default_rng().integers(0, 255, 12)}


def rows(*values: int) -> Rows:
    return Rows([{"index": n, "label": value, "x": np.full(3, value)} for n, value in enumerate(values)])


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (rows(1, 2, 3), rows(1, 2), ["it has 2 examples, and had 3"]),
        (rows(1, 2, 3), rows(1, 2, 4), ["of 3 examples some have another content"]),
        (rows(1, 2, 3), rows(1, 2, 3), []),
        (Rows(Random([0] * 5)), Rows(Random([0] * 5)), []),  # nothing is said of what is never the same
        (Rows(Random([0] * 5)), Rows(Random([0] * 4)), ["it has 4 examples, and had 5"]),
    ],
)
def test_data_of_a_users_own_is_known_by_its_number_and_some_examples(before, now, said):
    assert changes(inventory(before, "train", "it"), inventory(now, "train", "it")) == said
