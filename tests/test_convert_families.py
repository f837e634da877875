"""CLIP, plain ViTs, BERT and mPLUG become modules too, by the names under which they are published."""

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from converting import (
    GOLDEN,
    assert_same,
    bert,
    convert,
    official,
    official_model,
    shapes_of,
    vocabulary,
)
from safetensors.numpy import load_file, save_file

from mplug2 import hub
from mplug2.convert import families
from mplug2.convert.keys import to_ours
from mplug2.convert.shapes import Settings, read_settings
from mplug2.data.pixels import IMAGENET_MEAN
from mplug2.errors import CheckpointError
from mplug2.modules import vision
from mplug2.network import flat
from mplug2.tools import main as dispatcher


@pytest.fixture(scope="module")
def tensors():
    return official()


@pytest.fixture(scope="module")
def model():
    return official_model()


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
    assert config.stem.tubelet == 3 and not kernel[::2].any() and kernel[1].any()


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


@pytest.mark.parametrize("kind", ["mplug2", "clip", "vit", "bert"])
def test_a_checkpoint_of_another_kind_is_refused_with_its_own(tmp_path, tensors, kind):
    recorded = load_file(GOLDEN / "aux" / "image_vit.safetensors")
    vit = {key.removeprefix("param."): tensor for key, tensor in recorded.items() if key.startswith("param.")}
    known = {"mplug2": tensors, "clip": clip_of_openai(tensors), "vit": vit, "bert": bert(tensors)}
    for asked in {"mplug2", "mplug", "clip", "vit", "bert"} - {kind}:
        with pytest.raises(CheckpointError, match=rf"x\.pth: .*; its keys look like those of --from {kind}$"):
            convert(tmp_path, known[kind], asked)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"layer_norm_eps": 1e-5}, "norms of epsilon 1e-05; the zoo's BERT has gelu and 1e-12"),
        ({"hidden_act": "relu"}, "activation relu"),
        ({"patch_size": 16, "hidden_act": "silu"}, "the zoo's CLIP has quick_gelu or gelu and 1e-05"),
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
