"""Kinds of checkpoint: their modules, the table of their keys, and the rules by which other keys are dead."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mplug2.convert.keys import Builder, KeyMap, layers
from mplug2.convert.shapes import (
    Settings,
    Shapes,
    bert_config,
    clip_config,
    count,
    fusion_config,
    released,
    shape,
    vit_config,
    zoo,
)
from mplug2.errors import CheckpointError
from mplug2.roles import Config

Rule = tuple[str, str]
"""A pattern of whole keys, and why they are not needed."""


@dataclass(frozen=True)
class Model:
    """A checkpoint understood. `fusion_stack` counts the foreign fusion layers, idle ones too; `flat`: its
    patches are cut from pictures."""

    configs: dict[str, Any]
    keys: KeyMap
    dead: tuple[Rule, ...] = ()
    fusion_stack: int = 0
    flat: bool = False

    def why_dead(self, key: str) -> str | None:
        """The rule by which a key is not needed, or None."""
        return next((rule for pattern, rule in self.dead if re.fullmatch(pattern, key)), None)


TEXT_TOWER = (
    r"(transformer\..*|token_embedding\.weight|positional_embedding|ln_final\..*|text_projection|logit_scale)"
)
TEXT_TOWER_DEAD = "CLIP's text tower: no task calls it"
PROJECTION_DEAD = "CLIP's projection: the vision tower ends in its last norm"
FUSION_EMBEDDINGS: Rule = (
    r"(fusion_encoder\.)?embeddings\..*",
    "embeddings of the fusion encoder: it is given embedded tokens",
)
DEAD_IN_MPLUG: tuple[Rule, ...] = (
    (r"\w+_m\..*|\w+_m", "a momentum copy: only training's teacher used it"),
    (r"(image|text|idx)_queue|queue_ptr|ptr_queue", "the contrastive queue: only training used it"),
    (rf"visual_encoder\.{TEXT_TOWER}", TEXT_TOWER_DEAD),
    (r"visual_encoder\.visual\.proj", PROJECTION_DEAD),
    (
        r".*\.(intermediate|output)_vision\..*",
        "an MLP for vision alone that no layer calls: vision shares the text's",
    ),
    (r"text_decoder\.bert\.encoder\.layer\.\d+\.latents", "latents of the decoder: no layer reads them"),
    (r"(text|fusion)_encoder\.cls\..*", "a masked-word head over the fusion encoder's own word table"),
    FUSION_EMBEDDINGS,
)
PRETRAINED_NAMES = ("text_encoder", "fusion_encoder")
"""Parts whose layers are under `.bert` in pretraining's files, and not in fine-tuning's."""


def canonical(key: str) -> str:
    """The name that a key has in a fine-tuned file of the official code, or in a recent one of Hugging
    Face."""
    for part in PRETRAINED_NAMES:
        key = re.sub(rf"^{part}(_m)?\.bert\.", rf"{part}\1.", key)
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{RENAMED[m[1]]}", key)


RENAMED = {"gamma": "weight", "beta": "bias"}

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
"""Parts of keys that torch.compile, FSDP, checkpointing and Lightning put anywhere among them."""
HOLDERS = ("module", "model", "base_model", "state_dict", "network", "net", "backbone", "teacher", "student")
"""What all keys of a trainer's file may begin with."""


def unwrapped(keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """({key without what trainers wrap around a model: key}, what was taken off). Raises CheckpointError
    where two keys become one."""
    names, off = {key: key for key in keys}, []
    for wrapper in sorted(WRAPPERS):
        if any(wrapper in name.split(".") for name in names):
            off.append(wrapper)
    shorter = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): key for name, key in names.items()
    }
    if len(shorter) != len(names):
        raise CheckpointError(f"its keys stand there twice, with and without {', '.join(off)}")
    while holder := next(
        (one for one in HOLDERS if all(name.startswith(f"{one}.") for name in shorter)), None
    ):
        off.append(holder)
        shorter = {name.removeprefix(f"{holder}."): key for name, key in shorter.items()}
        if not shorter:
            break
    return shorter, off


# -----------------------------------------------------------------------------------------------------------
# mPLUG and mPLUG-2


def mplug2(shapes: Shapes, settings: Settings | None = None) -> Model:
    """Official mPLUG-2, pretrained or fine-tuned: its last text layers, which have cross-attention, are
    universal."""
    text = count(shapes, "text_encoder.encoder.layer")
    universal = _universal_layers(shapes)
    if not universal:
        raise CheckpointError("no layer of text_encoder has cross-attention: it is no mPLUG-2")
    ffn, hidden = shape(shapes, "text_encoder.encoder.layer.0.intermediate.dense.weight")
    settings = settings or released(hidden)
    configs = _common(shapes, settings, private=text - universal)
    vision: Any = configs["vision"]
    configs["temporal"] = zoo("temporal", width=vision.width, depth=vision.depth)
    latents = shape(shapes, f"text_encoder.encoder.layer.{text - universal}.latents")[0]
    configs["universal"] = zoo(
        "universal", width=hidden, depth=universal, heads=settings.heads, hidden=ffn, latents=latents
    )
    return mplug_model(configs, count(shapes, "fusion_encoder.encoder.layer"), flat=False)


