"""Parity: recorded tensors of the official code against what our modules make of the same weights and inputs.

A folder of recorded tensors holds, for each case, `<case>.json` (its "kind", configurations),
`<case>.params.safetensors` (the official state dict), `<case>.io.safetensors` (inputs `in.*`, stages `out.*`)
and perhaps `.grads` and `.adamw2`. Nothing is assumed of sizes. What is not compared is listed, with the
reason.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file

from mplug2.convert import families, stages
from mplug2.convert.families import Model
from mplug2.convert.keys import to_foreign, to_ours
from mplug2.convert.layout import inflate
from mplug2.convert.optimizer import official_adamw
from mplug2.convert.shapes import Settings, read_settings
from mplug2.errors import CheckpointError
from mplug2.losses import word_loss, word_losses
from mplug2.network import Network, Parameters, flat
from mplug2.roles import Array, Temporal
from mplug2.tasks import answer, caption

GRADIENT = 1e-3
"""Of a tensor's largest gradient. A gradient that is nothing but rounding has a floor: FLOOR of the case's
largest."""
FLOOR = 1e-4
STEP = 0.02
"""Of the learning rate: how far a parameter may be from the official one after two steps of AdamW."""
NOISE = 1e-5
"""Adam divides a gradient by its own size, so that below this size a step's direction is rounding; not
compared."""

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""What is compiled here runs once or thrice: to compile takes longer than to run."""

Tensors = dict[str, np.ndarray]
Resize = Callable[[Any, tuple[int, int], tuple[int, int]], Any]


@dataclass(frozen=True)
class Check:
    """One comparison: the worst error of a stage and what is allowed."""

    case: str
    stage: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # NaN is a miss

    @property
    def excess(self) -> float:
        """The error in units of what is allowed; NaN counts as infinite."""
        error = self.error if self.error == self.error else float("inf")
        return error / self.allowed if self.allowed else error


