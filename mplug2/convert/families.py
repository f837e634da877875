"""Kinds of checkpoint: their modules' configs read from shapes, their key table, and the rules by which keys
are dead.

`describe` looks at shapes only, so nothing is read before it is known to fit. What shapes do not tell (heads,
how many fusion layers run, connected layers) comes from Settings: a configuration file, or the released
models'.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mplug2.card import decode
from mplug2.convert.keys import Builder, KeyMap, layers
from mplug2.errors import CheckpointError, nearest
from mplug2.roles import Config

Shapes = Mapping[str, tuple[int, ...]]
CLIP_HEAD = 64  # the width of a head in every CLIP tower


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What shapes do not tell. `fusion_layers` of the fusion stack run, its last; of these, numbers (from 0)
    that are multiples of `stride_layer`, but for the first, are connected. `tubelet` frames make a token,
    where a picture's patches are inflated to clips."""

    heads: int
    fusion_layers: int = 0
    stride_layer: int = 1000
    temporal_stride: int = 2
    tubelet: int = 1

    @property
    def connected_at(self) -> tuple[int, ...]:
        return tuple(range(self.stride_layer, self.fusion_layers, self.stride_layer))


RELEASED = {768: Settings(heads=12, fusion_layers=3), 1024: Settings(heads=16, fusion_layers=6)}
"""By hidden width: config_bert.json and config_bert_large_text.json of the official code."""


@dataclass(frozen=True)
class Model:
    """A checkpoint understood. `dead`: (pattern of whole keys, the rule by which they are not needed)."""

    configs: dict[str, Config]
    keys: KeyMap
    dead: tuple[tuple[str, str], ...] = ()
    settings: Settings | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def fusion_start(self) -> int:
        """The number of the first fusion layer that runs."""
        return int(
            re.findall(
                r"\d+", self.keys.sources["fusion", "layers.layers.attention.query.bias"].pieces[0].key
            )[0]
        )

    def why_dead(self, key: str) -> str | None:
        return next((rule for pattern, rule in self.dead if re.fullmatch(pattern, key)), None)


def read_settings(path: Path) -> Settings:
    """From a BERT configuration of the official code, or a JSON object that holds it under "bert_config" (and
    perhaps "config", the yaml's fields). Raises CheckpointError."""
    try:
        given = json.loads(path.read_text())
        bert = given.get("bert_config", given)
        more = given.get("config", {})
        return Settings(
            heads=int(bert["num_attention_heads"]),
            fusion_layers=int(bert.get("fusion_layers", 0)),
            stride_layer=int(bert.get("stride_layer", 1000)),
            temporal_stride=int(more.get("temporal_stride", 2)),
        )
    except OSError as error:
        raise CheckpointError(f"configuration {path}: cannot be read ({error.strerror})") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"configuration {path}: not a JSON object of settings ({error})") from None
    except KeyError as error:
        raise CheckpointError(f"configuration {path}: has no {error}") from None


# -----------------------------------------------------------------------------------------------------------
# mPLUG-2

CLIP_TEXT_TOWER = (
    r"(transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*|text_projection|logit_scale)"
)

TEXT_TOWER_DEAD = "CLIP's text tower: no task calls it"
PROJECTION_DEAD = "CLIP's projection: the vision tower ends in its last norm"
DEAD_IN_FUSION = (
    r"(fusion_encoder\.)?embeddings\..*",
    "embeddings of the fusion encoder: it is given embedded tokens",
)

DEAD_IN_MPLUG2 = (
    (rf"visual_encoder\.{CLIP_TEXT_TOWER}", TEXT_TOWER_DEAD),
    (r"visual_encoder\.visual\.proj", PROJECTION_DEAD),
    (
        r".*\.(intermediate|output)_vision\..*",
        "a vision-only FFN that no layer calls: both streams share the other one",
    ),
    (
        r"text_decoder\.bert\.encoder\.layer\.\d+\.latents",
        "latents of the decoder: only the text encoder's are used",
    ),
    DEAD_IN_FUSION,
    (r"(\w+)_m\..*", "a momentum copy, which only training's teacher used"),
    (r"(text|fusion)_encoder\.cls\..*", "a masked-word head over a word table of the fusion encoder's own"),
)


