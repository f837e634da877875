"""Parity of training: gradients, and two steps of the official optimizer, through the zoo's own tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mplug2.convert.keys import to_foreign
from mplug2.convert.optimizer import official_adamw
from mplug2.convert.recorded import (
    QUICK,
    Case,
    Check,
    Result,
    Tensors,
    caption_target,
    clips_of,
    ids_of,
    load,
    rows_of,
    worst_error,
)
from mplug2.network import Network, Parameters, flat
from mplug2.roles import Array, Temporal
from mplug2.tasks import answer, caption

GRADIENT = 1e-3
"""Of a tensor's largest gradient, or of a floor where that is nothing but rounding."""
FLOOR, FLOOR_OF_ZERO = 1e-4, 1e-3
"""Of the case's largest gradient; the second for biases of keys, whose gradient is zero but for rounding."""
STEP = 0.02
"""Of the learning rate: how far a parameter may be from the official one after two steps of AdamW."""
NOISE = 1e-5
"""Adam divides a gradient by its own size, so that below this size a step's direction is rounding; not
compared."""


def _objective(case: Case) -> tuple[Callable[[Parameters], Array], set[str]]:
    """The case's training loss by its task, and the modules that it reaches."""
    network = Network(case.model.configs)
    clips = clips_of(case.given["in.video"])
    if case.said["kind"] == "caption":
        task, names = caption, {"vision", "temporal", "connector", "universal", "decoder"}
        batch = {"clips": clips, "caption": ids_of(case, "caption"), "caption_target": caption_target(case)}
    else:
        task, names = answer, {"vision", "temporal", "connector", "text", "universal", "fusion", "decoder"}
        rows, weights = rows_of(case), jnp.asarray(case.given["in.answer_weights"])
        batch = {
            "clips": clips[rows],
            "question": ids_of(case, "question")[rows],
            "answer": ids_of(case, "answer"),
            "answer_weight": weights
            * len(rows)
            / len(clips),  # the official mean is over videos, not answers
        }

    def loss(params: Parameters) -> Array:
        parts = network.bind(params)
        vision, branches = parts.pop("vision"), parts.pop("temporal")

        def see(clips: Array, temporal: Temporal | None = None, *, key: Array | None = None) -> Array:
            # Official single frames, too, go through the temporal branches; our route sends them past.
            return vision(clips, branches, key=key)

        return task(batch, vision=see, **parts)

    return loss, names & set(case.model.configs)


def compare_training(result: Result, folder: Path, case: Case, atol: float) -> None:
    if not (folder / f"{case.name}.grads.safetensors").is_file():
        return
    loss, reached = _objective(case)
    learned = {module: case.params[module] for module in reached}
    step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    value, gradients = step(learned)
    said = worst_error(value, case.given["out.loss"].reshape(()))
    result.checks.append(Check(case.name, "loss of the task", said, atol))
    expected = load(folder, f"{case.name}.grads")
    result.checks += gradient_checks(case, official(case, gradients), expected)
    if (folder / f"{case.name}.adamw2.safetensors").is_file():
        result.checks += _adamw_checks(folder, case, step, learned, expected, atol)


def official(case: Case, tree: Parameters) -> Tensors:
    arrays = {(module, name): array for module in tree for name, array in flat(tree[module]).items()}
    return to_foreign(case.model.keys, arrays)


def gradient_checks(case: Case, made: Tensors, expected: Tensors) -> list[Check]:
    """A line for every module, with its worst tensor, and one for what the official code gives no
    gradient."""
    largest = max(np.abs(tensor).max() for tensor in expected.values())
    worst: dict[str, tuple[float, str]] = {}
    for key, tensor in expected.items():
        floor = FLOOR_OF_ZERO if key.endswith(".key.bias") else FLOOR
        size = max(np.abs(tensor).max(), floor * largest)
        error = worst_error(made[key], tensor) / size if key in made else np.inf
        module = _module_of(case, key)
        worst[module] = max(worst.get(module, (0.0, key)), (float(error), key))
    checks = [
        Check(case.name, f"gradient {module} ({key})", error, GRADIENT)
        for module, (error, key) in worst.items()
    ]
    dead = {
        key: float(np.abs(made[key]).max()) for key in case.said["params_without_gradient"] if key in made
    }
    if dead:
        key = max(dead, key=lambda key: dead[key])
        checks.append(Check(case.name, f"gradient, officially none ({key})", dead[key], 0.0))
    return checks


def _module_of(case: Case, key: str) -> str:
    places = case.model.keys.places().get(key)
    return places[0][0][0] if places else "of no module"


def _adamw_checks(
    folder: Path, case: Case, step: Callable[..., Any], params: Parameters, gradients: Tensors, atol: float
) -> list[Check]:
    """Two steps on the same batch; parameters relative to the learning rate, where the gradient is more than
    rounding."""
    said, expected = case.said["adamw"], load(folder, f"{case.name}.adamw2")
    optimizer = official_adamw(
        case.model.keys,
        rate=said["lr1"],
        vision_rate=said["lr2"],
        weight_decay=said["weight_decay"],
        betas=tuple(said["betas"]),
        epsilon=said["eps"],
    )
    update = jax.jit(optimizer.update, compiler_options=QUICK)
    state, losses = optimizer.init(params), []
    for _ in range(said["steps"]):
        value, found = step(params)
        losses.append(value)
        updates, state = update(found, state, params)
        params = jax.tree.map(jnp.asarray, optax.apply_updates(params, updates))
    losses.append(step(params)[0])
    error = worst_error(np.stack(losses), np.asarray(said["losses_before_step1_step2_after"]))
    checks, made = [Check(case.name, "AdamW, losses", error, atol)], official(case, params)
    for rate, visual in ((said["lr2"], True), (said["lr1"], False)):
        worst = (0.0, "")
        for key, tensor in expected.items():
            if key.startswith("visual_encoder.") == visual:
                clear = np.abs(gradients[key]) > NOISE
                error = worst_error(made[key][clear], tensor[clear]) / rate if key in made else np.inf
                worst = max(worst, (float(error), key))
        checks.append(
            Check(case.name, f"AdamW, {'vision' if visual else 'others'} ({worst[1]})", worst[0], STEP)
        )
    return checks
