"""Checkpoints become modules with cards, every key accounted for, and official ones go back exactly."""

import json
import re
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from converting import (
    GOLDEN,
    assert_same,
    back,
    convert,
    official,
    official_model,
    options,
    released,
    vocabulary,
)
from safetensors.numpy import load_file, save_file
from torch_writer import rebuilt, save, write

from mplug2 import hub
from mplug2.convert import conversion, families, reversal
from mplug2.convert.keys import to_ours
from mplug2.convert.tensors import StoredTensor
from mplug2.errors import CardError, CheckpointError
from mplug2.hub import publishing
from mplug2.hub.card_tokenizer import tokenizer_of
from mplug2.modules import decoder, fusion, vision
from mplug2.network import flat
from mplug2.tools import main as dispatcher


@pytest.fixture(scope="module")
def tensors():
    return official()


@pytest.fixture(scope="module")
def model():
    return official_model()


def test_all_2223_keys_of_the_released_model_have_a_place_or_a_rule():
    shapes = released()
    assert len(shapes) == 2223
    large = families.mplug2(shapes)
    nowhere = Path()
    fates = conversion.account(
        large,
        {key: StoredTensor.whole(nowhere, np.dtype("f4"), shape, 0) for key, shape in shapes.items()},
        (),
    )
    assert sum("to" in fate for fate in fates.values()) == len(large.keys.keys()) == 1569
    sizes = {
        name: (config.width, config.depth)
        for name, config in large.configs.items()
        if hasattr(config, "depth")
    }
    assert sizes == {
        "vision": (1024, 24), "temporal": (1024, 24), "text": (1024, 22), "universal": (1024, 2),
        "fusion": (1024, 6), "decoder": (1024, 12),
    }  # fmt: skip
    assert large.configs["vision"] == vision.large()
    assert large.configs["decoder"] == decoder.large()
    assert large.configs["fusion"] == fusion.large()


def test_unexplained_and_missing_keys_are_listed_and_nothing_is_left(tmp_path, tensors):
    odd = {key: tensor for key, tensor in tensors.items() if key != "visn_emb_norm.bias"} | {
        "surprise": np.zeros(3, "f4")
    }
    with pytest.raises(
        CheckpointError, match="no place and no rule: surprise; 1 keys are missing: visn_emb_norm.bias"
    ):
        convert(tmp_path, odd)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth"]


def test_a_key_may_be_skipped_by_a_stated_rule(tmp_path, tensors):
    report = convert(tmp_path, tensors | {"surprise.x": np.zeros(3, "f4")}, skip=("surprise.*",))
    assert report["keys"]["surprise.x"] == {"unused": "skipped by --skip surprise.*"}


# --- the way there and back


def test_modules_are_the_ones_that_the_key_map_makes_and_load_as_cards(tmp_path, tensors, model):
    convert(tmp_path, tensors)
    ours, cards = to_ours(model.keys, tensors), hub.cards(tmp_path / "out")
    assert set(cards) == {"vision", "temporal", "text", "universal", "fusion", "decoder"}
    for module, card in cards.items():
        config, params = hub.load(card)
        assert config == model.configs[module]
        assert_same(flat(params), flat(ours[module]))