def mplug2(shapes: Shapes, settings: Settings | None = None) -> Model:
    """Official mPLUG-2, fine-tuned for captions or questions."""
    hidden = _shape(shapes, "text_encoder.embeddings.word_embeddings.weight")[1]
    settings = settings or _released(hidden)
    configs = {"vision": _clip_config(shapes, "visual_encoder.visual.", settings)}
    width, depth = configs["vision"].width, configs["vision"].depth
    configs["temporal"] = _zoo("temporal", width=width, depth=depth)
    if width != hidden:
        configs["connector"] = _zoo("connector", inputs=width, width=hidden)
    text = _count(shapes, "text_encoder.encoder.layer")
    universal = sum(
        f"text_encoder.encoder.layer.{layer}.crossattention.self.query.bias" in shapes
        for layer in range(text)
    )
    if not universal:
        raise CheckpointError(
            "no layer of text_encoder has cross-attention: this is no mPLUG-2 (--from mplug?)"
        )
    latents = _shape(shapes, f"text_encoder.encoder.layer.{text - universal}.latents")[0]
    configs["text"] = _bert_config("text", shapes, "text_encoder", settings, depth=text - universal)
    configs["universal"] = _zoo(
        "universal", width=hidden, depth=universal, heads=settings.heads, hidden=_ffn(shapes), latents=latents
    )
    stack = _count(shapes, "fusion_encoder.encoder.layer")
    configs["fusion"] = _fusion_config(shapes, "fusion_encoder.encoder.layer", settings)
    configs["decoder"] = _bert_config("decoder", shapes, "text_decoder.bert", settings)
    return mplug2_model(configs, settings, stack)


def mplug2_model(configs: Mapping[str, Config], settings: Settings | None, fusion_stack: int) -> Model:
    """The key table of modules of these configs; `fusion_stack` counts the official fusion layers, unused
    ones too."""
    made = Builder()
    by_name: Mapping[str, Any] = configs
    dead = DEAD_IN_MPLUG2
    if vision := by_name.get("vision"):
        made.clip_vision(vision, "visual_encoder.visual.", flat=False)
    if temporal := by_name.get("temporal"):
        made.local_temporal(temporal.depth, "visual_encoder.visual.")
    if "connector" in by_name:
        made.linear("connector", "linear", "visn_fc")
        made.norm("connector", "norm", "visn_layer_norm")
    private = 0
    if text := by_name.get("text"):
        private = text.depth
        made.bert_embedding("text", "text_encoder.embeddings", text.positions)
        made.bert_layers("text", layers("text_encoder.encoder.layer", range(private)), cross=False)
    if universal := by_name.get("universal"):
        shared = layers("text_encoder.encoder.layer", range(private, private + universal.depth))
        made.bert_layers("universal", shared, cross=True)
        made.add("universal", "latents", f"{shared[0]}.latents")
        made.norm("universal", "vision_norm", "visn_emb_norm")
    if fusion := by_name.get("fusion"):
        first = fusion_stack - fusion.depth
        made.bert_layers(
            "fusion", layers("fusion_encoder.encoder.layer", range(first, fusion_stack)), cross=True
        )
        dead += _idle_layers("fusion_encoder.encoder.layer", first)
    if decoder := by_name.get("decoder"):
        made.bert_embedding("decoder", "text_decoder.bert.embeddings", decoder.positions)
        made.bert_layers(
            "decoder", layers("text_decoder.bert.encoder.layer", range(decoder.depth)), cross=True
        )
        made.predictor(
            "decoder", "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings.weight"
        )
    return Model(dict(configs), made.map, dead, settings)


def _idle_layers(prefix: str, first: int) -> tuple[tuple[str, str], ...]:
    numbers = "|".join(map(str, range(first)))
    rule = f"a fusion layer below number {first}, the first that runs"
    return ((rf"{re.escape(prefix)}\.({numbers})\..*", rule),) if first else ()


# -----------------------------------------------------------------------------------------------------------
# Parts: a fusion encoder, CLIP's vision tower


def fusion(shapes: Shapes, settings: Settings) -> Model:
    """mPLUG's fusion encoder by itself."""
    first = _count(shapes, "encoder.layer") - settings.fusion_layers
    config = _fusion_config(shapes, "encoder.layer", settings)
    made = Builder()
    made.bert_layers(
        "fusion", layers("encoder.layer", range(first, first + settings.fusion_layers)), cross=True
    )
    return Model(
        {"fusion": config}, made.map, (*_idle_layers("encoder.layer", first), DEAD_IN_FUSION), settings
    )


def clip(shapes: Shapes, settings: Settings | None = None) -> Model:
    """CLIP's vision tower: OpenAI's names (with or without `visual.`) or Hugging Face's (`vision_model.`)."""
    if any(key.startswith("vision_model.") for key in shapes):
        return _clip_of_hugging_face(shapes, settings)
    prefix = "visual." if "visual.conv1.weight" in shapes else ""
    config = _clip_config(shapes, prefix, settings, settings.heads if settings else None)
    made = Builder()
    made.clip_vision(config, prefix, flat=len(shapes[f"{prefix}conv1.weight"]) == 4)
    tower = CLIP_TEXT_TOWER if prefix else r"(?!)"
    sizes = (
        r"input_resolution|context_length|vocab_size",
        "a number that OpenAI's file carries beside its weights",
    )
    dead = ((tower, TEXT_TOWER_DEAD), (rf"{re.escape(prefix)}proj", PROJECTION_DEAD), sizes)
    return Model({"vision": config}, made.map, dead, settings)