def mplug(shapes: Shapes, settings: Settings | None = None) -> Model:
    """mPLUG with CLIP's picture tower. It has no universal layers: its text layers are all private."""
    if _universal_layers(shapes):
        raise CheckpointError("layers of text_encoder have cross-attention: it is an mPLUG-2")
    if "visual_encoder.visual.conv1.weight" not in shapes:
        raise CheckpointError(
            "its visual_encoder is not CLIP's (visual_encoder.visual.conv1.weight is missing)"
        )
    settings = settings or released(shape(shapes, "text_encoder.embeddings.word_embeddings.weight")[1])
    configs = _common(shapes, settings, private=None)
    return mplug_model(configs, count(shapes, "fusion_encoder.encoder.layer"), flat=True)


def _universal_layers(shapes: Shapes) -> int:
    pattern = r"text_encoder\.encoder\.layer\.\d+\.crossattention\.self\.query\.bias"
    return sum(re.fullmatch(pattern, key) is not None for key in shapes)


def _common(shapes: Shapes, settings: Settings, private: int | None) -> dict[str, Config]:
    """The configs of the parts that both have, and of those that a file may have."""
    vision = clip_config(shapes, "visual_encoder.visual.", settings)
    text = bert_config("text", shapes, "text_encoder", settings, depth=private)
    fusion = fusion_config(shapes, "fusion_encoder.encoder.layer", settings)
    configs = {"vision": vision, "text": text, "fusion": fusion}
    if vision.width != text.width:
        configs["connector"] = zoo("connector", inputs=vision.width, width=text.width)
    if "text_decoder.bert.embeddings.word_embeddings.weight" in shapes:
        configs["decoder"] = bert_config("decoder", shapes, "text_decoder.bert", settings)
    if projection := shapes.get("vision_proj.weight"):
        configs["contrastive"] = zoo("heads", "ContrastiveConfig", width=projection[1], space=projection[0])
    if matching := shapes.get("itm_head.weight"):
        configs["matching"] = zoo("heads", "ClassifierConfig", width=matching[1], classes=matching[0])
    return configs


def mplug_model(configs: Mapping[str, Config], fusion_stack: int, *, flat: bool) -> Model:
    """The table of modules of these configs, as the official code names them."""
    made, by_name, dead = Builder(), dict[str, Any](configs), DEAD_IN_MPLUG
    layer, shared = "text_encoder.encoder.layer", 0
    if vision := by_name.get("vision"):
        made.clip_vision(vision, "visual_encoder.visual.", flat=flat)
    if temporal := by_name.get("temporal"):
        made.local_temporal(temporal.depth, "visual_encoder.visual.")
    if "connector" in by_name:
        made.linear("connector", "linear", "visn_fc")
        made.norm("connector", "norm", "visn_layer_norm")
    if text := by_name.get("text"):
        shared = text.depth
        made.bert_embedding("text", "text_encoder.embeddings", text.positions)
        made.bert_layers("text", layers(layer, range(shared)), cross=False)
    if universal := by_name.get("universal"):
        made.bert_layers("universal", layers(layer, range(shared, shared + universal.depth)), cross=True)
        made.add("universal", "latents", f"{layer}.{shared}.latents")
        made.norm("universal", "vision_norm", "visn_emb_norm")
    if fusion := by_name.get("fusion"):
        first = fusion_stack - fusion.depth
        stack = layers("fusion_encoder.encoder.layer", range(first, fusion_stack))
        made.bert_layers("fusion", stack, cross=True)
        dead += _idle_layers("fusion_encoder.encoder.layer", first)
    if decoder := by_name.get("decoder"):
        words = "text_decoder.bert.embeddings.word_embeddings.weight"
        made.bert_embedding("decoder", "text_decoder.bert.embeddings", decoder.positions)
        made.bert_layers(
            "decoder", layers("text_decoder.bert.encoder.layer", range(decoder.depth)), cross=True
        )
        made.predictor("decoder", "text_decoder.cls.predictions", words)
    if "contrastive" in by_name:
        made.linear("contrastive", "vision_projection", "vision_proj")
        made.linear("contrastive", "text_projection", "text_proj")
        made.add("contrastive", "learned_temperature", "temp")
    if "matching" in by_name:
        made.linear("matching", "linear", "itm_head")
    return Model(dict(configs), made.map, dead, fusion_stack, flat)


def _idle_layers(prefix: str, first: int) -> tuple[Rule, ...]:
    numbers = "|".join(map(str, range(first)))
    rule = f"a fusion layer below number {first}, the first that runs"
    return ((rf"{re.escape(prefix)}\.({numbers})\..*", rule),) if first else ()


# -----------------------------------------------------------------------------------------------------------
# Parts: a fusion encoder, CLIP's vision tower, the plain ViT, BERT