def test_a_file_is_byte_for_byte_what_the_hub_would_publish(tmp_path, tensors, model):
    convert(tmp_path, tensors)
    ours = to_ours(model.keys, tensors)["universal"]
    published = publishing.publish(
        tmp_path / "hub", "universal-qa", "universal", model.configs["universal"], ours
    )
    assert published.file == hub.find(tmp_path / "out", "universal").file


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_round_trip_is_exact_in_every_type(tmp_path, tensors, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    stored = {
        key: tensor.astype(kind) if tensor.dtype == np.float32 else tensor for key, tensor in tensors.items()
    }
    report = convert(tmp_path, stored)
    assert {said["dtype"] for said in report["modules"].values()} == {dtype}
    reversal.revert(tmp_path / "out", "mplug2", tmp_path / "back.safetensors")
    found, _ = conversion.read_checkpoint(tmp_path / "back.safetensors")
    assert_same({key: tensor.read() for key, tensor in found.items()}, stored)


def test_pretraining_names_and_momentum_copies_are_known_and_come_back(tmp_path, tensors):
    renamed = {
        re.sub(r"^(text_encoder|fusion_encoder)\.", r"\1.bert.", key): tensor
        for key, tensor in tensors.items()
    }
    renamed |= {
        "visual_encoder_m.visual.proj": np.ones((64, 32), np.float32),
        "fusion_encoder_m.bert.encoder.layer.0.latents": np.ones(3, np.float32),
        "fusion_encoder.cls.predictions.bias": np.ones(200, np.float32),
        "image_queue": np.ones((4, 8), np.float32),
        "queue_ptr": np.zeros(1, np.int64),
    }
    report = convert(tmp_path, renamed)
    assert "momentum" in report["keys"]["visual_encoder_m.visual.proj"]["unused"]
    assert_same(back(tmp_path), renamed)


def test_modules_without_a_report_go_back_to_a_fine_tuned_file(tmp_path, tensors, model):
    ours = to_ours(model.keys, tensors)
    for module, params in ours.items():
        publishing.publish(tmp_path / "out", f"{module}-mine", module, model.configs[module], params)
    reversal.revert(tmp_path / "out", "mplug2", tmp_path / "back.safetensors", fusion_stack=5)
    found = load_file(tmp_path / "back.safetensors")
    assert model.keys.keys() <= found.keys()
    assert all(found[key].tobytes() == tensors[key].tobytes() for key in found)


def test_the_command_converts_safetensors_and_says_what_became_of_every_key(tmp_path, tensors, capsys):
    save_file(tensors, tmp_path / "x.safetensors")
    size = vocabulary(tmp_path, tensors)
    words = ["convert", str(tmp_path / "x.safetensors"), "--from", "mplug2", "--out", str(tmp_path / "out")]
    words += [
        "--config",
        str(GOLDEN / "oracle" / "qa_stride2.json"),
        "--vocabulary",
        str(tmp_path / "vocab.txt"),
    ]
    assert dispatcher.main(words) == 0
    said = capsys.readouterr().out
    assert f"305 of {len(tensors)} keys are in modules" in said and "CLIP's text tower" in said
    card = hub.find(tmp_path / "out", "decoder")
    assert card.tokenizer and card.tokenizer.kind == "official_wordpiece"
    special = {"pad": 0, "unknown": 1, "begin": 2, "end": 3, "mask": 4, "size": size}
    assert tokenizer_of([card]).table() == card.tokenizer.ids == special
    report = json.loads((tmp_path / "out" / "conversion" / "report.json").read_text())
    assert report["keys"]["visn_emb_norm.weight"] == {"to": ["universal:vision_norm.scale"]}
    assert dispatcher.main([*words]) == 2  # the folder is there already
    assert "not an empty folder" in capsys.readouterr().err
    back = ["convert", str(tmp_path / "out"), "--to", "mplug2", "--out", str(tmp_path / "back.safetensors")]
    assert dispatcher.main(back) == 0
    assert_same(load_file(tmp_path / "back.safetensors"), tensors)


# --- what is refused


@pytest.mark.parametrize(
    ("key", "change", "reason"),
    [
        (
            "text_decoder.cls.predictions.decoder.weight",
            lambda t: t + 1,
            "differs from text_decoder.bert.embeddings.word",
        ),
        ("text_encoder.embeddings.position_ids", lambda t: t[:, ::-1].copy(), "is not 0, 1, ... 47"),
        ("visn_emb_norm.weight", lambda t: t[:-1].copy(), r"has shape \(63,\), expected \(64,\)"),
        ("visn_emb_norm.weight", lambda t: t.astype("f8"), "visn_emb_norm.weight is float64"),
        (
            "text_encoder.encoder.layer.1.attention.self.key.bias",
            lambda t: t.astype("f2"),
            "alike in all layers",
        ),
        ("visual_encoder.visual.conv1.weight", lambda t: t[..., :-1].copy(), "is no CLIP vision tower"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(tmp_path, tensors, key, change, reason):
    if key.endswith("layer.1.attention.self.key.bias"):
        key = key.replace("layer.1", "layer.2")  # a stack of two: the universal layers
    with pytest.raises(CheckpointError, match=reason):
        convert(tmp_path, tensors | {key: change(tensors[key])})
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_refused_by_key_or_allowed_and_reported(tmp_path, tensors):
    bias = tensors["visn_emb_norm.bias"].copy()
    bias[:2] = np.nan, np.inf
    with pytest.raises(CheckpointError, match=r"not finite: visn_emb_norm\.bias \(2\); --allow-non-finite"):
        convert(tmp_path, tensors | {"visn_emb_norm.bias": bias})
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]
    report = convert(tmp_path, tensors | {"visn_emb_norm.bias": bias}, allow_non_finite=True)
    assert report["not_finite"] == {
        "visn_emb_norm.bias": 2
    } and "visn_emb_norm.bias has 2" in conversion.told(report)


def test_an_unknown_kind_and_an_unknown_size_are_refused_with_what_to_do(tmp_path, tensors):
    with pytest.raises(CheckpointError, match='no kind "mplugg"; did|no kind "mplugg" .did you mean "mplug"'):
        convert(tmp_path, tensors, "mplugg")
    with pytest.raises(CheckpointError, match="hidden width of 64 .*--config"):
        convert(tmp_path, tensors, settings=None)
    with pytest.raises(CheckpointError, match="--from mplug2"):
        convert(tmp_path, tensors, "mplug")
    with pytest.raises((CheckpointError, CardError), match="no such file"):
        conversion.convert(tmp_path / "none.pth", "mplug2", tmp_path / "out", options())


@pytest.mark.parametrize("harm", ["cut", "call", "bomb", "size"])
def test_a_hostile_file_leaves_nothing_behind(tmp_path, tensors, harm):
    path = save(tmp_path / "x.pth", {"model": tensors, "epoch": 9})
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif harm == "call":
        write(path, b"\x80\x02cposix\nsystem\n(X\x0a\x00\x00\x00touch harmtR.")
    elif harm == "bomb":
        save(path, {"model": tensors}, compression=zipfile.ZIP_DEFLATED)
    else:
        write(
            path, b"\x80\x02}(X\x01\x00\x00\x00w" + rebuilt("f4", "0", 9, 0, (9,), (1,)) + b"u.", {"0": b""}
        )
    before = sorted(place for place in tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"x\.pth: refused: "):
        conversion.convert(path, "mplug2", tmp_path / "out", options())
    assert sorted(place for place in tmp_path.rglob("*")) == before
