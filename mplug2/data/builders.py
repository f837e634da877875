"""TFDS builder of the validation and test examples of handwriting: array_record files of encoded PNGs, no
TensorFlow.

`prepared(data, split)` -> a random-access source of raw examples; the data set is built on first use. Each
view, number of frames and canvas is one config in `data_dir()/handwriting/<config>/<version>/`, in the
standard TFDS layout, which `tfds.builder_from_directory` reads as well. It is written beside its place and
renamed into it: a crash leaves nothing half-written, and of two processes at once the first to finish wins.
"""

import contextlib
import dataclasses
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from mplug2.data.handwriting import TEXT_VIEWS, VIEWS, Composed, Handwriting
from mplug2.data.scenes import render
from mplug2.errors import DataError

VERSION = "1.1.0"  # raise it with every change to what scenes look like or sentences say
EXAMPLES = {"validation": 600, "test": 1000}
GALLERY = {"image": 200, "video": 100}  # distinct captions of the "retrieval" view


def data_dir() -> Path:
    """Where data sets are kept: `$MPLUG2_HOME/data`, or `~/.cache/mplug2/data`."""
    return Path(os.environ.get("MPLUG2_HOME") or Path.home() / ".cache" / "mplug2").expanduser() / "data"


def prepared(data: Handwriting, split: str) -> "Prepared":
    """The built examples of `data`, "validation" or "test". Raises DataError if they can be neither read nor
    written."""
    place = data_dir() / HandwritingBuilder.name / _config(data).name / VERSION
    try:
        if not place.exists():
            _build(data, place)
        decoders = {} if data.view in TEXT_VIEWS else {"clips": _Frames()}
        builder: Any = tfds.builder_from_directory(place)  # TFDS's decorators hide its parameters' names
        return Prepared(builder.as_data_source(split=split, decoders=decoders), _config(data).data, split)
    except OSError as error:
        raise DataError(
            f"cannot keep handwriting in {place}: {error.strerror or error}; set MPLUG2_HOME"
        ) from None


class Prepared:
    """Examples of one split, read from array_record; the same fields as composed ones, and `boxes` float32
    (digits, T, 4): top, left, bottom, right in 0..1."""

    def __init__(self, records: Any, data: Handwriting, split: str):
        self._records, self._data, self._split = records, data, split

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = {"index": index}
        for name, value in self._records[index].items():
            if isinstance(value, bytes):
                value = value.decode()
            example[name] = int(value) if name == "label" else value
        return example

    def fits(self, index: int) -> frozenset[str]:
        """As of composed examples: all texts that hold of its scene."""
        return Composed(self._data, self._split).fits(_kept(self._data, self._split)[index])


@functools.cache
def _kept(data: Handwriting, split: str) -> tuple[int, ...]:
    """The composed examples that a split is made of: the first, of a gallery those with a new caption."""
    if data.view != "retrieval":
        return tuple(range(EXAMPLES[split]))
    composed, first, index = Composed(data, split), dict[str, int](), 0
    while len(first) < GALLERY["image" if data.frames == 1 else "video"]:
        first.setdefault(composed.texts(index)["caption"], index)
        index += 1
    return tuple(first.values())


class _Frames(tfds.decode.Decoder):
    """PNG bytes of T frames -> uint8 T H W C, by Pillow; TFDS's own decoding asks for OpenCV on every
    terminal."""

    def decode_example(self, serialized_example: Any) -> np.ndarray:
        return self.decode_batch_example_np(serialized_example)

    def decode_batch_example_np(self, frames: Iterable[bytes]) -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(frame), formats=("PNG",))) for frame in frames])


@dataclasses.dataclass(kw_only=True)
class HandwritingConfig(tfds.core.BuilderConfig):
    """The builder's config of one view."""

    data: Handwriting


def _config(data: Handwriting) -> HandwritingConfig:
    return _config_of(data.view, data.frames, data.canvas)  # not of the size and seed of train epochs


@functools.cache  # TFDS compares the configs it knows by identity
def _config_of(view: str, frames: int, canvas: int) -> HandwritingConfig:
    data = Handwriting(view, frames, canvas)
    return HandwritingConfig(name=f"{view}_{frames}x{canvas}", version=tfds.core.Version(VERSION), data=data)


class HandwritingBuilder(tfds.core.GeneratorBasedBuilder):
    """Handwriting scenes from the validation and test glyphs, in the order in which they are composed."""

    name = "handwriting"
    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [_config(Handwriting(view, frames)) for view in VIEWS for frames in (1, 4)]
    builder_config: HandwritingConfig

    def _info(self) -> tfds.core.DatasetInfo:
        data, text = self.builder_config.data, tfds.features.Text()
        fields: dict[str, Any] = {}
        for name, value in Composed(data, "test").draw(0)[1].items():
            fields[name] = text if isinstance(value, str) else tfds.features.Scalar(np.int32)
        if data.view not in TEXT_VIEWS:
            picture = tfds.features.Image(shape=(data.canvas, data.canvas, 3), encoding_format="png")
            fields["clips"] = tfds.features.Sequence(picture)
            fields["boxes"] = tfds.features.Tensor(shape=(None, data.frames, 4), dtype=np.float32)
        features = tfds.features.FeaturesDict(fields)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Real handwritten digits (UCI, via scikit-learn) composed into scenes.",
            features=features,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {split: self._generate_examples(split) for split in EXAMPLES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        data = self.builder_config.data
        for place, index in enumerate(_kept(data, split)):
            scene, fields = Composed(data, split).draw(index)
            if data.view not in TEXT_VIEWS:
                fields["clips"] = [_png(frame) for frame in render(scene)]
                fields["boxes"] = scene.boxes()
            yield place, fields


def _png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    return file.getvalue()


def _build(data: Handwriting, place: Path) -> None:
    """Writes the data set beside `place`, then renames it there unless another process was faster."""
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="incomplete.", dir=place.parent))
    try:
        builder = HandwritingBuilder(data_dir=scratch, config=_config(data), file_format="array_record")
        skip = tfds.download.DownloadConfig(compute_stats=tfds.download.ComputeStatsMode.SKIP)
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads, which it does not
            builder.download_and_prepare(download_config=skip)
        try:
            os.rename(builder.data_path, place)
        except OSError:
            if not place.exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