def fusion(shapes: Shapes, settings: Settings) -> Model:
    """mPLUG's fusion encoder by itself."""
    config, stack = fusion_config(shapes, "encoder.layer", settings), count(shapes, "encoder.layer")
    first, made = stack - config.depth, Builder()
    made.bert_layers("fusion", layers("encoder.layer", range(first, stack)), cross=True)
    dead = (*_idle_layers("encoder.layer", first), FUSION_EMBEDDINGS)
    return Model({"fusion": config}, made.map, dead, stack)


def clip(shapes: Shapes, settings: Settings | None = None) -> Model:
    """CLIP's vision tower: OpenAI's names (with or without `visual.`) or Hugging Face's (`vision_model.`)."""
    if any(key.startswith("vision_model.") for key in shapes):
        return _clip_of_hugging_face(shapes, settings)
    prefix = "visual." if "visual.conv1.weight" in shapes else ""
    config, made = (
        clip_config(shapes, prefix, settings, heads=settings.heads if settings else None),
        Builder(),
    )
    flat = len(shapes[f"{prefix}conv1.weight"]) == 4
    made.clip_vision(config, prefix, flat=flat)
    dead = (
        (rf"{prefix}proj", PROJECTION_DEAD),
        (r"input_resolution|context_length|vocab_size", "a number that OpenAI keeps beside its weights"),
        (TEXT_TOWER if prefix else r"(?!)", TEXT_TOWER_DEAD),
    )
    return Model({"vision": config}, made.map, dead, flat=flat)


def _clip_of_hugging_face(shapes: Shapes, settings: Settings | None) -> Model:
    root, depth = "vision_model.", count(shapes, "vision_model.encoder.layers")
    openai: dict[str, tuple[int, ...]] = {f"transformer.resblocks.{layer}": () for layer in range(depth)}
    openai["conv1.weight"] = shape(shapes, f"{root}embeddings.patch_embedding.weight")
    openai["positional_embedding"] = shape(shapes, f"{root}embeddings.position_embedding.weight")
    config, made = clip_config(openai, "", settings, heads=settings.heads if settings else None), Builder()
    made.clip_vision_of_hugging_face(config, root)
    dead = (
        (r"text_model\..*|text_projection\.weight|logit_scale", TEXT_TOWER_DEAD),
        (r"visual_projection\.weight", PROJECTION_DEAD),
    )
    return Model({"vision": config}, made.map, dead, flat=True)


def vit(shapes: Shapes, settings: Settings | None = None) -> Model:
    """The plain vision transformer under timm's names, as DeiT, DINO and MAE publish it too."""
    config, made = vit_config(shapes, settings.heads if settings else None), Builder()
    made.plain_vision(config)
    dead = (
        (r"head\..*", "a classifier: the vision tower ends in its last norm"),
        (r"mask_token|decoder_.*", "MAE's decoder: only its pretraining used it"),
    )
    return Model({"vision": config}, made.map, dead, flat=True)


def bert(shapes: Shapes, settings: Settings | None = None) -> Model:
    """BERT under Hugging Face's names, an encoder or a masked-word model: all its layers go to `text`."""
    root = "bert." if any(key.startswith("bert.") for key in shapes) else ""
    words = f"{root}embeddings.word_embeddings.weight"
    settings = settings or released(shape(shapes, words)[1])
    config: Any = bert_config("text", shapes, root.rstrip("."), settings)
    configs, made = {"text": config}, Builder()
    made.bert_embedding("text", f"{root}embeddings", config.positions)
    made.bert_layers("text", layers(f"{root}encoder.layer", range(config.depth)), cross=False)
    if "cls.predictions.transform.dense.weight" in shapes:
        configs["unmasker"] = zoo("heads", "UnmaskerConfig", width=config.width, vocabulary=config.vocabulary)
        made.predictor("unmasker", "cls.predictions", words)
    dead = (
        (rf"{root}pooler\..*", "BERT's pooler: tasks read the first token itself"),
        (r"cls\.seq_relationship\..*", "BERT's next-sentence head: no task asks that"),
    )
    return Model(configs, made.map, dead)


Family = Callable[[Shapes, Settings | None], Model]
FAMILIES: dict[str, Family] = {"mplug2": mplug2, "mplug": mplug, "clip": clip, "vit": vit, "bert": bert}

TELLING = {
    "clip": r"(visual\.)?conv1\.weight|vision_model\.embeddings\..*",
    "vit": r"patch_embed\.proj\.weight",
    "bert": r"(bert\.)?embeddings\.word_embeddings\.weight",
    "mplug2": r"text_encoder\.encoder\.layer\.\d+\.crossattention\..*",
    "mplug": r"text_encoder\.encoder\.layer\..*",
}
"""Keys that only one family has; of those that match, the first family counts."""


def likely(keys: Iterable[str]) -> str | None:
    """The family that a checkpoint's keys look like, None where it is none of FAMILIES."""
    keys = list(keys)
    return next((name for name, key in TELLING.items() if any(re.fullmatch(key, one) for one in keys)), None)
