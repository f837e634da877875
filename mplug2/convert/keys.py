"""Which official tensor goes where: a table from every array of our modules to the official keys that it is
made of.

Built from configs alone, so that it serves both directions. Names: official mPLUG-2 (commit a46aa97) after
fine-tuning, mPLUG, CLIP and BERT share their parts. A stacked array is made of one tensor a layer; a packed
tensor (query, key and value in one) is shared by three arrays.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mplug2.convert.layout import Depthwise, Matrix, Patches, Same, Turn
from mplug2.network import Parameters, nested

LAYER_OF_BERT = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
}
NORMS_OF_BERT = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "mlp_norm"}
CROSS_OF_BERT = {
    "crossattention.self.query": "cross.query",
    "crossattention.self.key": "cross.key",
    "crossattention.self.value": "cross.value",
    "crossattention.output.dense": "cross.out",
}
CROSS_NORM = ("crossattention.output.LayerNorm", "cross_norm")

Path = tuple[str, str]
"""A module and the name of one of its arrays, `("vision", "blocks.layers.mlp.up.kernel")`."""


@dataclass(frozen=True)
class Piece:
    """An official tensor's share in an array: a layer of it, or (`third`) a third of the tensor is."""

    key: str
    turn: Turn
    third: int | None = None


@dataclass(frozen=True)
class Source:
    """What an array is made of: its pieces, one a layer where it is stacked."""

    pieces: tuple[Piece, ...]
    stacked: bool


@dataclass(frozen=True)
class KeyMap:
    """`sources`: our arrays and what they are made of. `tied`: keys that repeat another one's tensor.
    `counted`: keys of int64 buffers 0, 1, 2, ... and their lengths. Both are checked when read and made again
    when written."""

    sources: dict[Path, Source] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)

    def keys(self) -> set[str]:
        """Every official key whose tensor goes into an array."""
        return {piece.key for source in self.sources.values() for piece in source.pieces}

    def places(self) -> dict[str, list[tuple[Path, int | None, Piece]]]:
        """The other way: official key -> where its shares lie (array, layer, share), thirds in order."""
        found: dict[str, list[tuple[Path, int | None, Piece]]] = {}
        for path, source in self.sources.items():
            for layer, piece in enumerate(source.pieces):
                found.setdefault(piece.key, []).append((path, layer if source.stacked else None, piece))
        return {key: sorted(places, key=lambda place: place[2].third or 0) for key, places in found.items()}


def to_ours(keys: KeyMap, tensors: Mapping[str, np.ndarray]) -> Parameters:
    """Official tensors in memory -> `{module: nested dict}`. For small ones: `writing` streams large ones."""
    made: Parameters = {}
    for (module, name), source in keys.sources.items():
        parts = [piece.turn.to_ours(_share(tensors[piece.key], piece.third)) for piece in source.pieces]
        array = np.stack(parts) if source.stacked else np.ascontiguousarray(parts[0])
        made.setdefault(module, {})[tuple(name.split("."))] = array
    return {module: nested(arrays) for module, arrays in made.items()}


def to_foreign(keys: KeyMap, arrays: Mapping[Path, Any]) -> dict[str, np.ndarray]:
    """`{(module, name): array}` -> official tensors by key, of the modules that are there; tied keys are left
    out."""
    there, tensors = {module for module, _ in arrays}, {}
    for key, places in keys.places().items():
        if {path[0] for path, _, _ in places} <= there:
            parts = [
                piece.turn.to_foreign(np.asarray(arrays[path] if layer is None else arrays[path][layer]))
                for path, layer, piece in places
            ]
            tensors[key] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return tensors


def _share(tensor: np.ndarray, third: int | None) -> np.ndarray:
    return tensor if third is None else np.split(tensor, 3)[third]


# -----------------------------------------------------------------------------------------------------------
# Building a table


