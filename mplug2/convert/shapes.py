"""Configs read from a checkpoint's shapes, and Settings: what shapes do not tell.

Nothing is read of a file before its shapes are known to fit.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplug2.errors import CheckpointError, nearest
from mplug2.hub.mistaken import mistaken
from mplug2.hub.typed_json import decode
from mplug2.roles import Config

Shapes = Mapping[str, tuple[int, ...]]
CLIP_HEAD = 64  # the width of a head in every CLIP tower
HEADS_OF_HUGGING_FACE = 12  # of a CLIP whose configuration does not say
HEADS_OF_VIT = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""By width: tiny, small, base, large and huge of timm, DeiT, DINO and MAE."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What shapes do not tell. `fusion_layers` of the fusion stack run, its last; of these, numbers (from 0)
    that are multiples of `stride_layer`, but for the first, are connected. `tubelet` frames make a token,
    where a picture's patches are inflated to clips. `activation`: of a CLIP tower, "quick_gelu" (OpenAI's) or
    "gelu"."""

    heads: int
    fusion_layers: int = 0
    stride_layer: int = 1000
    temporal_stride: int = 2
    tubelet: int = 1
    frames: int = 16
    activation: str = "quick_gelu"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "fusion_layers" else 1
            if field.name != "activation" and value < least:
                raise CheckpointError(f"{field.name} is {value}, expected at least {least}")

    @property
    def connected_at(self) -> tuple[int, ...]:
        return tuple(range(self.stride_layer, self.fusion_layers, self.stride_layer))


RELEASED = {768: Settings(heads=12, fusion_layers=3), 1024: Settings(heads=16, fusion_layers=6)}
"""By hidden width: config_bert.json and config_bert_large_text.json of the official code."""


ACTIVATIONS_AND_EPSILON = {
    "CLIP": (("quick_gelu", "gelu"), 1e-5),
    "BERT": (("gelu",), 1e-12),
    "ViT": (("gelu",), 1e-6),
}
"""What the zoo's modules of these kinds compute with; the first activation is taken where none is stated."""


