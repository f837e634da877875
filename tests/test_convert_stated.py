"""What stands beside a checkpoint is believed before its keys: shards, sizes, activation, pixels, wrappers,
and files that are no checkpoints."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from converting import GOLDEN, bert, official
from safetensors.numpy import load_file, save_file
from test_convert_families import clip_of_hugging_face, clip_of_openai
from torch_writer import save

from mplug2 import hub
from mplug2.convert import conversion
from mplug2.convert.families import unwrapped
from mplug2.convert.stated import beside, check_whole
from mplug2.data.pixels import CLIP_MEAN
from mplug2.errors import CheckpointError
from mplug2.modules import vision
from mplug2.tools import main as dispatcher

HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def plain_bert() -> dict[str, np.ndarray]:
    return {key.removeprefix("bert."): tensor for key, tensor in bert(official()).items()}


@pytest.fixture(scope="module")
def clip() -> dict[str, np.ndarray]:
    return clip_of_openai(official())


def converted(file: Path, kind: str, out: Path, *options: str) -> int:
    return dispatcher.main(["convert", str(file), "--from", kind, "--out", str(out), *options])


def write(path: Path, tensors=None, **beside) -> Path:
    """A safetensors file with JSON files beside it, by their names without `.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        save_file(dict(tensors), path)
    for name, content in beside.items():
        (path.parent / f"{name}.json").write_text(json.dumps(content))
    return path


# --- a part that passes for a whole


def test_a_shard_is_refused_by_its_index_under_any_name(tmp_path):
    index = {"weight_map": {"a": "part.safetensors", "b": "part.safetensors", "c": "other.safetensors"}}
    file = write(tmp_path / "part.safetensors", **{"model.safetensors.index": index})
    with pytest.raises(CheckpointError, match=r"holds 2 of the 3 keys that .* lists in 2 file"):
        check_whole(file, ["a", "b"])
    check_whole(file, ["a", "b", "c"])  # as the file has been joined since


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "pytorch_model-00002-of-00010.bin",
        "model_1_of_2.pt",
        "model-00001of00002.bin",
        "mp_rank_01_model_states.pt",
        "consolidated.03.pth",
        "model.safetensors.part1",
        "shard-2.pt",
    ],
)
def test_a_shard_is_refused_by_its_name(tmp_path, name):
    with pytest.raises(CheckpointError, match="one of several files"):
        check_whole(tmp_path / name, ["a"])


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00001.safetensors",
        "model.safetensors",
        "vit-2-of-hearts.pt",
        "bert-lora-rank16.pt",
        "mp_rank_00_model_states.pt",
        "consolidated.00.pth",
    ],
)
def test_a_whole_file_is_taken(tmp_path, name):
    check_whole(tmp_path / name, ["a"])


def test_the_first_of_several_numbered_files_is_told_by_the_others(tmp_path):
    for first, second in (("mp_rank_00_model.pt", "mp_rank_01_model.pt"), ("rank0.bin", "rank1.bin")):
        (tmp_path / first).touch()
        check_whole(tmp_path / first, ["a"])
        (tmp_path / second).touch()
        with pytest.raises(CheckpointError, match="one of several files"):
            check_whole(tmp_path / first, ["a"])


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"num_hidden_layers": 99}, r"depth of .*config\.json states 99"),
        ({"vocab_size": 30522}, "vocabulary of"),
        ({"hidden_size": 768}, "width of 64"),
        ({"intermediate_size": 3072}, "hidden of"),
        ({"max_position_embeddings": 512}, "positions of"),
        ({"num_hidden_layers": "two"}, "states 'two' for its depth"),
        ({"position_embedding_type": "relative_key"}, "positions are relative_key"),
    ],
)
def test_a_bert_of_other_sizes_than_its_configuration_says_is_refused(
    tmp_path, plain_bert, said, reason, capsys
):
    file = write(tmp_path / "m" / "x.safetensors", plain_bert, config={"num_attention_heads": 2} | said)
    assert converted(file, "bert", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and not (tmp_path / "out").exists()
    assert np.array([part in error for part in reason.replace("\\", "").split(".*")]).all(), error


def test_a_tower_of_other_sizes_than_its_configuration_says_is_refused(tmp_path, clip, capsys):
    sizes = {"num_attention_heads": 1, "num_hidden_layers": 24}
    file = write(tmp_path / "x.safetensors", clip_of_hugging_face(clip), config={"vision_config": sizes})
    assert converted(file, "clip", tmp_path / "out") == 2
    assert "makes a depth" in (said := capsys.readouterr().err) or "make a depth" in said


# --- what keys cannot tell


def open_clip(pixels=None, **tower) -> dict:
    sizes = {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8}
    return {
        "model_cfg": {"vision_cfg": sizes | tower},
        "preprocess_cfg": pixels or {"mean": HALF[0], "std": HALF[1]},
    }


def sides(clip) -> dict:
    """The sizes of the tower, as open_clip states them."""
    kernel, places = clip["visual.conv1.weight"], clip["visual.positional_embedding"]
    side = int((len(places) - 1) ** 0.5) * kernel.shape[-1]
    depth = len({key.split(".")[3] for key in clip if ".resblocks." in key})
    return {"image_size": side, "patch_size": kernel.shape[-1], "width": kernel.shape[0], "layers": depth}


def test_open_clips_configuration_says_activation_pixels_and_source(tmp_path, clip):
    file = write(tmp_path / "x.safetensors", clip, open_clip_config=open_clip(**sides(clip)))
    assert converted(file, "clip", tmp_path / "out") == 0
    card = hub.find(tmp_path / "out", "vision")
    config = card.config
    assert isinstance(config, vision.Config) and config.blocks == vision.OpenClip()
    assert card.preprocessing and (card.preprocessing.mean, card.preprocessing.std) == HALF
    assert "open_clip" in card.source
    as_hugging_face = clip_of_hugging_face(clip)
    said = {"vision_config": {"num_attention_heads": 1, "hidden_act": "gelu"}}
    pixels = {"image_mean": HALF[0], "image_std": HALF[1]}
    file = write(tmp_path / "hf" / "x.safetensors", as_hugging_face, config=said, preprocessor_config=pixels)
    assert converted(file, "clip", tmp_path / "hf-out") == 0
    other = hub.find(tmp_path / "hf-out", "vision")
    assert other.config == config and other.preprocessing == card.preprocessing


def test_quick_gelu_of_open_clip_is_openais(tmp_path, clip):
    said = open_clip(**sides(clip))
    said["model_cfg"]["quick_gelu"] = True
    settings = beside(write(tmp_path / "x", open_clip_config=said), "clip").settings
    assert settings is not None and settings.activation == "quick_gelu"


@pytest.mark.parametrize(
    ("tower", "reason"),
    [
        ({"timm_model_name": "vit_base"}, "is vit_base, not a CLIP transformer"),
        ({"layers": [3, 4, 6, 3]}, "is a ResNet"),
        ({"no_ln_pre": True}, "no_ln_pre True"),
        ({"pool_type": "avg"}, "pool_type 'avg'"),
        ({"ls_init_value": 1e-5}, "ls_init_value"),
    ],
)
def test_a_tower_of_open_clip_that_the_zoo_has_not_is_refused(tmp_path, tower, reason):
    with pytest.raises(CheckpointError, match=reason):
        beside(write(tmp_path / "x", open_clip_config=open_clip(**tower)), "clip")


def test_open_clips_file_without_its_configuration_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="open_clip_config.json says the activation"):
        beside(tmp_path / "open_clip_model.safetensors", "clip")


def test_what_nothing_says_is_said_to_be_assumed(tmp_path, clip, capsys):
    assert converted(write(tmp_path / "x.safetensors", clip), "clip", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "assumed" in said and "CLIP's mean" in said and "quick GELU" in said and "layers" in said
    card = hub.find(tmp_path / "out", "vision")
    assert card.preprocessing and card.preprocessing.mean == CLIP_MEAN


def test_timms_configuration_says_depth_and_pixels(tmp_path):
    said = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"mean": HALF[0], "std": HALF[1]}}
    stated = beside(write(tmp_path / "x", config=said), "vit")
    assert stated.pixels == HALF and stated.sizes == {"depth": 12, "patch": 16}
    recorded = load_file(GOLDEN / "aux" / "image_vit.safetensors")
    vit = {key.removeprefix("param."): value for key, value in recorded.items() if key.startswith("param.")}
    file = write(tmp_path / "m" / "x.safetensors", vit, config=said | {"num_heads": 4})
    assert converted(file, "vit", tmp_path / "out") == 2  # of another depth than the base


def test_timms_configuration_says_what_sets_a_model_apart_from_its_name(tmp_path):
    said = {"architecture": "deit_tiny_patch16_224", "num_features": 192, "pretrained_cfg": {}}
    assert beside(write(tmp_path / "x", config=said), "vit").sizes == {"depth": 12, "patch": 16, "width": 192}
    stated = beside(write(tmp_path / "x", config=said | {"model_args": {"depth": 6, "num_heads": 4}}), "vit")
    assert stated.sizes == {"depth": 6, "patch": 16, "width": 192}
    assert stated.settings and stated.settings.heads == 4


def test_heads_that_hugging_faces_nested_configuration_leaves_out_are_its_own_default(tmp_path):
    said = {"model_type": "clip", "projection_dim": 512, "vision_config": {"dropout": 0.0, "patch_size": 16}}
    stated = beside(write(tmp_path / "x", config=said), "clip")
    assert stated.settings and stated.settings.heads == 12 and stated.settings.activation == "quick_gelu"


@pytest.mark.parametrize("head", ["abc", [64], -1, 0, 128, True])
def test_heads_of_open_clip_that_are_no_number_or_too_wide_are_refused(tmp_path, head):
    tower = {"width": 64, "layers": 2, "patch_size": 8, "image_size": 32, "head_width": head}
    with pytest.raises(CheckpointError, match="tower of width 64 has heads of"):
        beside(write(tmp_path / "x", open_clip_config={"model_cfg": {"vision_cfg": tower}}), "clip")


@pytest.mark.parametrize("mean", [[0.5, 0.5], ["a", "b", "c"], {"r": 1}, [float("nan")] * 3, [10**400] * 3])
def test_pixels_that_are_no_three_numbers_are_refused(tmp_path, mean):
    with pytest.raises(CheckpointError, match="mean of pixels is"):
        beside(write(tmp_path / "x", preprocessor_config={"image_mean": mean, "image_std": 1.0}), "clip")


# --- what trainers and git leave


@pytest.mark.parametrize(
    ("key", "off"),
    [
        ("_orig_mod.module.a.b", ["_orig_mod", "module"]),
        ("module._orig_mod.a.b", ["_orig_mod", "module"]),
        ("model.a._checkpoint_wrapped_module.b", ["_checkpoint_wrapped_module", "model"]),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", ["_fsdp_wrapped_module"]),
        ("base_model.model.a.b", ["base_model", "model"]),
        ("_forward_module.net.a.b", ["_forward_module", "net"]),
    ],
)
def test_wrappers_of_trainers_are_taken_off_and_told(key, off):
    assert unwrapped([key, key.removesuffix("b") + "c"]) == (
        {"a.b": key, "a.c": key.removesuffix("b") + "c"},
        off,
    )


def test_a_prefix_that_only_some_keys_have_is_a_name():
    assert unwrapped(["module.a", "b"]) == ({"module.a": "module.a", "b": "b"}, [])
    with pytest.raises(CheckpointError, match="stand there twice"):
        unwrapped(["a", "_orig_mod.a"])


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_wrapped_checkpoint_becomes_the_same_modules(tmp_path, plain_bert, suffix, capsys):
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in plain_bert.items()}
    sha256 = set()
    for name, tensors in (("plain", plain_bert), ("wrapped", wrapped)):
        file = write(tmp_path / name / f"x.{suffix}", config={"num_attention_heads": 2})
        save_file(tensors, file) if suffix == "safetensors" else save(file, {"model": tensors})
        assert converted(file, "bert", tmp_path / f"{name}-out") == 0
        sha256.add(hub.find(tmp_path / f"{name}-out", "text").file.sha256)
    assert len(sha256) == 1 and "_orig_mod" in capsys.readouterr().out


@pytest.mark.parametrize("length", [0x8B1F, 0x4B50, 0x2480])
def test_a_header_whose_length_begins_like_another_format_is_a_header(tmp_path, plain_bert, length):
    # gzip's first two bytes, a zip's, and the first of a pickle, which one header of 32 has
    file = write(tmp_path / "x.safetensors", plain_bert)
    content = file.read_bytes()
    old = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + old].rstrip().ljust(length)
    file.write_bytes(length.to_bytes(8, "little") + header + content[8 + old :])
    tensors, _ = conversion.read_checkpoint(file)
    assert set(tensors) == set(plain_bert)


def test_an_index_lists_keys_as_they_stand_in_the_file(tmp_path, plain_bert):
    keys = [f"module.{key}" for key in plain_bert]
    file = write(
        tmp_path / "x.safetensors",
        dict(zip(keys, plain_bert.values(), strict=True)),
        **{"model.safetensors.index": {"weight_map": dict.fromkeys(keys, "x.safetensors")}},
    )
    assert set(conversion.read_checkpoint(file)[0]) == set(plain_bert)


def test_a_vocabulary_that_is_not_there_is_named(tmp_path, plain_bert, capsys):
    file = write(tmp_path / "x.safetensors", plain_bert, config={"num_attention_heads": 2})
    assert converted(file, "bert", tmp_path / "out", "--vocabulary", str(tmp_path / "no.txt")) == 2
    assert "no.txt: cannot be read (No such file" in capsys.readouterr().err


def test_the_contents_decide_what_a_file_is(tmp_path, plain_bert):
    file = write(tmp_path / "pytorch_model.bin", plain_bert, config={"num_attention_heads": 2})
    assert converted(file, "bert", tmp_path / "a") == 0
    save(tmp_path / "x.safetensors", plain_bert)
    assert converted(tmp_path / "x.safetensors", "bert", tmp_path / "b") == 0


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (POINTER, "a pointer of git-lfs"),
        (b"/annex/objects/MD5E-s1--0.bin\n", "a pointer of git-annex"),
        (b"<!DOCTYPE html><html>Sign in", "a page of a web site"),
        (b'{"error": "Access to model is restricted"}', "a server's refusal"),
        (gzip.compress(b"weights", mtime=0), "compressed by gzip"),
        (bytes(1000), "nothing but zeros"),
        (b"", "empty"),
        (b"GGUF\x03\x00", "GGUF"),
    ],
)
def test_what_lies_in_place_of_weights_is_named(tmp_path, name, content, what, capsys):
    (tmp_path / name).write_bytes(content)
    assert converted(tmp_path / name, "bert", tmp_path / "out") == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "tokenizer_config.json"])
def test_a_pointer_beside_the_weights_is_named(tmp_path, plain_bert, name, capsys):
    file = write(tmp_path / "x.safetensors", plain_bert, config={"num_attention_heads": 2})
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    (tmp_path / name).write_bytes(POINTER)
    assert converted(file, "bert", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert name in error and "git-lfs" in error


def test_weights_of_a_card_that_are_a_pointer_are_named(tmp_path):
    from mplug2.errors import CardError
    from mplug2.hub import weights

    (tmp_path / "w.safetensors").write_bytes(POINTER)
    with pytest.raises(CardError, match="a pointer of git-lfs"):
        weights.read(tmp_path / "w.safetensors")
