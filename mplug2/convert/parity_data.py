"""Parity of what stands before and after a network: pixels, frames, texts, ids, learning rates.

The official code's own, as `mplug2.data` and `OfficialAdamW` reproduce them, against a folder's
`aux_tensors.safetensors` and `aux.json` (with `vocab.txt`). Of frames, texts and ids, those that differ are
counted.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2 import optim
from mplug2.convert.recorded import Check, Result, Tensors, worst_error
from mplug2.data.augment import OFFICIAL_CHANGES, OfficialCrop, OfficialWhole
from mplug2.data.clips import frame_indices
from mplug2.data.pixels import CLIP_MEAN, CLIP_STD, Preprocessing
from mplug2.data.resample import bicubic, nearest
from mplug2.data.wording import official_caption, official_question
from mplug2.data.wordpiece import TOKENS, OfficialWordPiece
from mplug2.recipe import OfficialAdamW
from mplug2.roles import PAD

GREY_LEVEL = 1.0
"""What a change of colours may differ by: halves are rounded to one side or the other."""
GREY_SHARE = 0.02
"""Of how many of its pixels."""
RATE = 1e-4
"""Of learning rates, relative: the official ones were computed in double precision."""
NO_TEXT = "ids without the text that they were cut from: tests of mplug2.data cut one that begins so"
NOT_USED = "no official recipe crops so, and the zoo has no such view"


def compare_pixels(result: Result, tensors: Tensors, atol: float) -> None:
    """The official views `tf.*` of one recorded clip, uint8 `T H W C`."""
    if "tf.clip_uint8" not in tensors:
        return
    made = _views(tensors)
    for name, view in made.items():
        if name not in tensors:
            continue
        if name.startswith("tf.aug_M5."):
            apart = np.abs(view.astype(np.float64) - tensors[name])
            result.checks.append(Check("aux_tensors", name, float(apart.max()), GREY_LEVEL))
            share = float((apart > 0).mean())
            result.checks.append(Check("aux_tensors", f"{name}, share of pixels", share, GREY_SHARE))
        else:
            allowed = atol if view.dtype == np.float32 else 0.0
            result.checks.append(Check("aux_tensors", name, worst_error(view, tensors[name]), allowed))
    inputs = {"tf.clip_uint8", "tf.crop_ijhw"}
    for name in sorted(key for key in tensors if key.startswith("tf.") and key not in made.keys() | inputs):
        result.unused.append(("aux_tensors", name, NOT_USED))


class Unchanging(Random):
    """Draws, of the official changes, the one that changes nothing: what is left of the view is its crop."""

    def choices(self, population: Any, *arguments: Any, k: int = 1, **named: Any) -> list[Any]:
        return ["Identity"] * k


def _views(tensors: Tensors) -> dict[str, np.ndarray]:
    clip = tensors["tf.clip_uint8"]
    top, left, rows, columns = map(int, tensors["tf.crop_ijhw"])
    part = clip[:, top : top + rows, left : left + columns]
    height, width = tensors["tf.test.resized"].shape[1:3]
    size = Preprocessing(height=height, width=width, mean=CLIP_MEAN, std=CLIP_STD)
    whole = OfficialWhole()(clip, size, Random(0))
    exact = columns / rows
    crop = OfficialCrop(area=(1.0, 1.0), ratio=(exact, exact), flip=0.0, changes=1)
    before = tensors["tf.aug_M5.Identity"]
    return {
        "tf.test.resized": whole,
        "tf.test.final": np.asarray(size.to_float(jnp.asarray(whole)[None]))[0].transpose(3, 0, 1, 2),
        "tf.resized_crop.nearest": nearest(part, height, width),
        "tf.resized_crop.bicubic": np.trunc(bicubic(part, height, width)).astype(np.int64),
        "tf.resized_crop.bicubic.after_uint8_cast": crop(part, size, Unchanging(0)),
    } | {f"tf.aug_M5.{name}": change(before) for name, change in OFFICIAL_CHANGES.items()}


# -----------------------------------------------------------------------------------------------------------
# aux.json: frames, texts, ids, learning rates


class OfficialGenerators(Random):
    """The official code's two: Python's for an interval, NumPy's for a whole clip, seeded alike."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.whole = np.random.RandomState(seed)

    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        return [population[place] for place in self.whole.permutation(len(population))[:k].tolist()]


