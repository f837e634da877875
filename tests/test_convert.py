"""Checkpoints become modules with cards, every key accounted for, and official ones go back exactly."""

import json
import math
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_writer import rebuilt, save, write

from mplug2 import hub, publishing
from mplug2.card_tokenizer import tokenizer_of
from mplug2.convert import conversion, families, reversal
from mplug2.convert.keys import to_ours
from mplug2.convert.shapes import Settings, read_settings
from mplug2.convert.tensors import StoredTensor
from mplug2.data.pixels import IMAGENET_MEAN
from mplug2.errors import CardError, CheckpointError
from mplug2.modules import decoder, fusion, vision
from mplug2.network import flat
from mplug2.tools import main as dispatcher

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


@pytest.fixture(scope="module")
def tensors():
    """A small official state dict with every kind of key, dead and tied ones too."""
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


@pytest.fixture(scope="module")
def model(tensors):
    return families.mplug2({key: tensor.shape for key, tensor in tensors.items()}, SETTINGS)


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


# --- the account


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


# --- other kinds


def clip_of_openai(tensors) -> dict[str, np.ndarray]:
    tower = {key: tensor for key, tensor in tensors.items() if key.startswith("visual_encoder.visual.")}
    found = {
        key.removeprefix("visual_encoder."): tensor for key, tensor in tower.items() if "lmhra" not in key
    }
    return found | {
        "visual.conv1.weight": found["visual.conv1.weight"][:, :, 0].copy(),
        "logit_scale": np.ones((), "f4"),
    }


def clip_of_hugging_face(openai) -> dict[str, np.ndarray]:
    parts = {
        r"visual\.class_embedding": "embeddings.class_embedding",
        r"visual\.conv1\.": "embeddings.patch_embedding.",
        r"visual\.positional_embedding": "embeddings.position_embedding.weight",
        r"visual\.ln_pre": "pre_layrnorm",
        r"visual\.ln_post": "post_layernorm",
        r"visual\.transformer\.resblocks\.(\d+)\.attn\.out_proj": r"encoder.layers.\1.self_attn.out_proj",
        r"visual\.transformer\.resblocks\.(\d+)\.ln_(\d)": r"encoder.layers.\1.layer_norm\2",
        r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_fc": r"encoder.layers.\1.mlp.fc1",
        r"visual\.transformer\.resblocks\.(\d+)\.mlp\.c_proj": r"encoder.layers.\1.mlp.fc2",
    }
    made = {
        "visual_projection.weight": np.ones((32, 64), "f4"),
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    for key, tensor in openai.items():
        if packed := re.match(r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", key):
            for name, part in zip("qkv", np.split(tensor, 3), strict=True):
                made[f"vision_model.encoder.layers.{packed[1]}.self_attn.{name}_proj.{packed[2]}"] = (
                    part.copy()
                )
        for pattern, name in parts.items():
            if re.match(pattern, key):
                made["vision_model." + re.sub(pattern, name, key)] = tensor
    return made


def test_clip_converts_alike_under_both_names(tmp_path, tensors, model):
    openai = clip_of_openai(tensors)
    convert(tmp_path, openai, "clip", out="openai", settings=None)
    report = convert(tmp_path, clip_of_hugging_face(openai), "clip", out="hugging", settings=None)
    assert "to" in report["keys"]["vision_model.embeddings.position_embedding.weight"]
    one, other = (hub.load(hub.find(tmp_path / name)) for name in ("openai", "hugging"))
    assert one[0] == other[0] == model.configs["vision"]
    assert_same(flat(one[1]), flat(other[1]))
    assert np.array_equal(one[1]["positions"], tensors["visual_encoder.visual.positional_embedding"])


def test_clip_may_become_a_tower_of_three_frames_a_token(tmp_path, tensors):
    convert(tmp_path, clip_of_openai(tensors), "clip", settings=Settings(heads=1, tubelet=3))
    config: Any
    config, params = hub.load(hub.find(tmp_path / "out"))
    kernel = params["stem"]["kernel"].reshape(3, -1, 64)
    assert config.stem.tubelet == 3 and not kernel[[0, 2]].any() and kernel[1].any()


def test_a_plain_vit_converts_from_the_names_of_timm(tmp_path):
    recorded = load_file(GOLDEN / "aux" / "image_vit.safetensors")
    vit = {key.removeprefix("param."): tensor for key, tensor in recorded.items() if key.startswith("param.")}
    extra = {"head.weight": np.ones((5, 64), "f4"), "mask_token": np.ones((1, 1, 64), "f4")}
    report = convert(tmp_path, vit | extra, "vit", settings=Settings(heads=4))
    assert "classifier" in report["keys"]["head.weight"]["unused"]
    assert report["keys"]["blocks.0.attn.qkv.bias"]["to"] == [
        f"vision:blocks.layers.attention.{name}.bias[0]" for name in ("query", "key", "value")
    ]
    card = hub.find(tmp_path / "out")
    config: Any
    config, params = hub.load(card)
    assert (config.blocks, config.stem) == (vision.Plain(), vision.BiasedPatches(patch=8))
    assert_same(
        flat(params), flat(to_ours(families.vit(shapes_of(vit), Settings(heads=4)).keys, vit)["vision"])
    )
    assert card.preprocessing and card.preprocessing.mean == IMAGENET_MEAN
    with pytest.raises(CheckpointError, match="stem.bias|patch_embed.proj.bias"):
        convert(tmp_path, {key: vit[key] for key in vit if key != "patch_embed.proj.bias"}, "vit", out="no",
                settings=Settings(heads=4))  # fmt: skip


def shapes_of(tensors) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"layer_norm_eps": 1e-5}, "norms of epsilon 1e-05; the zoo's BERT has gelu and 1e-12"),
        ({"hidden_act": "relu"}, "activation relu"),
        ({"patch_size": 16, "hidden_act": "gelu"}, "the zoo's CLIP has quick_gelu and 1e-05"),
        ({"vision_config": {"num_attention_heads": 2, "layer_norm_eps": 1e-6}}, "norms of epsilon 1e-06"),
        ({"num_attention_heads": 0}, "heads is 0, expected at least 1"),
        ({"num_attention_heads": -4}, "heads is -4"),
        ({"num_attention_heads": None}, "not a JSON object of settings"),
        ({"num_attention_heads": math.inf}, "not a JSON object of settings"),
        ({"stride_layer": 0}, "stride_layer is 0"),
        ({"fusion_layers": -1}, "fusion_layers is -1"),
    ],
)
def test_a_configuration_of_another_kind_of_network_is_refused(tmp_path, said, reason):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4} | said))
    with pytest.raises(CheckpointError, match=reason):
        read_settings(tmp_path / "config.json")


