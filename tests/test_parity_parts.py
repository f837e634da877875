"""The official code's parts by themselves, and what stands around a network, compute what was recorded
(golden/aux).

golden/aux/ holds its two picture towers (random weights), position tables and patch kernels resized, pixels,
frame indices, texts, ids and learning rates.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mplug2.convert import families, parity
from mplug2.convert.layout import inflate
from mplug2.convert.shapes import Settings
from mplug2.errors import CheckpointError
from mplug2.modules.vision import BiasedPatches, Clip, Plain, resize_positions
from mplug2.tools import main as dispatcher

AUX = Path(__file__).parent / "golden" / "aux"
FILES = ("image_clip", "image_vit", "aux_tensors")


@pytest.fixture(scope="module")
def result():
    return parity.compare(AUX, 1e-4, resize_positions)


def test_everything_recorded_is_compared_and_holds(result):
    compared = {(check.case, check.stage.split(",")[0]) for check in result.checks}
    expected = {
        (file, key.removeprefix("out.").removesuffix(".out"))
        for file in FILES
        for key in load_file(AUX / f"{file}.safetensors")
        if not key.startswith(("param.", "in.", "tf.clip", "tf.crop")) and not key.endswith(".in")
    }
    said = json.loads((AUX / "aux.json").read_text())
    expected |= {("aux", name) for name in said if not name.startswith("image_")}
    unused = {(case, name) for case, name, _ in result.unused}
    assert unused == {("aux", "tokenizer_truncation20")}
    assert compared | unused == expected
    assert not result.misses


@pytest.mark.parametrize(
    ("file", "key"), [("image_vit", "param.patch_embed.proj.bias"), ("image_clip", "param.ln_pre.bias")]
)
def test_one_wrong_weight_of_a_tower_is_a_miss(tmp_path, file, key):
    """Of the parts that tell the towers apart: a stem's bias, a norm before the blocks."""
    tensors = load_file(AUX / f"{file}.safetensors")
    tensors[key][3] += 0.05
    save_file(tensors, tmp_path / f"{file}.safetensors")
    shutil.copy(AUX / "aux.json", tmp_path)
    missed = parity.compare(tmp_path, 1e-4, resize_positions).misses
    assert missed and {check.case for check in missed} == {file}


@pytest.mark.parametrize(
    ("field", "stage"),
    [("frames_rand", "frames_rand"), ("tokenizer", "tokenizer"), ("lr", "lr, qa")],
)
def test_one_wrong_number_around_the_network_is_a_miss(tmp_path, field, stage):
    said = json.loads((AUX / "aux.json").read_text())
    last = said[field][-1]
    if field == "lr":
        last["lr_group0_group2"][-1][1] *= 1.01
    elif field == "frames_rand":
        last[-1][-1] += 1
    else:
        last["input_ids"][-1] += 1
    (tmp_path / "aux.json").write_text(json.dumps(said))
    shutil.copy(AUX / "vocab.txt", tmp_path)
    missed = parity.compare(tmp_path, 1e-4, resize_positions).misses
    assert [check.stage for check in missed] == [stage]


@pytest.mark.parametrize(
    "said",
    [
        {"frames_middle": [1]},
        {"pre_caption": [["a"]]},
        {"lr": [{"loop": "qa"}]},
        {"tokenizer": [{}]},
        {"image_clip_config": {}},
    ],
)
def test_recordings_that_are_none_are_refused_in_a_sentence(tmp_path, said):
    (tmp_path / "aux.json").write_text(json.dumps(said))
    shutil.copy(AUX / "vocab.txt", tmp_path)
    shutil.copy(AUX / "image_clip.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="auxiliary files are not as recorded"):
        parity.compare(tmp_path, 1e-4, resize_positions)


def test_texts_without_a_vocabulary_are_listed_as_not_compared(tmp_path, capsys):
    shutil.copy(AUX / "aux.json", tmp_path)
    assert dispatcher.main(["parity", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "not compared: aux, tokenizer: there is no vocab.txt" in said and "hold" in said


def test_recordings_of_other_losses_are_listed_with_the_reason(tmp_path):
    shutil.copy(AUX / "image_clip.safetensors", tmp_path)
    for kind in ("pretrain", "retrieval", "grounding", "surprise"):
        (tmp_path / f"{kind}.json").write_text(json.dumps({"kind": kind}))
    unused = parity.compare(tmp_path, 1e-4, resize_positions).unused
    reasons = {case: why for case, _, why in unused}
    assert "queue" in reasons["pretrain"] and "boxes" in reasons["grounding"]
    assert reasons["surprise"] == 'cases of kind "surprise" are not known'


# --- the towers


def test_a_plain_vit_is_told_from_clip_by_types(tmp_path):
    towers = {}
    for file, family, heads in (("image_vit", families.vit, 4), ("image_clip", families.clip, 2)):
        tensors = load_file(AUX / f"{file}.safetensors")
        shapes = {key[6:]: tensor.shape for key, tensor in tensors.items() if key.startswith("param.")}
        towers[file] = family(shapes, Settings(heads=heads)).configs["vision"]
    vit, clip = towers["image_vit"], towers["image_clip"]
    assert (type(vit.stem), vit.blocks, vit.heads) == (BiasedPatches, Plain(), 4)
    assert (clip.blocks, clip.heads) == (Clip(), 2)
    assert (vit.image, vit.width, vit.depth) == (clip.image, clip.width, clip.depth) == ((32, 32), 64, 2)


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (768, 12), (1280, 16)])
def test_heads_of_a_published_vit_are_known_and_of_another_asked_for(width, heads):
    shapes = {
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "pos_embed": (1, 197, width),
        "blocks.0.norm1.bias": (width,),
    }
    vision = families.vit(shapes).configs["vision"]
    assert (vision.heads, vision.image, vision.depth) == (heads, (224, 224), 1)
    odd = shapes | {"patch_embed.proj.weight": (width + 8, 3, 16, 16)}
    with pytest.raises(CheckpointError, match=f"a width of {width + 8} is none .*num_heads.*--config"):
        families.vit(odd)


def test_patches_of_pictures_become_patches_of_clips_that_see_the_middle_frame():
    kernel = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    solid = inflate(kernel, 3)
    assert solid.shape == (5, 3, 3, 4, 4)
    assert np.array_equal(solid[:, :, 1], kernel) and not solid[:, :, [0, 2]].any()
