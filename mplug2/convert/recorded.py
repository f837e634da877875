"""Recorded tensors of the official code: the files of a case, and what comparisons with them say.

A case is `<case>.json` (its "kind", configurations), `<case>.params.safetensors` (the official state dict),
`<case>.io.safetensors` (inputs `in.*`, stages `out.*`) and perhaps `.grads` and `.adamw2`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from mplug2.convert import families
from mplug2.convert.families import Model
from mplug2.convert.keys import to_ours
from mplug2.convert.shapes import read_settings
from mplug2.errors import CheckpointError
from mplug2.network import Parameters
from mplug2.roles import Array

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""What is compiled here runs once or thrice: to compile takes longer than to run."""

Tensors = dict[str, np.ndarray]


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


def read_json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
    return said if isinstance(said, dict) else {}


def load(folder: Path, name: str) -> Tensors:
    try:
        return load_file(folder / f"{name}.safetensors")
    except Exception as error:  # safetensors raises its own and the system's
        raise CheckpointError(f"{folder / name}.safetensors: cannot be read ({error})") from None


def read_case(folder: Path, name: str, said: dict[str, Any]) -> Case:
    """A case of kind "caption" or "qa", `said` its JSON."""
    params = load(folder, f"{name}.params")
    shapes = {key: tensor.shape for key, tensor in params.items()}
    model = families.mplug2(shapes, read_settings(folder / f"{name}.json"))
    ours = jax.tree.map(jnp.asarray, to_ours(model.keys, params))
    return Case(name, said, load(folder, f"{name}.io"), model, ours, _prompt_length(folder, said))


def _prompt_length(folder: Path, said: Mapping[str, Any]) -> int:
    """Ids of the caption's prompt that are never trained: one a word, as every word of a prompt is a word
    piece."""
    prompt = said.get("config", {}).get("prompt", "")
    aux = folder / "aux.json"
    known = read_json(aux).get("prompt_length", {}) if aux.is_file() else {}
    return known.get(prompt, len(prompt.split()))


def clips_of(video: np.ndarray) -> Array:
    """Official `B C T H W` -> `B T H W C`."""
    return jnp.asarray(video).transpose(0, 2, 3, 4, 1)


def ids_of(case: Case, name: str) -> Array:
    ids, mask = case.given[f"in.{name}_ids"], case.given[f"in.{name}_mask"]
    if not np.array_equal(mask, ids != 0):
        raise CheckpointError(f"case {case.name}: in.{name}_mask hides other ids than padding (0)")
    return jnp.asarray(ids, jnp.int32)


def rows_of(case: Case) -> np.ndarray:
    """The question of every answer."""
    return np.repeat(np.arange(len(case.given["in.question_ids"])), case.given["in.answers_per_question"])


def caption_target(case: Case) -> Array:
    ids = ids_of(case, "caption")
    return ids.at[:, : case.prompt_length].set(0)


def worst_error(made: Any, expected: np.ndarray) -> float:
    made = np.asarray(made, np.float64)
    if made.shape != expected.shape and made.size != expected.size:
        return float("inf")
    return float(np.abs(made.reshape(expected.shape) - expected).max()) if expected.size else 0.0