def compare_texts(result: Result, folder: Path, said: Mapping[str, Any]) -> None:
    """Everything of aux.json that `said` has."""
    compared: dict[str, Callable[[Any], bool]] = {
        "frames_middle": lambda it: frame_indices(it[1], it[0], "middle").tolist() == it[2],
        "frames_rand": lambda it: (
            frame_indices(it[1], it[0], "official_random", OfficialGenerators(it[2])).tolist() == it[3]
        ),
        "pre_caption": lambda it: official_caption(it[0], it[1]) == it[2],
        "pre_question": lambda it: official_question(it[0], it[1]) == it[2],
    }
    for name, right in compared.items():
        if name in said:
            result.checks.append(_counted(name, said[name], right))
    _compare_ids(result, folder / "vocab.txt", said)
    if "tokenizer_truncation20" in said:
        result.unused.append(("aux", "tokenizer_truncation20", NO_TEXT))
    for loop in said.get("lr", ()):
        error = _rates_error(loop)
        result.checks.append(Check("aux", f"lr, {loop['loop']}", error, RATE))


def _compare_ids(result: Result, vocabulary: Path, said: Mapping[str, Any]) -> None:
    fields = [name for name in ("tokenizer", "prompt_length") if name in said]
    if not vocabulary.is_file():
        result.unused += [("aux", name, "there is no vocab.txt") for name in fields]
        return
    words = OfficialWordPiece(str(vocabulary))

    def in_full(it: Any) -> bool:
        ids = words.encode(it["text"], len(it["input_ids"]) + 1).tolist()
        return ids == it["input_ids"] + [PAD] and words.decode(ids) == _without_marks(it["decoded"])

    def prompted(it: tuple[str, int]) -> bool:
        return replace(words, prompt=it[0]).prompt_length == it[1]

    if "tokenizer" in fields:
        result.checks.append(_counted("tokenizer", said["tokenizer"], in_full))
    if "prompt_length" in fields:
        result.checks.append(_counted("prompt_length", said["prompt_length"].items(), prompted))


def _counted(name: str, items: Iterable[Any], right: Callable[[Any], bool]) -> Check:
    return Check("aux", name, float(sum(not right(item) for item in items)), 0.0)


def _without_marks(text: str) -> str:
    for name in ("end", "begin", "pad"):
        text = text.replace(TOKENS[name], "")
    return text.strip()


def _rates_error(loop: Mapping[str, Any]) -> float:
    """Of the language side (group 0) and of the vision tower (group 2) in a recorded training loop, relative
    to the official rate; captions' has the saw-tooth of the first epoch."""
    peak, _, vision, _ = loop["base"]
    iterations = loop["epochs"] * loop["iters_per_epoch"]
    settings = OfficialAdamW(
        learning_rate=peak,
        warmup=loop["warmup"],
        final=loop["min_lr"] / peak,
        sawtooth=loop["iters_per_epoch"] if loop["loop"] == "caption" else 0,
    )
    expected = np.array(loop["lr_group0_group2"])
    rates = [
        jax.vmap(optim.schedule(settings, iterations, factor))(jnp.arange(iterations))
        for factor in (1.0, vision / peak)
    ]
    return float(np.abs(np.stack(rates, 1) / expected - 1).max())


# -----------------------------------------------------------------------------------------------------------
# What a case generated, as text


def compare_decoded(result: Result, folder: Path, name: str, said: Mapping[str, Any], given: Tensors) -> None:
    """`decoded_text_beam5_min4_max12` of a case: the best of each recorded search, read by the official
    tokenizer."""
    vocabulary = folder / "vocab.txt"
    for field, texts in said.items():
        match = re.fullmatch(r"decoded_text_(beam\d+)_(min\d+)_(max\d+)", field)
        if match is None:
            continue
        if not vocabulary.is_file():
            result.unused.append((name, field, "there is no vocab.txt"))
            continue
        prompt = said.get("config", {}).get("prompt", "") if said["kind"] == "caption" else ""
        words = OfficialWordPiece(str(vocabulary), prompt=prompt)
        ids = given[f"out.gen.{'.'.join(match.groups())}.ids"][:, 0]
        read = [words.decode(row[row >= 0]) for row in ids]
        wrong = sum(one != other for one, other in zip(read, texts, strict=True))
        result.checks.append(Check(name, f"text of {'.'.join(match.groups())}", float(wrong), 0.0))
