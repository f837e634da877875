"""Parity of parts by themselves: a fusion encoder, picture towers, position tables, patch kernels."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2.convert import families, stages
from mplug2.convert.keys import to_ours
from mplug2.convert.layout import inflate
from mplug2.convert.parity_data import compare_pixels, compare_texts
from mplug2.convert.parity_training import GRADIENT, gradient_checks, official
from mplug2.convert.recorded import (
    QUICK,
    Case,
    Check,
    Result,
    Tensors,
    clips_of,
    load,
    read_json,
    worst_error,
)
from mplug2.convert.shapes import Settings, read_settings
from mplug2.errors import CheckpointError
from mplug2.network import Parameters
from mplug2.roles import Array

Resize = Callable[[Any, tuple[int, int], tuple[int, int]], Any]


def compare_fusion(result: Result, folder: Path, name: str, said: dict[str, Any], atol: float) -> None:
    """A fusion encoder alone, with masks of both streams and gradients of its inputs."""
    params, given = load(folder, f"{name}.params"), load(folder, f"{name}.io")
    shapes = {key: tensor.shape for key, tensor in params.items()}
    model = families.fusion(shapes, read_settings(folder / f"{name}.json"))
    start = model.fusion_stack - model.configs["fusion"].depth
    ours = jax.tree.map(jnp.asarray, to_ours(model.keys, params))
    masks = (jnp.asarray(given["in.text_mask"]) != 0, jnp.asarray(given["in.image_mask"]) != 0)

    def loss(params: Parameters, image: Array, text: Array) -> tuple[Array, stages.Stages]:
        fusion = stages.bound(model.configs, params)["fusion"]
        with stages.watching(fusion) as calls:
            image, text = fusion(image, text, *masks)
        made = {f"layer{start + i}": gave for i, gave in enumerate(calls.of("PostNormLayer"))}
        total = (image * given["in.weight_image"]).sum() + (text * given["in.weight_text"]).sum()
        return total, made | {"image": image, "text": text, "loss": total}

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)
    (gradients, *to_inputs), made = grad(ours, given["in.image_embeds"], given["in.text_embeds"])
    for stage, gave in made.items():
        if f"out.{stage}" in given:
            # A loss is a sum over thousands of products: its rounding grows with its size.
            allowed = atol * max(1.0, abs(float(given["out.loss"][0]))) if stage == "loss" else atol
            result.checks.append(Check(name, stage, worst_error(gave, given[f"out.{stage}"]), allowed))
    for stage, gave in zip(("grad_image_embeds", "grad_text_embeds"), to_inputs, strict=True):
        expected = given[f"out.{stage}"]
        result.checks.append(
            Check(name, stage, worst_error(gave, expected) / np.abs(expected).max(), GRADIENT)
        )
    case = Case(name, said, given, model, ours, prompt_length=0)
    result.checks += gradient_checks(case, official(case, gradients), load(folder, f"{name}.grads"))


def compare_auxiliary(result: Result, folder: Path, atol: float, resize: Resize) -> None:
    """A folder's auxiliary files: picture towers, position tables, patch kernels, and `parity_data`'s. Raises
    CheckpointError where they do not hold what the official recordings do."""
    aux = folder / "aux.json"
    try:
        _compare_all(result, folder, read_json(aux) if aux.is_file() else {}, atol, resize)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its auxiliary files are not as recorded ({error!r})") from None


def _compare_all(result: Result, folder: Path, said: dict[str, Any], atol: float, resize: Resize) -> None:
    if (folder / "image_clip.safetensors").is_file():
        _compare_clip(result, load(folder, "image_clip"), _heads(said, "image_clip_config", "heads"), atol)
    if (folder / "image_vit.safetensors").is_file():
        _compare_vit(result, load(folder, "image_vit"), _heads(said, "image_vit_config", "num_heads"), atol)
    if (folder / "aux_tensors.safetensors").is_file():
        tensors = load(folder, "aux_tensors")
        _compare_tables(result, tensors, atol, resize)
        compare_pixels(result, tensors, atol)
    compare_texts(result, folder, said)


def _heads(said: dict[str, Any], tower: str, name: str) -> Settings | None:
    return Settings(heads=said[tower][name]) if tower in said else None


def _compare_clip(result: Result, tensors: Tensors, settings: Settings | None, atol: float) -> None:
    model, made = _looked(families.clip, tensors, settings)
    depth = len(model.keys.sources["vision", "blocks.layers.mlp.up.bias"].pieces)
    last = made[f"vision.block{depth - 1}"].transpose(1, 0, 2)
    for stage, gave in (
        ("skip_last_layer_true", made["vision.ln_post(out)"]),
        ("skip_last_layer_false", last @ tensors["param.proj"]),  # a quirk: projected without the last norm
    ):
        result.checks.append(Check("image_clip", stage, worst_error(gave, tensors[f"out.{stage}"]), atol))


def _compare_vit(result: Result, tensors: Tensors, settings: Settings | None, atol: float) -> None:
    _, made = _looked(families.vit, tensors, settings)
    error = worst_error(made["vision.ln_post(out)"], tensors["out.tokens"])
    result.checks.append(Check("image_vit", "tokens", error, atol))


def _looked(
    family: families.Family, tensors: Tensors, settings: Settings | None
) -> tuple[families.Model, stages.Stages]:
    """A picture tower understood, and what it makes of its recorded picture `in.image`, `B C H W`."""
    params = {
        key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")
    }
    model = family({key: tensor.shape for key, tensor in params.items()}, settings)
    ours = jax.tree.map(jnp.asarray, to_ours(model.keys, params))

    def see(params: Parameters, clips: Array) -> stages.Stages:
        return stages.see_picture(clips, stages.bound(model.configs, params)["vision"])

    return model, jax.jit(see, compiler_options=QUICK)(ours, clips_of(tensors["in.image"][:, :, None]))


def _compare_tables(result: Result, tensors: Tensors, atol: float, resize: Resize) -> None:
    for key in tensors:
        if match := re.fullmatch(r"resize\.(\d+)to(\d+)\.in", key):
            old, new = (int(side) for side in match.groups())
            gave = resize(tensors[key], (old, old), (new, new))
            result.checks.append(
                Check("aux_tensors", key[:-3], worst_error(gave, tensors[key[:-2] + "out"]), atol)
            )
        elif match := re.fullmatch(r"inflate\.center_t(\d+)", key):
            gave = inflate(tensors["inflate.in"], int(match[1]))
            result.checks.append(Check("aux_tensors", key, worst_error(gave, tensors[key]), atol))