def _clip_of_hugging_face(shapes: Shapes, settings: Settings | None) -> Model:
    root = "vision_model."
    conv, places = f"{root}embeddings.patch_embedding.weight", f"{root}embeddings.position_embedding.weight"
    named = {"conv1.weight": _shape(shapes, conv), "positional_embedding": _shape(shapes, places)}
    depth = _count(shapes, f"{root}encoder.layers")
    named |= {f"transformer.resblocks.{layer}": () for layer in range(depth)}
    config = _clip_config(named, "", settings, settings.heads if settings else None)
    made = Builder()
    made.clip_vision_of_hugging_face(config, root)
    dead = (
        (r"text_model\..*|text_projection\.weight|logit_scale", TEXT_TOWER_DEAD),
        (r"visual_projection\.weight", PROJECTION_DEAD),
    )
    return Model({"vision": config}, made.map, dead, settings)


# -----------------------------------------------------------------------------------------------------------
# Configs from shapes


def _zoo(file: str, kind: str = "Config", **fields: Any) -> Any:
    """A config of the zoo by import path, as a card would name it: `mplug2` does not import its modules."""
    return decode(Config, _plain(file, kind, fields), file)


def _plain(file: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": f"mplug2.modules.{file}:{kind}", **fields}


def _clip_config(shapes: Shapes, prefix: str, settings: Settings | None, heads: int | None = None) -> Any:
    """Square pictures, as official tables are; heads 64 wide, as in every released CLIP, unless `heads` are
    given."""
    conv = _shape(shapes, f"{prefix}conv1.weight")
    width, patch, tubelet = conv[0], conv[-1], conv[2] if len(conv) == 5 else 1
    places = _shape(shapes, f"{prefix}positional_embedding")[0] - 1
    side = math.isqrt(places) * patch
    if len(conv) not in (4, 5) or conv[1] != 3 or conv[-2] != patch or math.isqrt(places) ** 2 != places:
        raise CheckpointError(
            f"{prefix}conv1.weight of shape {conv} with {places} places is no CLIP vision tower"
        )
    if settings and len(conv) == 4:
        tubelet = settings.tubelet
    stride = settings.temporal_stride if settings and tubelet > 1 else 1
    stem = _plain("vision", "Patches", {"patch": patch, "tubelet": tubelet, "stride": stride})
    depth = _count(shapes, f"{prefix}transformer.resblocks")
    return _zoo(
        "vision",
        image=[side, side],
        stem=stem,
        width=width,
        depth=depth,
        heads=heads or max(width // CLIP_HEAD, 1),
    )


def _bert_config(file: str, shapes: Shapes, prefix: str, settings: Settings, depth: int | None = None) -> Any:
    vocabulary, width = _shape(shapes, f"{prefix}.embeddings.word_embeddings.weight")
    layer = f"{prefix}.encoder.layer"
    return _zoo(
        file,
        vocabulary=vocabulary,
        positions=_shape(shapes, f"{prefix}.embeddings.position_embeddings.weight")[0],
        width=width,
        depth=_count(shapes, layer) if depth is None else depth,
        heads=settings.heads,
        hidden=_shape(shapes, f"{layer}.0.intermediate.dense.weight")[0],
    )


def _fusion_config(shapes: Shapes, prefix: str, settings: Settings) -> Any:
    stack = _count(shapes, prefix)
    if not 0 < settings.fusion_layers <= stack:
        raise CheckpointError(
            f"fusion_layers is {settings.fusion_layers}, the fusion encoder has {stack} layers"
        )
    ffn, width = _shape(shapes, f"{prefix}.0.intermediate.dense.weight")
    return _zoo(
        "fusion",
        width=width,
        depth=settings.fusion_layers,
        heads=settings.heads,
        hidden=ffn,
        connected_at=list(settings.connected_at),
    )


def _ffn(shapes: Shapes) -> int:
    return _shape(shapes, "text_encoder.encoder.layer.0.intermediate.dense.weight")[0]


def _released(hidden: int) -> Settings:
    if hidden not in RELEASED:
        raise CheckpointError(
            f"a hidden width of {hidden} is none of the released models' {sorted(RELEASED)}: give their BERT "
            f"configuration (--config), which says how many heads and fusion layers there are"
        )
    return RELEASED[hidden]


def _count(shapes: Shapes, prefix: str) -> int:
    """How many layers `prefix.0`, `prefix.1`, ... there are."""
    start = len(prefix) + 1
    numbers = {key[start:].split(".")[0] for key in shapes if key.startswith(f"{prefix}.")}
    count = len(numbers)
    if not count or numbers != {str(number) for number in range(count)}:
        raise CheckpointError(f"expected layers {prefix}.0, 1, 2, ..., found {sorted(numbers)[:8] or 'none'}")
    return count


def _shape(shapes: Shapes, key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(
            f"key {key} is missing{nearest(key, shapes)}; is this the kind of checkpoint --from names?"
        )
    return shapes[key]


Family = Callable[[Shapes, Settings | None], Model]