def read_settings(path: Path, family: str = "") -> Settings:
    """From a BERT configuration of the official code or of Hugging Face (for CLIP, its "vision_config"), or a
    JSON object that holds the former under "bert_config" (and perhaps "config", the yaml's fields); of the
    `family` vit, an object with timm's "num_heads". Raises CheckpointError."""
    given = read_object(path)
    try:
        most = given.get("bert_config", given.get("vision_config", given))
        sees = "vision_config" in given or "patch_size" in most
        kind = "ViT" if family == "vit" else "CLIP" if sees else "BERT"
        activations, epsilon = ACTIVATIONS_AND_EPSILON[kind]
        activation = most.get("hidden_act", activations[0])
        stated = float(most.get("layer_norm_eps", epsilon))
        if activation not in activations or stated != epsilon:
            raise CheckpointError(
                f"configuration {path}: activation {activation}, norms of epsilon {stated:g}; the zoo's "
                f"{kind} has {' or '.join(activations)} and {epsilon:g}"
            )
        places = most.get("position_embedding_type", "absolute")
        if places != "absolute":
            raise CheckpointError(f"configuration {path}: positions are {places}, the zoo's are absolute")
        if kind == "CLIP" and most is not given:  # of a nested configuration Hugging Face leaves out defaults
            most = {"num_attention_heads": HEADS_OF_HUGGING_FACE} | most
        return Settings(
            heads=int(most["num_heads"] if "num_heads" in most else most["num_attention_heads"]),
            fusion_layers=int(most.get("fusion_layers", 0)),
            stride_layer=int(most.get("stride_layer", 1000)),
            temporal_stride=int(given.get("config", {}).get("temporal_stride", 2)),
            frames=int(given.get("config", {}).get("model_num_frames", 16)),
            activation=activation if kind == "CLIP" else "quick_gelu",
        )
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise CheckpointError(f"configuration {path}: not a JSON object of settings ({error})") from None
    except KeyError as error:
        raise CheckpointError(f"configuration {path}: has no {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        content = path.read_bytes()
        given = json.loads(content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {mistaken(content) or f'not JSON ({error})'}") from None
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(given).__name__}, expected an object of settings")
    return given


def reads_lowercase(vocabulary: Path) -> bool:
    """Whether a vocabulary was made of texts in lower case: as Hugging Face's tokenizer_config.json beside it
    says, and true where it says nothing. Raises CheckpointError."""
    path = vocabulary.parent / "tokenizer_config.json"
    if not path.is_file():
        return True
    return bool(read_object(path).get("do_lower_case", True))


def zoo(file: str, kind: str = "Config", **fields: Any) -> Any:
    """A config of the zoo by import path, as a card would name it: `mplug2` does not import its modules."""
    return decode(Config, plain(file, kind, fields), file)


def plain(file: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": f"mplug2.modules.{file}:{kind}", **fields}


def clip_config(shapes: Shapes, prefix: str, settings: Settings | None, heads: int | None = None) -> Any:
    """Square pictures, as official tables are; heads 64 wide, as in every released CLIP, unless `heads` are
    given."""
    conv = shape(shapes, f"{prefix}conv1.weight")
    width, patch, tubelet = conv[0], conv[-1], conv[2] if len(conv) == 5 else 1
    places = shape(shapes, f"{prefix}positional_embedding")[0] - 1
    side = math.isqrt(places) * patch
    if len(conv) not in (4, 5) or conv[1] != 3 or conv[-2] != patch or math.isqrt(places) ** 2 != places:
        raise CheckpointError(
            f"{prefix}conv1.weight of shape {conv} with {places} places is no CLIP vision tower"
        )
    if settings and len(conv) == 4:
        tubelet = settings.tubelet
    stride = settings.temporal_stride if settings and tubelet > 1 else 1
    stem = plain("vision", "Patches", {"patch": patch, "tubelet": tubelet, "stride": stride})
    depth = count(shapes, f"{prefix}transformer.resblocks")
    return zoo(
        "vision",
        image=[side, side],
        stem=stem,
        width=width,
        depth=depth,
        heads=heads or max(width // CLIP_HEAD, 1),
        blocks=plain("vision", "OpenClip" if settings and settings.activation == "gelu" else "Clip", {}),
    )


def vit_config(shapes: Shapes, heads: int | None) -> Any:
    """A plain ViT of timm's for square pictures. Its heads are not all of one width: the published sizes' are
    known."""
    patches = "patch_embed.proj.weight"
    openai: dict[str, tuple[int, ...]] = {
        f"transformer.resblocks.{layer}": () for layer in range(count(shapes, "blocks"))
    }
    openai["conv1.weight"] = shape(shapes, patches)
    openai["positional_embedding"] = shape(shapes, "pos_embed")[1:]
    width, patch = openai["conv1.weight"][0], openai["conv1.weight"][-1]
    if not heads and width not in HEADS_OF_VIT:
        raise CheckpointError(
            f"a width of {width} is none of the published ViTs' {sorted(HEADS_OF_VIT)}: say in a JSON file "
            f'how many heads it has, {{"num_heads": ...}} (--config)'
        )
    clip = clip_config(openai, "", None, heads=heads or HEADS_OF_VIT[width])
    return dataclasses.replace(
        clip, stem=zoo("vision", "BiasedPatches", patch=patch), blocks=zoo("vision", "Plain")
    )


def bert_config(file: str, shapes: Shapes, prefix: str, settings: Settings, depth: int | None = None) -> Any:
    root = f"{prefix}." if prefix else ""
    words, layer = f"{root}embeddings.word_embeddings.weight", f"{root}encoder.layer"
    vocabulary, width = shape(shapes, words)
    return zoo(
        file,
        vocabulary=vocabulary,
        positions=shape(shapes, f"{root}embeddings.position_embeddings.weight")[0],
        width=width,
        depth=count(shapes, layer) if depth is None else depth,
        heads=settings.heads,
        hidden=shape(shapes, f"{layer}.0.intermediate.dense.weight")[0],
    )


def fusion_config(shapes: Shapes, prefix: str, settings: Settings) -> Any:
    stack = count(shapes, prefix)
    if not 0 < settings.fusion_layers <= stack:
        raise CheckpointError(
            f"fusion_layers is {settings.fusion_layers}, the fusion encoder has {stack} layers"
        )
    ffn, width = shape(shapes, f"{prefix}.0.intermediate.dense.weight")
    return zoo(
        "fusion",
        width=width,
        depth=settings.fusion_layers,
        heads=settings.heads,
        hidden=ffn,
        connected_at=list(settings.connected_at),
    )


def released(hidden: int) -> Settings:
    if hidden not in RELEASED:
        raise CheckpointError(
            f"a hidden width of {hidden} is none of the released models' {sorted(RELEASED)}: give their BERT "
            f"configuration (--config), which says how many heads and fusion layers there are"
        )
    return RELEASED[hidden]


def count(shapes: Shapes, prefix: str) -> int:
    """How many layers `prefix.0`, `prefix.1`, ... there are."""
    start = len(prefix) + 1
    numbers = {key[start:].split(".")[0] for key in shapes if key.startswith(f"{prefix}.")}
    count = len(numbers)
    if not count or numbers != {str(number) for number in range(count)}:
        raise CheckpointError(f"expected layers {prefix}.0, 1, 2, ..., found {sorted(numbers)[:8] or 'none'}")
    return count


def shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f"key {key} is missing{nearest(key, shapes)}")
    return shapes[key]
