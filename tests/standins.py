"""Stand-ins for the roles that tasks compose: a product each, so that tasks are traced, compiled and compared
in float64 at once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mplug2.recipe import Objective, Recipe
from mplug2.roles import Array, Execution

WIDTH, WORDS = 6, 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A module of one kernel, which plays every role."""

    inputs: int = WIDTH
    outputs: int = WIDTH

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "PartModule":
        return PartModule(self, rngs=rngs)


class PartModule(nnx.Module):
    def __init__(self, config: Part, *, rngs: nnx.Rngs):
        shape = (config.inputs, config.outputs)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) / 2, axes=("embed", "mlp"))
        self.config = config

    @property
    def words(self) -> Array:
        return self.kernel[...]

    def temperature(self) -> Array:
        return 0.5 + jnp.square(self.kernel[...][0, 0])

    def similarity(self, vision: Array, text: Array) -> Array:
        return self.text(vision)[:, 0] @ self.text(text)[:, 0].T / self.temperature()

    def text(self, tokens: Array, mask: Array | None = None, *, key: Array | None = None) -> Array:
        return jnp.tanh(tokens @ self.kernel[...])

    vision = text

    def predict(self, tokens: Array) -> Array:
        return tokens @ self.kernel[...].T

    def tokens(
        self, ids: Array, memory: Array, mask: Array | None = None, *, key: Array | None = None
    ) -> Array:
        return self.kernel[...][ids] + memory.mean(1, keepdims=True)


class Seeing(PartModule):
    def __call__(self, clips: Array, temporal: Any = None, *, key: Array | None = None) -> Array:
        exact = jnp.rint(64 * clips)  # normalised in float32, a little differently in every program
        return jnp.tanh(exact.reshape(len(clips), 2, -1) / 64 @ self.kernel[...])


class Reading(PartModule):
    def __call__(self, ids: Array, *, key: Array | None = None) -> Array:
        return self.kernel[...][ids]


class Looking(PartModule):
    def __call__(self, vision: Array, text: Array, mask: Array, *, key: Array | None = None) -> tuple:
        return vision, jnp.tanh(text + vision[:, 1:] @ self.kernel[...])


class Judging(PartModule):
    def __call__(self, tokens: Array, *, key: Array | None = None) -> Array:
        return tokens[:, 0] @ self.kernel[...]


class Unmasking(PartModule):
    def __call__(self, tokens: Array, table: Array) -> Array:
        return tokens @ self.kernel[...] @ table.T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Playing(Part):
    """A part that is called as `role` is."""

    role: type[PartModule] = PartModule

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> PartModule:
        return self.role(self, rngs=rngs)


MODULES = {
    "vision": Playing(role=Seeing),
    "text": Playing(role=Reading, inputs=WORDS),
    "universal": Part(),
    "fusion": Playing(role=Looking),
    "decoder": Part(inputs=WORDS),
    "contrastive": Part(),
    "matching": Playing(role=Judging, outputs=2),
    "unmasker": Playing(role=Unmasking),
}


def recipe(batch: int = 8, tasks: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """Objectives of the given tasks on one feed of numbers."""
    objectives = {
        name: Objective(task=task, data="numbers", batch=batch, weight=1 + place / 2)
        for place, (name, task) in enumerate((tasks or {}).items())
    }
    fields = {"name": "standins", "modules": MODULES, "objectives": objectives, "dropout": False, "steps": 3}
    return Recipe(**fields | changes)