class Builder:
    """Adds arrays to a KeyMap part by part. `keys` are the official prefixes of a part, one a layer; a plain
    string stands for a part that is not stacked."""

    def __init__(self):
        self.map = KeyMap()

    def add(
        self,
        module: str,
        name: str,
        keys: str | Sequence[str],
        turn: Turn | None = None,
        third: int | None = None,
    ) -> None:
        each = [keys] if isinstance(keys, str) else keys
        pieces = tuple(Piece(key, turn or Same(), third) for key in each)
        self.map.sources[module, name] = Source(pieces, stacked=not isinstance(keys, str))

    def linear(self, module: str, name: str, keys: str | Sequence[str], tail: int = 0) -> None:
        self.add(module, f"{name}.kernel", _each(keys, "weight"), Matrix(tail))
        self.add(module, f"{name}.bias", _each(keys, "bias"))

    def norm(self, module: str, name: str, keys: str | Sequence[str]) -> None:
        self.add(module, f"{name}.scale", _each(keys, "weight"))
        self.add(module, f"{name}.bias", _each(keys, "bias"))

    def bert_layers(self, module: str, keys: Sequence[str], *, cross: bool) -> None:
        """A stack of BERT's layers, `keys` their prefixes."""
        for official, ours in {**LAYER_OF_BERT, **(CROSS_OF_BERT if cross else {})}.items():
            self.linear(module, f"layers.layers.{ours}", _each(keys, official))
        for official, ours in [*NORMS_OF_BERT.items(), *([CROSS_NORM] if cross else [])]:
            self.norm(module, f"layers.layers.{ours}", _each(keys, official))

    def bert_embedding(self, module: str, prefix: str, positions: int, *, counted: bool = True) -> None:
        self.add(module, "embedding.words", f"{prefix}.word_embeddings.weight")
        self.add(module, "embedding.positions", f"{prefix}.position_embeddings.weight")
        self.add(module, "embedding.types", f"{prefix}.token_type_embeddings.weight")
        self.norm(module, "embedding.norm", f"{prefix}.LayerNorm")
        if counted:
            self.map.counted[f"{prefix}.position_ids"] = positions

    def predictor(self, module: str, prefix: str, words: str) -> None:
        """BERT's prediction head, whose last projection is tied to the word table `words` and its bias to
        itself."""
        self.linear(module, "predictor.transform", f"{prefix}.transform.dense")
        self.norm(module, "predictor.norm", f"{prefix}.transform.LayerNorm")
        self.add(module, "predictor.bias", f"{prefix}.bias")
        self.map.tied[f"{prefix}.decoder.weight"] = words
        self.map.tied[f"{prefix}.decoder.bias"] = f"{prefix}.bias"

    def clip_vision(self, config: Any, prefix: str, *, flat: bool) -> None:
        """CLIP's vision transformer; `flat` where its patches are cut from pictures, not from clips."""
        stem = config.stem
        self.add("vision", "class_token", f"{prefix}class_embedding")
        self.add("vision", "positions", f"{prefix}positional_embedding")
        self.add("vision", "stem.kernel", f"{prefix}conv1.weight", Patches(stem.patch, stem.tubelet, flat))
        self.norm("vision", "input_norm", f"{prefix}ln_pre")
        self.norm("vision", "output_norm", f"{prefix}ln_post")
        blocks = [f"{prefix}transformer.resblocks.{layer}" for layer in range(config.depth)]
        self._packed(_each(blocks, "attn.in_proj_weight"), _each(blocks, "attn.in_proj_bias"))
        linear = {"attention.out": "attn.out_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        self._blocks(blocks, linear, {"attention_norm": "ln_1", "mlp_norm": "ln_2"})

    def clip_vision_of_hugging_face(self, config: Any, prefix: str) -> None:
        """The same tower under Hugging Face's names (`pre_layrnorm` is spelled so)."""
        blocks = layers(f"{prefix}encoder.layers", range(config.depth))
        self.add("vision", "class_token", f"{prefix}embeddings.class_embedding")
        self.add("vision", "positions", f"{prefix}embeddings.position_embedding.weight")
        stem = Patches(config.stem.patch, config.stem.tubelet, flat=True)
        self.add("vision", "stem.kernel", f"{prefix}embeddings.patch_embedding.weight", stem)
        self.map.counted[f"{prefix}embeddings.position_ids"] = 1 + config.grid[0] * config.grid[1]
        self.norm("vision", "input_norm", f"{prefix}pre_layrnorm")
        self.norm("vision", "output_norm", f"{prefix}post_layernorm")
        projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
        linear = {f"attention.{name}": f"self_attn.{official}" for name, official in projections.items()}
        linear |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
        self._blocks(blocks, linear, {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"})

    def plain_vision(self, config: Any) -> None:
        """The plain vision transformer under timm's names, which DeiT, DINO and MAE share."""
        blocks = layers("blocks", range(config.depth))
        self.add("vision", "class_token", "cls_token", Same(lead=2))
        self.add("vision", "positions", "pos_embed", Same(lead=1))
        self.add("vision", "stem.kernel", "patch_embed.proj.weight", Patches(config.stem.patch, flat=True))
        self.add("vision", "stem.bias", "patch_embed.proj.bias")
        self.norm("vision", "output_norm", "norm")
        self._packed(_each(blocks, "attn.qkv.weight"), _each(blocks, "attn.qkv.bias"))
        linear = {"attention.out": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
        self._blocks(blocks, linear, {"attention_norm": "norm1", "mlp_norm": "norm2"})

    def _packed(self, weights: str | Sequence[str], biases: str | Sequence[str]) -> None:
        """A vision tower's queries, keys and values, which lie in one matrix a block."""
        for third, name in enumerate(("query", "key", "value")):
            ours = f"blocks.layers.attention.{name}"
            self.add("vision", f"{ours}.kernel", weights, Matrix(), third)
            self.add("vision", f"{ours}.bias", biases, Same(), third)

    def _blocks(self, blocks: list[str], linear: Mapping[str, str], norms: Mapping[str, str]) -> None:
        """A vision tower's layers, {ours: theirs} in a block."""
        for ours, official in linear.items():
            self.linear("vision", f"blocks.layers.{ours}", _each(blocks, official))
        for ours, official in norms.items():
            self.norm("vision", f"blocks.layers.{ours}", _each(blocks, official))

    def local_temporal(self, depth: int, prefix: str) -> None:
        blocks = [f"{prefix}transformer.resblocks.{layer}" for layer in range(depth)]
        for official, place in (("lmhra1", "before_attention"), ("lmhra2", "before_mlp")):
            branch, ours = _each(blocks, official), f"branches.layers.{place}"
            self.norm("temporal", f"{ours}.norm", _each(branch, "ln"))
            self.linear("temporal", f"{ours}.down", _each(branch, "down_proj"), tail=3)
            self.add("temporal", f"{ours}.kernel", _each(branch, "conv.weight"), Depthwise())
            self.add("temporal", f"{ours}.bias", _each(branch, "conv.bias"))
            self.linear("temporal", f"{ours}.up", _each(branch, "up_proj"), tail=3)


def _each(keys: str | Sequence[str], suffix: str) -> str | list[str]:
    return f"{keys}.{suffix}" if isinstance(keys, str) else [f"{key}.{suffix}" for key in keys]


def layers(prefix: str, numbers: Iterable[int]) -> list[str]:
    """`("text_encoder.encoder.layer", range(2))` -> the prefixes of layers 0 and 1."""
    return [f"{prefix}.{number}" for number in numbers]
