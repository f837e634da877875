"""Videos on disk: a data set of video files below a root folder, and what is said or asked about them.

`Videos(root=..., annotations=CaptionLines()).source("train")[index]` -> dict with `index`, `clips` uint8
T H W C, `video` (its id), and `caption` and `captions`, or `question` and `answer` (and `answers`, where
several people gave one). Examples of `train` are worded for a decoder to learn; in other splits captions and
answers are the truth as the file has it. The same index gives the same example in any process.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mplug2.data.annotations import Annotations, Entry, inside
from mplug2.data.augment import View, Whole
from mplug2.data.clips import read_video
from mplug2.data.inventory import Inventory, of_files
from mplug2.data.pixels import Preprocessing
from mplug2.data.wording import Plain, Wording
from mplug2.errors import DataError
from mplug2.places import Place

ENDINGS = (".mp4", ".avi", ".webm", ".mkv", ".gif")
"""What a video's id is completed with, in this order; an id may also have its ending already."""


@dataclass(frozen=True, kw_only=True)
class Videos:
    """`root`: the folder that holds all files; `videos`: the folder of videos below it. `sampling` and `view`
    say what is seen of a video, `train_sampling` and `train_view` what of a training one (names as in
    `clips.frame_indices`), drawn anew in every epoch. `passes`: how often a train epoch comes to every
    example, with other frames and another view each time. Raises DataError as `source` reads the
    annotations."""

    root: Place
    annotations: Annotations
    videos: str = "videos"
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    sampling: str = "uniform"
    train_sampling: str = "random"
    view: View = Whole()  # noqa: B008  frozen
    train_view: View = Whole()  # noqa: B008  frozen
    wording: Wording = Plain()  # noqa: B008  frozen
    passes: int = 1
    seed: int = 0

    def example(self) -> dict[str, Any]:
        """What an example looks like, for whoever needs only its fields and shapes; reads no file."""
        size = self.preprocessing
        clips = np.zeros((size.frames, size.height, size.width, 3), np.uint8)
        texts = {name: ("",) if name == "captions" else "" for name in self.annotations.texts}
        return {"index": 0, "video": "", "clips": clips, **texts}

    def source(self, split: str) -> "VideoSource":
        """Examples of a split, by index; a Grain random-access source. Raises DataError on annotations that
        cannot be read, and on videos that are not there."""
        root, entries = Path(self.root), self._entries(split)
        folder = inside(root, self.videos, f"the videos of {root}")
        files = {video: _file(folder, video) for video in {entry.video for entry in entries}}
        missing = [entry for entry in entries if files[entry.video] is None]
        if missing:
            count = sum(file is None for file in files.values())
            raise DataError(
                f'{missing[0].where}: no video "{missing[0].video}" in {folder} ({", ".join(ENDINGS)}); '
                f"of {len(files)} videos of the {split} split, {count} are missing"
            )
        return VideoSource(self, split, entries, {video: str(path) for video, path in files.items()})

    def written(self, split: str) -> "VideoSource":
        """The same source for its `texts` alone: no video has to be there."""
        return VideoSource(self, split, self._entries(split), {})

    def inventory(self, split: str) -> Inventory:
        """What a run remembers of a split. Raises DataError."""
        source, said = self.source(split), hashlib.sha256()
        for entry in source.entries:
            said.update(repr((entry.video, entry.captions, entry.question, entry.answers)).encode())
        name = str(getattr(self.annotations, split, "") or "the annotations")
        return of_files(len(source), {name: said.hexdigest()}, source.files)

    def _entries(self, split: str) -> tuple[Entry, ...]:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(
                f'there is no folder "{root}" (data.root): put the annotations there, '
                f'{getattr(self.annotations, split, "")}, and the videos into "{root / self.videos}" '
                f"({', '.join(ENDINGS)})"
            )
        entries = self.annotations.entries(root, split)
        if not entries:
            raise DataError(f"the {split} split of {root} holds no example")
        return tuple(entries)


@dataclass(frozen=True)
class VideoSource:
    """Examples of one split; a video is read when it is asked for. Raises DataError on one that cannot be."""

    data: Videos
    split: str
    entries: tuple[Entry, ...] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)  # by id

    def __len__(self) -> int:
        return len(self.entries) * (self.data.passes if self.split == "train" else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> dict[str, Any]:
        """The example as it is seen when the data come round for the `epoch`-th time, counted from 0."""
        entry, data, rng = self._entry(index), self.data, self._random(index + epoch * len(self))
        training = self.split == "train"
        how = data.train_sampling if training else data.sampling
        frames = read_video(self.files[entry.video], data.preprocessing.frames, how, rng)
        clips = (data.train_view if training else data.view)(frames, data.preprocessing, rng)
        texts = self.texts(index)
        if training and "answer" in texts:
            texts["answer"] = data.wording.answer(texts["answer"])
        if training and "caption" in texts:
            texts["caption"] = data.wording.caption(texts["caption"])
        return {"index": index, "video": entry.video, "clips": clips, **texts}

    def texts(self, index: int) -> dict[str, Any]:
        """The texts of an example without its video: the question as it is asked, the truth as the file has
        it; `caption` is the first of `captions`, `answer` the commonest of `answers`."""
        entry = self._entry(index)
        if entry.captions:
            return {"caption": entry.captions[0], "captions": entry.captions}
        asked = self.data.wording.question(entry.question, self.split)
        commonest, _ = Counter(entry.answers).most_common(1)[0]
        several = {"answers": entry.answers} if len(entry.answers) > 1 else {}
        return {"question": asked, "answer": commonest} | several

    def _entry(self, index: int) -> Entry:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.entries[index % len(self.entries)]

    def _random(self, index: int) -> Random:
        key = f"{self.data.seed}/{self.split}/{index}".encode()
        return Random(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()))


def _file(folder: Path, video: str) -> Path | None:
    ended = Path(video).suffix.lower() in ENDINGS
    names = [video] if ended else [video + ending for ending in ENDINGS]
    return next((folder / name for name in names if (folder / name).is_file()), None)