def test_files_beside_a_model_are_taken_as_hugging_face_publishes_them(tmp_path, tensors):
    (tmp_path / "model").mkdir()
    plain = {key.removeprefix("bert."): tensor for key, tensor in bert(tensors).items()}
    save_file(plain, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text('{"num_attention_heads": 2, "layer_norm_eps": 1e-12}')
    vocabulary(tmp_path / "model", tensors)
    words = ["convert", str(tmp_path / "model" / "model.safetensors"), "--from", "bert"]
    assert dispatcher.main([*words, "--out", str(tmp_path / "out")]) == 0
    card = hub.find(tmp_path / "out", "text")
    assert getattr(card.config, "heads", 0) == 2
    assert card.tokenizer and card.tokenizer.file == "vocab.txt" and card.tokenizer.ids["mask"] == 4
    assert (tmp_path / "out" / "vocab.txt").is_file()
    assert card.tokenizer.lowercase is True
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert dispatcher.main([*words, "--out", str(tmp_path / "cased")]) == 0
    cased = hub.find(tmp_path / "cased", "text")
    assert cased.tokenizer and cased.tokenizer.lowercase is False


def test_a_vocabulary_of_another_size_is_refused(tmp_path, tensors, capsys):
    save_file(tensors, tmp_path / "x.safetensors")
    size = vocabulary(tmp_path, tensors)
    (tmp_path / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text() + "one more\n")
    words = ["convert", str(tmp_path / "x.safetensors"), "--from", "mplug2", "--out", str(tmp_path / "out")]
    assert dispatcher.main([*words, "--config", str(GOLDEN / "oracle" / "qa_stride2.json")]) == 2
    assert f"has {size + 1} words, the checkpoint has {size}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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


def test_bert_converts_as_an_encoder_and_as_a_masked_word_model(tmp_path, tensors):
    plain = {key.removeprefix("bert."): tensor for key, tensor in bert(tensors).items()}
    report = convert(tmp_path, plain | {"pooler.dense.bias": np.ones(64, "f4")}, "bert", out="plain")
    assert set(report["modules"]) == {"text"} and "pooler" in report["keys"]["pooler.dense.bias"]["unused"]
    head = {
        key.removeprefix("text_decoder."): tensor
        for key, tensor in tensors.items()
        if key.startswith("text_decoder.cls.")
    } | {"cls.predictions.decoder.weight": tensors["text_encoder.embeddings.word_embeddings.weight"]}
    old = {
        re.sub(
            r"LayerNorm\.(weight|bias)$",
            lambda m: f"LayerNorm.{'gamma' if m[1] == 'weight' else 'beta'}",
            key,
        ): tensor
        for key, tensor in (bert(tensors) | head).items()
    }
    report = convert(tmp_path, old, "bert", out="masked")
    assert set(report["modules"]) == {"text", "unmasker"}
    one, other = (hub.load(hub.find(tmp_path / name, "text")) for name in ("plain", "masked"))
    assert one[0] == other[0] and getattr(one[0], "depth", 0) == 3
    assert_same(flat(one[1]), flat(other[1]))


def test_mplug_has_no_universal_layers_and_comes_back(tmp_path, tensors):
    image = {
        key: tensor
        for key, tensor in tensors.items()
        if not re.search(r"lmhra|text_encoder.*(cross|latents|vision)|visn_emb_norm|decoder.*latents", key)
    }
    image["visual_encoder.visual.conv1.weight"] = image["visual_encoder.visual.conv1.weight"][:, :, 0].copy()
    image |= {
        "itm_head.weight": np.ones((2, 64), "f4"),
        "itm_head.bias": np.ones(2, "f4"),
        "temp": np.full((), 0.1, "f4"),
    }
    for name in ("vision_proj", "text_proj"):
        image |= {f"{name}.weight": np.ones((24, 64), "f4"), f"{name}.bias": np.ones(24, "f4")}
    report = convert(tmp_path, image, "mplug")
    assert set(report["modules"]) == {"vision", "text", "fusion", "decoder", "contrastive", "matching"}
    assert getattr(hub.find(tmp_path / "out", "text").config, "depth", 0) == 3
    assert_same(back(tmp_path, "mplug"), image)


# --- memory

WRITE = """
import re, sys, zipfile
import numpy as np
sys.path[:0] = [{tests!r}]
from torch_writer import Pickle, rebuilt
from test_convert import released

# 2**20 numbers over and over, so that tied tensors are equal; positions count.
numbers, body = np.random.default_rng(0).normal(size=1 << 20).astype("f2").tobytes(), b""
with zipfile.ZipFile({path!r}, "w") as archive:
    for place, (key, shape) in enumerate(released().items()):
        size, counts = int(np.prod(shape)), key.endswith("position_ids")
        strides = tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))
        body += Pickle().emit(key) + rebuilt("i8" if counts else "f2", str(place), size, 0, shape, strides)
        with archive.open(f"archive/data/{{place}}", "w", force_zip64=True) as entry:
            if counts:
                entry.write(np.arange(size).tobytes())
            for first in range(0, 0 if counts else 2 * size, len(numbers)):
                entry.write(numbers[: 2 * size - first])
    archive.writestr("archive/data.pkl", b"\\x80\\x02}}(X\\x05\\x00\\x00\\x00model}}(" + body + b"uu.")
"""

CONVERT = """
import resource
from pathlib import Path
from mplug2.convert import conversion
from mplug2.convert.families import mplug2
from mplug2.network import Network

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tensors, _ = conversion.read_checkpoint(Path({path!r}))
shapes = {{key: tensor.shape for key, tensor in tensors.items()}}
Network(mplug2(shapes).configs).shapes  # what JAX needs by itself
before = peak()
report = conversion.convert(Path({path!r}), "mplug2", Path({out!r}), conversion.Options(name="large"))
print(len(report["keys"]), max(tensor.nbytes for tensor in tensors.values()), before, peak())
"""


@pytest.mark.slow
def test_three_gigabytes_convert_in_the_memory_of_one_tensor(tmp_path):
    places = {
        "path": str(tmp_path / "large.pth"),
        "out": str(tmp_path / "out"),
        "tests": str(Path(__file__).parent),
    }
    subprocess.run([sys.executable, "-c", WRITE.format(**places)], check=True)
    assert (tmp_path / "large.pth").stat().st_size > 3e9
    done = subprocess.run(
        [sys.executable, "-c", CONVERT.format(**places)], check=True, capture_output=True, text=True
    )
    keys, largest, before, after = map(int, done.stdout.split())
    print(
        f"{keys} keys, largest tensor {largest / 1e6:.0f} MB, peak {before / 1e6:.0f} -> {after / 1e6:.0f} MB"
    )
    assert keys == 2223
    assert after - before < 1.3 * largest + 32e6
