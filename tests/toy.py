"""A toy to train: two small modules and a stream of numbers, so that a step compiles in a second. Inside
`exact.in_float64()` all of it is float64."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mplug2 import processes
from mplug2.logbook import read_metrics
from mplug2.losses import cross_entropy
from mplug2.network import Network
from mplug2.recipe import AdamW, Objective, Recipe
from mplug2.roles import Array, Execution
from mplug2.step import Trainer
from mplug2.train import train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    inputs: int
    outputs: int

    def build(self, *, rngs: nnx.Rngs, execution: Execution = Execution()) -> "LayerModule":
        return LayerModule(self, rngs=rngs)


class LayerModule(nnx.Module):
    def __init__(self, config: Layer, *, rngs: nnx.Rngs):
        shape = (config.inputs, config.outputs)
        self.kernel = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape), axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros(shape[1:]), axes=("mlp",))

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        x = x @ self.kernel[...] + self.bias[...]
        return x if key is None else jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x / 0.8, 0.0)


def classify(
    batch: Mapping[str, Array], key: Array | None = None, *, vision: LayerModule, head: LayerModule
) -> Array:
    hidden = jax.nn.gelu(vision(batch["clips"].reshape(len(batch["label"]), -1), key))
    return (cross_entropy(head(hidden), batch["label"]) * batch["scale"]).mean()


def count(batch: Mapping[str, Array], key: Array | None = None, *, vision: LayerModule) -> Array:
    hidden = vision(batch["clips"].reshape(len(batch["label"]), -1), key)
    return jnp.square(hidden.sum(-1) - batch["label"]).mean()


class Numbers:
    """An endless stream of batches that are a function of the step; examples of `spoiled` have an infinite
    scale. Of several processes each gets the examples that it holds."""

    def __init__(
        self, recipe: Recipe, spoiled: tuple[int, ...] = (), end: int | None = None, wait: float = 0.0
    ):
        self.recipe, self.spoiled, self.end, self.wait, self.step = recipe, spoiled, end, wait, 0

    def __iter__(self) -> "Numbers":
        return self

    def __next__(self) -> dict[str, dict[str, np.ndarray]]:
        if self.step == self.end:
            raise StopIteration
        time.sleep(self.wait)
        batches = {}
        for place, (name, objective) in enumerate(self.recipe.feeds.items()):
            index = np.arange(objective.batch, dtype=np.int32) + 100 * self.step
            random = np.random.default_rng([place, self.step])
            batches[name] = {
                "clips": random.integers(0, 255, (objective.batch, 1, 2, 2, 3), np.uint8),
                "label": random.integers(0, 4, objective.batch, np.int32),
                "scale": np.where(np.isin(index, self.spoiled), np.inf, 1).astype(np.float32),
                "index": index,
            }
            held = processes.held(self.recipe.mesh.build(), objective.batch)
            batches[name] = {field: array[held] for field, array in batches[name].items()}
        self.step += 1
        return batches

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: Any) -> None:
        self.step = state["step"]


def toy(**changes: Any) -> Recipe:
    objectives = {
        "classify": Objective(task=classify, data="numbers", batch=8),
        "count": Objective(task=count, data="numbers", batch=4, weight=0.1),
    }
    settings = {
        "name": "toy",
        "modules": {"vision": Layer(inputs=12, outputs=8), "head": Layer(inputs=8, outputs=4)},
        "objectives": objectives,
        "optimizer": AdamW(learning_rate=0.01, warmup=3),
        "steps": 12,
        "log_every": 1,
        "checkpoint_every": 5,
    }
    return Recipe(**settings | changes)


def run(recipe: Recipe, folder: Path, **stream: Any):
    network = Network(recipe.parts)
    return train(
        recipe, folder, batches=Numbers(recipe, **stream), composed=(network, network.init(recipe.seed))
    )


def losses(folder: Path) -> list[tuple]:
    """What must not depend on when a run was stopped: everything in the log but the clock."""
    clocks = ("examples_per_second", "seconds")
    return [
        tuple((name, value) for name, value in line.items() if name not in clocks)
        for line in read_metrics(folder)
    ]


def same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def trainer(recipe: Recipe) -> tuple[Trainer, Any]:
    network = Network(recipe.parts)
    made = Trainer(recipe, network)
    return made, made.begin(network.init(recipe.seed))


def batch(recipe: Recipe) -> Any:
    return next(Numbers(recipe))
