"""What tests of the converter share: an official checkpoint in small, and the ways there and back."""

import functools
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from torch_writer import save

from mplug2.convert import conversion, families, reversal
from mplug2.convert.shapes import read_settings

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = read_settings(GOLDEN / "oracle" / "qa_stride2.json")


def released() -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the released large model."""
    keys = {}
    for line in (GOLDEN / "large_keys.txt").read_text().splitlines():
        found = re.match(r"(\S+) \((.*?)\) \S+(?: i=(\d+\.\.\d+))?", line)
        assert found, line
        name, shape, span = found.groups()
        first, last = map(int, (span or "0..0").split(".."))
        sizes = tuple(int(size) for size in shape.split(",") if size.strip())
        keys |= {name.replace("{i}", str(number)): sizes for number in range(first, last + 1)}
    return keys


@functools.cache
def official() -> dict[str, np.ndarray]:
    """A small official state dict with every kind of key, dead and tied ones too. Do not write to it."""
    live = load_file(GOLDEN / "oracle" / "qa_stride2.params.safetensors")
    head, words = "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings.weight"
    return live | {
        f"{head}.decoder.weight": live[words],
        f"{head}.decoder.bias": live[f"{head}.bias"],
        "text_encoder.embeddings.position_ids": np.arange(48)[None],
        "text_decoder.bert.embeddings.position_ids": np.arange(48)[None],
        "visual_encoder.token_embedding.weight": np.full((16, 64), 0.5, np.float32),
        "visual_encoder.logit_scale": np.array(4.6, np.float32),
        "visual_encoder.visual.proj": np.ones((64, 32), np.float32),
        "text_decoder.bert.encoder.layer.0.latents": np.ones((50, 64), np.float32),
    }


@functools.cache
def official_model() -> families.Model:
    return families.mplug2(shapes_of(official()), SETTINGS)


def options(**changes) -> conversion.Options:
    return conversion.Options(**({"name": "qa", "settings": SETTINGS} | changes))


def convert(tmp_path, tensors, family="mplug2", *, out="out", **changes):
    path = save(tmp_path / "x.pth", {"model": tensors, "epoch": 9})
    return conversion.convert(path, family, tmp_path / out, options(**changes))


def back(tmp_path, family="mplug2") -> dict[str, np.ndarray]:
    reversal.revert(tmp_path / "out", family, tmp_path / "back.safetensors")
    return load_file(tmp_path / "back.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype and one[key].shape == other[key].shape, key
        assert one[key].tobytes() == other[key].tobytes(), key


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def vocabulary(folder, tensors) -> int:
    """Writes a vocab.txt for the tensors' words; returns their number."""
    size = len(tensors["text_encoder.embeddings.word_embeddings.weight"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(size - 5))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return size


def bert(tensors) -> dict[str, np.ndarray]:
    layers = {
        key.replace("text_encoder.", "bert."): t
        for key, t in tensors.items()
        if key.startswith("text_encoder.")
    }
    return {key: tensor for key, tensor in layers.items() if not re.search("cross|vision|latents", key)}