@dataclass
class Result:
    """All comparisons of a folder, and what was left out: (case, what, why)."""

    checks: list[Check] = field(default_factory=list)
    unused: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def misses(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


@dataclass(frozen=True)
class Case:
    """The files of one case, and the model that they describe."""

    name: str
    said: dict[str, Any]
    given: Tensors
    model: Model
    params: Parameters
    prompt_length: int

    @property
    def fusion_start(self) -> int:
        """The number of the first fusion layer that runs."""
        config: Any = self.model.configs["fusion"]
        return self.model.fusion_stack - config.depth


def compare(folder: Path, atol: float, resize: Resize) -> Result:
    """Every case of a folder; `resize` is the vision module's resizing of position tables, which the engine
    does not import. Raises CheckpointError if there is no case, or a file cannot be read."""
    result = Result()
    for path in sorted(folder.glob("*.json")):
        said = _json(path)
        kind = said.get("kind")
        if kind in ("caption", "qa"):
            _compare_case(result, folder, path.stem, said, atol)
        elif kind == "fusion":
            _compare_fusion(result, folder, path.stem, said, atol)
        elif kind is not None:
            result.unused.append(
                (path.stem, "the whole case", f'cases of kind "{kind}" are not compared here')
            )
    _compare_pictures(result, folder, atol, resize)
    if not result.checks:
        raise CheckpointError(
            f"{folder}: holds no case to compare (CASE.json, CASE.params.safetensors, CASE.io.safetensors)"
        )
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return said if isinstance(said, dict) else {}


def _load(folder: Path, name: str) -> Tensors:
    try:
        return load_file(folder / f"{name}.safetensors")
    except Exception as error:  # safetensors raises its own and the system's
        raise CheckpointError(f"{folder / name}.safetensors: cannot be read ({error})") from None


# -----------------------------------------------------------------------------------------------------------
# Captions and answers: the whole model


def _compare_case(result: Result, folder: Path, name: str, said: dict[str, Any], atol: float) -> None:
    case = read_case(folder, name, said)
    made = stages_of(case)
    for stage, gave in made.items():
        result.checks.append(Check(name, stage, _error(gave, case.given[f"out.{stage}"]), atol))
    _compare_training(result, folder, case, atol)
    reasons = {start: "tests of mplug2.generate" for start in ("gen.", "rank.")}
    reasons["soft."] = "distillation that the official training never uses"
    known = {f"out.{stage}" for stage in made}
    for stage in sorted(key for key in case.given if key.startswith("out.") and key not in known):
        start = next((start for start in reasons if stage.startswith(f"out.{start}")), None)
        unused = (name, f"out.{start}*", reasons[start]) if start else (name, stage, "no stage of this name")
        if unused not in result.unused:
            result.unused.append(unused)


def read_case(folder: Path, name: str, said: dict[str, Any]) -> Case:
    """A case of kind "caption" or "qa", `said` its JSON."""
    params = _load(folder, f"{name}.params")
    shapes = {key: tensor.shape for key, tensor in params.items()}
    model = families.mplug2(shapes, read_settings(folder / f"{name}.json"))
    ours = jax.tree.map(jnp.asarray, to_ours(model.keys, params))
    return Case(name, said, _load(folder, f"{name}.io"), model, ours, _prompt_length(folder, said))


def _prompt_length(folder: Path, said: Mapping[str, Any]) -> int:
    """Ids of the caption's prompt that are never trained: one a word, as every word of a prompt is a word
    piece."""
    prompt = said.get("config", {}).get("prompt", "")
    aux = folder / "aux.json"
    known = _json(aux).get("prompt_length", {}) if aux.is_file() else {}
    return known.get(prompt, len(prompt.split()))


def _clips(video: np.ndarray) -> Array:
    """Official `B C T H W` -> `B T H W C`."""
    return jnp.asarray(video).transpose(0, 2, 3, 4, 1)


def _ids(case: Case, name: str) -> Array:
    ids, mask = case.given[f"in.{name}_ids"], case.given[f"in.{name}_mask"]
    if not np.array_equal(mask, ids != 0):
        raise CheckpointError(f"case {case.name}: in.{name}_mask hides other ids than padding (0)")
    return jnp.asarray(ids, jnp.int32)


def stages_of(case: Case) -> dict[str, np.ndarray]:
    """Every recorded stage, from the case's own inputs."""
    forward = _caption_stages if case.said["kind"] == "caption" else _answer_stages

    def run(params: Parameters, video: Array) -> dict[str, Array]:
        return forward(case, video, stages.bound(case.model.configs, params))

    made = {}
    for prefix, name in (("", "in.video"), ("image1.", "in.image1.video")):
        if name in case.given:
            forward_jitted = jax.jit(run, compiler_options=QUICK)
            gave = forward_jitted(case.params, _clips(case.given[name]))
            made |= {f"{prefix}{stage}": one for stage, one in gave.items()}
    return {stage: np.asarray(gave) for stage, gave in made.items() if f"out.{stage}" in case.given}


def _caption_stages(case: Case, clips: Array, parts: stages.Modules) -> dict[str, Array]:
    made, ids = stages.see(clips, parts), _ids(case, "caption")
    seen = made["visn_emb_norm(image_embeds)"]
    made |= stages.say(ids, seen, None, parts["decoder"])
    loss = word_loss(made["text_decoder.logits"][:, :-1], _caption_target(case)[:, 1:])
    made |= {"decoder_memory": seen, "decoder_memory_mask": stages.all_ones(seen)}
    return made | {"text_decoder.loss(as returned)": loss, "loss": loss}


def _caption_target(case: Case) -> Array:
    ids = _ids(case, "caption")
    return ids.at[:, : case.prompt_length].set(0)


def _answer_stages(case: Case, clips: Array, parts: stages.Modules) -> dict[str, Array]:
    made, question, ids = stages.see(clips, parts), _ids(case, "question"), _ids(case, "answer")
    made |= stages.read(question, parts)
    last = parts["text"].config.depth + parts["universal"].config.depth - 1
    seen, tokens = made["visn_emb_norm(image_embeds)"], made[f"text_encoder.layer{last}"]
    made |= stages.fuse(seen, tokens, question, parts["fusion"], case.fusion_start)
    rows = _rows(case)
    memory, mask = made["decoder_memory"][rows], made["decoder_memory_mask"][rows]
    made |= stages.say(ids, memory, mask, parts["decoder"])
    losses = word_losses(made["text_decoder.logits"][:, :-1], ids[:, 1:])[0].sum(-1)
    weighted = (losses * case.given["in.answer_weights"]).sum() / len(clips)
    return made | {"text_decoder.loss(as returned)": losses, "loss": weighted}


def _rows(case: Case) -> np.ndarray:
    """The question of every answer."""
    return np.repeat(np.arange(len(case.given["in.question_ids"])), case.given["in.answers_per_question"])


# -----------------------------------------------------------------------------------------------------------
# Gradients and two steps of the official optimizer, through the zoo's own tasks


def _objective(case: Case) -> tuple[Callable[[Parameters], Array], set[str]]:
    """The case's training loss by its task, and the modules that it reaches."""
    network = Network(case.model.configs)
    clips = _clips(case.given["in.video"])
    if case.said["kind"] == "caption":
        task, names = caption, {"vision", "temporal", "connector", "universal", "decoder"}
        batch = {"clips": clips, "caption": _ids(case, "caption"), "caption_target": _caption_target(case)}
    else:
        task, names = answer, {"vision", "temporal", "connector", "text", "universal", "fusion", "decoder"}
        rows, weights = _rows(case), jnp.asarray(case.given["in.answer_weights"])
        batch = {
            "clips": clips[rows],
            "question": _ids(case, "question")[rows],
            "answer": _ids(case, "answer"),
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


def _compare_training(result: Result, folder: Path, case: Case, atol: float) -> None:
    if not (folder / f"{case.name}.grads.safetensors").is_file():
        return
    loss, reached = _objective(case)
    learned = {module: case.params[module] for module in reached}
    step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    value, gradients = step(learned)
    said = _error(value, case.given["out.loss"].reshape(()))
    result.checks.append(Check(case.name, "loss of the task", said, atol))
    expected = _load(folder, f"{case.name}.grads")
    result.checks += _gradient_checks(case, _official(case, gradients), expected)
    if (folder / f"{case.name}.adamw2.safetensors").is_file():
        result.checks += _adamw_checks(folder, case, step, learned, expected, atol)


def _official(case: Case, tree: Parameters) -> Tensors:
    arrays = {(module, name): array for module in tree for name, array in flat(tree[module]).items()}
    return to_foreign(case.model.keys, arrays)


def _gradient_checks(case: Case, made: Tensors, expected: Tensors) -> list[Check]:
    """A line for every module, with its worst tensor, and one for what the official code gives no
    gradient."""
    floor = FLOOR * max(np.abs(tensor).max() for tensor in expected.values())
    worst: dict[str, tuple[float, str]] = {}
    for key, tensor in expected.items():
        size = max(np.abs(tensor).max(), floor)
        error = _error(made[key], tensor) / size if key in made else np.inf
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
    said, expected = case.said["adamw"], _load(folder, f"{case.name}.adamw2")
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
    error = _error(np.stack(losses), np.asarray(said["losses_before_step1_step2_after"]))
    checks, made = [Check(case.name, "AdamW, losses", error, atol)], _official(case, params)
    for rate, visual in ((said["lr2"], True), (said["lr1"], False)):
        worst = (0.0, "")
        for key, tensor in expected.items():
            if key.startswith("visual_encoder.") == visual:
                clear = np.abs(gradients[key]) > NOISE
                error = _error(made[key][clear], tensor[clear]) / rate if key in made else np.inf
                worst = max(worst, (float(error), key))
        checks.append(
            Check(case.name, f"AdamW, {'vision' if visual else 'others'} ({worst[1]})", worst[0], STEP)
        )
    return checks


# -----------------------------------------------------------------------------------------------------------
# Parts by themselves


def _compare_fusion(result: Result, folder: Path, name: str, said: dict[str, Any], atol: float) -> None:
    """A fusion encoder alone, with masks of both streams and gradients of its inputs."""
    params, given = _load(folder, f"{name}.params"), _load(folder, f"{name}.io")
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
            result.checks.append(Check(name, stage, _error(gave, given[f"out.{stage}"]), allowed))
    for stage, gave in zip(("grad_image_embeds", "grad_text_embeds"), to_inputs, strict=True):
        expected = given[f"out.{stage}"]
        result.checks.append(Check(name, stage, _error(gave, expected) / np.abs(expected).max(), GRADIENT))
    case = Case(name, said, given, model, ours, prompt_length=0)
    result.checks += _gradient_checks(case, _official(case, gradients), _load(folder, f"{name}.grads"))


def _compare_pictures(result: Result, folder: Path, atol: float, resize: Resize) -> None:
    """The image towers, position tables and patch kernels of a folder's auxiliary files."""
    if (folder / "image_clip.safetensors").is_file():
        tensors = _load(folder, "image_clip")
        params = {
            key.removeprefix("param."): tensor for key, tensor in tensors.items() if key.startswith("param.")
        }
        said = (
            _json(folder / "aux.json").get("image_clip_config") if (folder / "aux.json").is_file() else None
        )
        settings = Settings(heads=said["heads"]) if said else None
        model = families.clip({key: tensor.shape for key, tensor in params.items()}, settings)
        ours = jax.tree.map(jnp.asarray, to_ours(model.keys, params))

        def see(params: Parameters, clips: Array) -> stages.Stages:
            return stages.see_picture(clips, stages.bound(model.configs, params)["vision"])

        made = jax.jit(see, compiler_options=QUICK)(ours, _clips(tensors["in.image"][:, :, None]))
        depth = len(model.keys.sources["vision", "blocks.layers.mlp.up.bias"].pieces)
        last = made[f"vision.block{depth - 1}"].transpose(1, 0, 2)
        for stage, gave in (
            ("skip_last_layer_true", made["vision.ln_post(out)"]),
            ("skip_last_layer_false", last @ params["proj"]),  # a quirk: projected without the last norm
        ):
            result.checks.append(Check("image_clip", stage, _error(gave, tensors[f"out.{stage}"]), atol))
    if (folder / "image_vit.safetensors").is_file():
        why = "a timm-like tower (epsilon 1e-6, exact GELU, no norm before blocks); the zoo has none"
        result.unused.append(("image_vit", "the whole case", why))
    if (folder / "aux_tensors.safetensors").is_file():
        _compare_tables(result, _load(folder, "aux_tensors"), atol, resize)
    if (folder / "aux.json").is_file():
        result.unused.append(("aux", "aux.json", "texts, frame indices and rates: tests of those parts"))


def _compare_tables(result: Result, tensors: Tensors, atol: float, resize: Resize) -> None:
    for key in tensors:
        if match := re.fullmatch(r"resize\.(\d+)to(\d+)\.in", key):
            old, new = (int(side) for side in match.groups())
            gave = resize(tensors[key], (old, old), (new, new))
            result.checks.append(
                Check("aux_tensors", key[:-3], _error(gave, tensors[key[:-2] + "out"]), atol)
            )
        elif match := re.fullmatch(r"inflate\.center_t(\d+)", key):
            gave = inflate(tensors["inflate.in"], int(match[1]))
            result.checks.append(Check("aux_tensors", key, _error(gave, tensors[key]), atol))
    pixels = [key for key in tensors if key.startswith("tf.")]
    if pixels:
        result.unused.append(("aux_tensors", f"tf.* ({len(pixels)} tensors)", "pixels: tests of mplug2.data"))


def _error(made: Any, expected: np.ndarray) -> float:
    made = np.asarray(made, np.float64)
    if made.shape != expected.shape and made.size != expected.size:
        return float("inf")
    return float(np.abs(made.reshape(expected.shape) - expected).max()) if expected.size else 0.0
