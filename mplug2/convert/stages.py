"""What happens inside the modules, stage by stage, under the names that the official code's recorders gave
them.

The modules themselves run, with unrolled layers, and every call of a layer is watched: nothing of their
mathematics is repeated here. Layouts are turned to the official ones. Inside `jax.jit`, return the stages.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mplug2.network import Parameters
from mplug2.roles import Array, Config, Execution
from mplug2.routes import fused_memory

Modules = Mapping[str, Any]
Stages = dict[str, Array]


class Calls(list[tuple[Any, Array]]):
    """(layer, what it gave), in order of their ends."""

    def of(self, kind: str) -> list[Array]:
        """What layers of the class of that name gave."""
        return [gave for layer, gave in self if type(layer).__name__ == kind]

    def by(self, layer: Any) -> Array:
        return next(gave for called, gave in self if called is layer)


def bound(configs: Mapping[str, Config], params: Parameters) -> dict[str, Any]:
    """The bare modules around `params`, layers unrolled. Not `Network.bind`, whose modules answer a repeated
    call from memory: here every call is to be seen."""

    def one(config: Config, state: Any) -> Any:
        shapes = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), execution=Execution(scan=False)))
        return nnx.merge(nnx.split(shapes)[0], state)

    return {name: one(config, params[name]) for name, config in configs.items()}


@contextlib.contextmanager
def watching(*modules: Any) -> Iterator[Calls]:
    """Notes every call of every layer inside `modules` while the block runs."""
    kinds = {
        type(node) for module in modules for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)
    }
    calls, plain = Calls(), {kind: kind.__dict__["__call__"] for kind in kinds if "__call__" in kind.__dict__}

    def noted(call: Any) -> Any:
        def and_note(layer: Any, *args: Any, **named: Any) -> Any:
            gave = call(layer, *args, **named)
            calls.append((layer, gave))
            return gave

        return and_note

    try:
        for kind, call in plain.items():
            kind.__call__ = noted(call)
        yield calls
    finally:
        for kind, call in plain.items():
            kind.__call__ = call


def see(clips: Array, parts: Modules) -> Stages:
    """Normalised clips `B T H W C` through vision (its temporal branches too, however few frames), connector,
    universal."""
    vision, temporal = parts["vision"], parts["temporal"]
    with watching(vision, temporal) as calls:
        seen = vision(clips, temporal)
    stages = _vision_stages(calls, vision) | {"vision.ln_post(out)": seen}
    for block, pair in enumerate(
        zip(calls.of("LocalTemporal")[::2], calls.of("LocalTemporal")[1::2], strict=True)
    ):
        rows = stages["vision.conv1"].shape[-2]
        for name, gave in zip(("lmhra1", "lmhra2"), pair, strict=True):
            stages[f"vision.block{block}.{name}"] = rearrange(gave, "b t (h w) d -> b d t h w", h=rows)
    if connector := parts.get("connector"):
        with watching(connector) as calls:
            seen = connector(seen)
        stages |= {"visn_fc": calls.by(connector.linear), "visn_layer_norm": seen}
    with watching(parts["universal"]) as calls:
        seen = parts["universal"].vision(seen)
    stages |= _numbered("uni_v_module.layer", calls.of("PostNormLayer"), parts["text"].config.depth)
    return stages | {"visn_emb_norm(image_embeds)": seen}


def _vision_stages(calls: Calls, vision: Any) -> Stages:
    stages = {
        "vision.conv1": rearrange(calls.by(vision.stem), "b t h w d -> b d t h w"),
        "vision.ln_pre": rearrange(calls.by(vision.input_norm), "b t n d -> (b t) n d"),
    }
    inside = zip(calls.of("Block"), calls.of("Attention"), calls.of("MLP"), strict=True)
    for block, (gave, attended, mlp) in enumerate(inside):
        stages[f"vision.block{block}"] = rearrange(gave, "b t n d -> n (b t) d")
        stages[f"vision.block{block}.attn"] = rearrange(attended, "b t n d -> n (b t) d")
        stages[f"vision.block{block}.mlp"] = rearrange(mlp, "b t n d -> n (b t) d")
    return stages


def see_picture(picture: Array, vision: Any) -> Stages:
    """A normalised clip of one frame through the vision module alone."""
    with watching(vision) as calls:
        seen = vision(picture)
    return _vision_stages(calls, vision) | {"vision.ln_post(out)": seen}


def read(ids: Array, parts: Modules) -> Stages:
    """Ids `B S` through the text encoder, private layers and universal ones."""
    text, universal = parts["text"], parts["universal"]
    with watching(text, universal) as calls:
        tokens = text(ids)
        universal.text(tokens, ids != 0)
    numbered = _numbered("text_encoder.layer", calls.of("PostNormLayer"), 0)
    return {"text_encoder.embeddings": calls.by(text.embedding)} | numbered


def fuse(seen: Array, tokens: Array, ids: Array, fusion: Any, first: int) -> Stages:
    """Vision tokens and a text's tokens through fusion, whose layers are counted from `first`."""
    with watching(fusion) as calls:
        memory, mask = fused_memory(seen, tokens, ids, fusion=fusion)
    stages = _numbered("fusion.layer", calls.of("PostNormLayer"), first)
    stages |= {"fusion.out_image": memory[:, : seen.shape[1]], "fusion.out_text": memory[:, seen.shape[1] :]}
    return stages | {"decoder_memory": memory, "decoder_memory_mask": mask}


def say(ids: Array, memory: Array, mask: Array | None, decoder: Any) -> Stages:
    """Ids `B S` through the decoder."""
    with watching(decoder) as calls:
        logits = decoder(ids, memory, mask)
    stages = {"text_decoder.embeddings": calls.by(decoder.embedding)}
    stages |= _numbered("text_decoder.layer", calls.of("PostNormLayer"), 0)
    return stages | {"text_decoder.logits": logits}


def _numbered(name: str, gave: list[Array], first: int) -> Stages:
    return {f"{name}{first + index}": one for index, one in enumerate(gave)}


def all_ones(seen: Array) -> Array:
    """The mask of a memory that is vision tokens alone."""
    return jnp.ones(seen.shape[:2], jnp.int32)
