"""Parity: every case of a folder of recorded tensors (`recorded`) against what our modules make of the same
weights and inputs.

Nothing is assumed of sizes. What is not compared is listed, with the reason.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2.convert import stages
from mplug2.convert.parity_data import compare_decoded
from mplug2.convert.parity_generation import compare_generation
from mplug2.convert.parity_parts import Resize, compare_auxiliary, compare_fusion
from mplug2.convert.parity_training import compare_training
from mplug2.convert.recorded import (
    QUICK,
    Case,
    Check,
    Result,
    caption_target,
    clips_of,
    ids_of,
    read_case,
    read_json,
    rows_of,
    worst_error,
)
from mplug2.errors import CheckpointError
from mplug2.losses import word_loss, word_losses
from mplug2.network import Parameters
from mplug2.roles import Array

SOFT = re.compile(r"out\.soft\.loss_alpha([0-9.]+)_official_dim1")
OTHER_KINDS = {
    "pretrain": "momentum encoders, a queue of their features and losses against their words: the zoo trains "
    "without a teacher (tasks.contrast, match, unmask, complete), so it has nothing to compare",
    "retrieval": "a contrastive loss over momentum features and a queue, and hard negatives given from "
    "outside: tasks.contrast and match are of the batch alone",
    "grounding": "boxes as words, weighted by their distance: no task of the zoo gives boxes",
}
"""Kinds of recordings that are no case of mPLUG-2's own code, and why they are not compared."""


def compare(folder: Path, atol: float, resize: Resize) -> Result:
    """Every case of a folder; `resize` is the vision module's resizing of position tables, which the engine
    does not import. Raises CheckpointError if there is no case, or a file cannot be read."""
    result = Result()
    for path in sorted(folder.glob("*.json")):
        said = read_json(path)
        kind = said.get("kind")
        if kind in ("caption", "qa"):
            _compare_case(result, folder, path.stem, said, atol)
        elif kind == "fusion":
            compare_fusion(result, folder, path.stem, said, atol)
        elif kind is not None:
            why = OTHER_KINDS.get(kind, f'cases of kind "{kind}" are not known')
            result.unused.append((path.stem, "the whole case", why))
    compare_auxiliary(result, folder, atol, resize)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not result.checks:
        raise CheckpointError(
            f"{folder}: holds no case to compare (CASE.json, CASE.params.safetensors, CASE.io.safetensors)"
        )
    return result


def _compare_case(result: Result, folder: Path, name: str, said: dict[str, Any], atol: float) -> None:
    case = read_case(folder, name, said)
    made = stages_of(case)
    for stage in [stage for stage in made if f"out.{stage}" in case.given]:
        result.checks.append(Check(name, stage, worst_error(made[stage], case.given[f"out.{stage}"]), atol))
    result.checks += compare_generation(case, made["decoder_memory"], made["decoder_memory_mask"], atol)
    if (with_teacher := said.get("loss_with_distill_true")) is not None:
        error = worst_error(made["loss"], np.asarray(with_teacher))
        result.checks.append(Check(name, "loss, distillation asked for", error, atol))
    result.checks += _soft_checks(case, made["text_decoder.logits"], atol)
    compare_decoded(result, folder, name, said, case.given)
    compare_training(result, folder, case, atol)
    compared = {f"out.{check.stage}" for check in result.checks if check.case == name}
    for stage in sorted(key for key in case.given if key.startswith("out.") and key not in compared):
        result.unused.append((name, stage, "no stage of this name"))


def _soft_checks(case: Case, logits: np.ndarray, atol: float) -> list[Check]:
    """The official loss with a teacher's words weighed by alpha, of our logits.

    The zoo has no such loss: official training never weighs the teacher, and its formula is a defect, a
    log-softmax over places (axis 1) against a softmax over words. Written out here, it shows that the logits
    are the ones that the recorded loss came from, and that the defect is understood.
    """
    checks = []
    for match in filter(None, map(SOFT.fullmatch, case.given)):
        alpha, targets = float(match[1]), ids_of(case, "answer")[:, 1:]
        hard, counted = word_losses(jnp.asarray(logits)[:, :-1], targets)
        teacher = jax.nn.softmax(case.given["in.soft.teacher_logits"], axis=-1)
        soft = -(jax.nn.log_softmax(logits[:, :-1], axis=1) * teacher).sum(-1) * counted
        mixed = ((1 - alpha) * hard + alpha * soft).sum(-1)
        error = worst_error(mixed, case.given[match[0]])
        checks.append(Check(case.name, match[0].removeprefix("out."), error, atol))
    return checks


def stages_of(case: Case) -> dict[str, np.ndarray]:
    """Every stage, from the case's own inputs."""
    forward = _caption_stages if case.said["kind"] == "caption" else _answer_stages

    def run(params: Parameters, video: Array) -> dict[str, Array]:
        return forward(case, video, stages.bound(case.model.configs, params))

    made = {}
    for prefix, name in (("", "in.video"), ("image1.", "in.image1.video")):
        if name in case.given:
            forward_jitted = jax.jit(run, compiler_options=QUICK)
            gave = forward_jitted(case.params, clips_of(case.given[name]))
            made |= {f"{prefix}{stage}": one for stage, one in gave.items()}
    return {stage: np.asarray(gave) for stage, gave in made.items()}


def _caption_stages(case: Case, clips: Array, parts: stages.Modules) -> dict[str, Array]:
    made, ids = stages.see(clips, parts), ids_of(case, "caption")
    seen = made["visn_emb_norm(image_embeds)"]
    made |= stages.say(ids, seen, None, parts["decoder"])
    loss = word_loss(made["text_decoder.logits"][:, :-1], caption_target(case)[:, 1:])
    made |= {"decoder_memory": seen, "decoder_memory_mask": stages.all_ones(seen)}
    return made | {"text_decoder.loss(as returned)": loss, "loss": loss}


def _answer_stages(case: Case, clips: Array, parts: stages.Modules) -> dict[str, Array]:
    made, question, ids = stages.see(clips, parts), ids_of(case, "question"), ids_of(case, "answer")
    made |= stages.read(question, parts)
    last = parts["text"].config.depth + parts["universal"].config.depth - 1
    seen, tokens = made["visn_emb_norm(image_embeds)"], made[f"text_encoder.layer{last}"]
    made |= stages.fuse(seen, tokens, question, parts["fusion"], case.fusion_start)
    rows = rows_of(case)
    memory, mask = made["decoder_memory"][rows], made["decoder_memory_mask"][rows]
    made |= stages.say(ids, memory, mask, parts["decoder"])
    losses = word_losses(made["text_decoder.logits"][:, :-1], ids[:, 1:])[0].sum(-1)
    weighted = (losses * case.given["in.answer_weights"]).sum() / len(clips)
    return made | {"text_decoder.loss(as returned)": losses, "loss": weighted}
