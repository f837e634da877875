"""Training on meshes is training on one device: losses, gradients, what crosses between devices, and where
memory goes. Over 8 virtual CPU devices in one process."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest
from exact import FLOAT64, RTOL, assert_equal, in_float64, widened
from fresh import fresh

from mplug2 import tasks
from mplug2.data.pixels import Preprocessing
from mplug2.modules import decoder, heads, text, universal, vision
from mplug2.network import Network, flat
from mplug2.recipe import Objective, Recipe
from mplug2.recipes import pretrain, world
from mplug2.sharding import Mesh
from mplug2.step import Trainer
from mplug2.train import data_stream

MESHES = {
    "data": Mesh(data=8),
    "fsdp": Mesh(fsdp=8),
    "fsdp and tensor": Mesh(fsdp=2, tensor=4),
    "data, sequence and tensor": Mesh(data=2, sequence=2, tensor=2),
}


QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
QUICK_TO_RUN_TOO = QUICK_TO_COMPILE | {"xla_backend_optimization_level": 1}
"""At level 0 drawing dropout's bits takes most of a step."""


def multi_task(**changes: Any) -> Recipe:
    """The tiny recipe of all tasks, of which 8 devices can share every objective's batch and 4 the heads."""
    recipe = pretrain.recipe(dataclasses.replace(world.TINY, batch=32))
    modules: dict[str, Any] = dict(recipe.modules)
    for name, config in modules.items():
        if hasattr(config, "heads"):
            modules[name] = dataclasses.replace(config, heads=4)
    return dataclasses.replace(recipe, modules=modules, compiler=QUICK_TO_RUN_TOO, **changes)


@functools.cache
def batches_of(steps: int) -> list[Any]:
    stream = data_stream(multi_task())
    return [
        {
            feed: {name: array for name, array in batch.items() if name != "index"}
            for feed, batch in next(stream).items()
        }
        for _ in range(steps)
    ]


def trained(recipe: Recipe, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """The losses of the first steps, and the first step's gradients, clipped (Adam's first moment begins as a
    tenth of them), with their norm before."""
    network = Network(recipe.parts, FLOAT64)
    trainer = Trainer(recipe, network)
    state = trainer.begin(widened(jax.jit(network.init, static_argnums=0)(recipe.seed)))
    losses, moment, norm = [], {}, 0.0
    for batch in batches_of(steps):
        state, told = trainer.step(state, {}, jax.tree.map(trainer.place_batch, batch))
        losses.append(float(told["metrics"]["loss"]))
        norm = norm or float(told["metrics"]["gradient_norm"])
        moment = moment or jax.device_get(flat(optax.tree.get(state["moments"], "mu")))
    return np.array(losses), moment, norm


@functools.cache
def on_one_device(steps: int) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    return trained(multi_task(steps=steps, log_every=1), steps)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
def test_fifty_steps_of_all_tasks_on_a_mesh_are_those_of_one_device(mesh):
    with in_float64():
        losses, gradients, norm = on_one_device(50)
        found, found_gradients, found_norm = trained(multi_task(steps=50, log_every=1, mesh=mesh), 50)
    assert_equal((found[0], found_gradients, found_norm), (losses[0], gradients, norm))
    np.testing.assert_allclose(found, losses, rtol=1e4 * RTOL)  # training widens a difference


# ------------------------------------------------------------------------------------------------------------
# One gradient of one layer each: quick enough for every run, and its program can be read

PAIRS = 20
"""Of pictures and texts: a number that no other dimension has."""

SMALL_MESHES = {name: MESHES[name] for name in ("fsdp and tensor", "data, sequence and tensor")}


def contrast(mesh: Mesh) -> Recipe:
    return Recipe(
        name="contrast",
        modules={
            "vision": vision.Config(image=(32, 32), stem=vision.Patches(patch=8), width=32, depth=3, heads=4),
            "text": dataclasses.replace(text.tiny(), vocabulary=world.VOCABULARY, heads=4),
            "universal": dataclasses.replace(universal.tiny(), depth=3, heads=4),
            "contrastive": heads.ContrastiveConfig(width=32, space=16),
        },
        objectives={"contrast": Objective(task=tasks.contrast, data=None, batch=PAIRS)},
        mesh=mesh,
    )


def compiled_gradient(mesh: Mesh) -> tuple[Trainer, Any]:
    recipe = contrast(mesh)
    trainer = Trainer(recipe, Network(recipe.parts, FLOAT64))
    batch = {
        "clips": jax.ShapeDtypeStruct((PAIRS, 1, 32, 32, 3), np.uint8),
        "text": jax.ShapeDtypeStruct((PAIRS, 18), np.int32),
    }
    step = jax.jit(functools.partial(trainer.gradients, key=None), compiler_options=QUICK_TO_COMPILE)
    params, batches = widened(trainer.abstract["params"]), trainer.abstract_batches({"contrast": batch})
    with in_float64():
        return trainer, step.lower(params, {}, batches).compile()


@functools.cache
def gradient(mesh: Mesh) -> tuple[str, float, dict[str, np.ndarray]]:
    """(program, loss, gradients) of one batch, in float64."""
    trainer, compiled = compiled_gradient(mesh)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * random.standard_normal(leaf.shape), trainer.network.shapes)
    batch = {
        "clips": random.integers(0, 256, (PAIRS, 1, 32, 32, 3), np.uint8),
        "text": random.integers(1, world.VOCABULARY, (PAIRS, 18), np.int32),
    }
    with in_float64():
        placed = jax.device_put(params, trainer.shardings and trainer.shardings["params"])
        batches = {"contrast": jax.tree.map(trainer.place_batch, batch)}
        (loss, _), gradients = compiled(placed, {}, batches)
        return compiled.as_text(), float(loss), jax.device_get(flat(gradients))


def collectives(program: str) -> dict[str, set[str]]:
    """{kind: shapes of what a device gets by it}."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found: dict[str, set[str]] = {}
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})\(", program):
        found.setdefault(kind, set()).update(re.findall(r"\w+\[[\d,]*\]", shapes))
    return found


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", SMALL_MESHES.values(), ids=SMALL_MESHES.keys())
def test_a_gradient_on_a_mesh_is_that_of_one_device(mesh):
    assert_equal(gradient(mesh)[1:], gradient(Mesh())[1:])


@pytest.mark.devices(8)
def test_under_tensor_parameters_are_gathered_over_fsdp_alone():
    gathered = collectives(gradient(MESHES["fsdp and tensor"])[0])["all-gather"]
    hidden, width, slices = 64, 32, 4
    assert f"f64[1,{width},{width // slices}]" in gathered  # query, key and value
    assert f"f64[1,{width // slices},{width}]" in gathered  # out
    assert f"f64[1,{width},{hidden // slices}]" in gathered  # the universal MLP
    assert f"f64[{world.VOCABULARY // slices},{width}]" in gathered  # the word table
    for whole in ((1, width, hidden), (1, hidden, width), (world.VOCABULARY, width)):
        assert f"f64[{','.join(map(str, whole))}]" not in gathered
    assert not [shape for shape in gathered if shape.startswith("f64[3,")]  # a stack, all its layers at once


@pytest.mark.devices(8)
def test_without_fsdp_no_parameter_is_gathered_at_all():
    program, _, _ = gradient(MESHES["data, sequence and tensor"])
    leaves = jax.tree.leaves(Network(contrast(Mesh()).parts).shapes)
    stacks = [leaf.shape for leaf in leaves if leaf.ndim == 3]
    layers = [(1, *shape[1:]) for shape in stacks]
    kernels = {f"f64[{','.join(map(str, shape))}]" for shape in stacks + layers}
    gathered = collectives(program)["all-gather"]
    assert len(kernels) > 8 and not gathered & kernels


@pytest.mark.devices(8)
def test_over_sequence_what_layers_compute_is_not_gathered_for_gradients():
    gathered = collectives(gradient(MESHES["data, sequence and tensor"])[0])["all-gather"]
    hidden = 4 * 32 // 2  # units of vision's MLP on a device, a number that no kernel's last axis has
    assert not [shape for shape in gathered if shape.endswith(f",{hidden}]")]


@pytest.mark.devices(8)
@pytest.mark.parametrize("mesh", SMALL_MESHES.values(), ids=SMALL_MESHES.keys())
def test_negatives_are_of_the_whole_batch_and_similarities_stay_by_rows(mesh):
    program, _, _ = gradient(mesh)
    share = PAIRS // (mesh.data * mesh.fsdp)
    assert f"f64[{share},{PAIRS}]" in program and f"f64[{PAIRS},{PAIRS}]" not in program
    assert f"f64[{PAIRS},16]" in collectives(program)["all-gather"]  # the texts' vectors


def kinds_in_loops(program: str) -> set[str]:
    """The kinds of collectives inside the loops of a program, or in what those call."""
    bodies = dict(re.findall(r"^%?(\S+) \(.*?\{$(.*?)^\}", program, re.DOTALL | re.MULTILINE))
    assert "branch_computations" not in program
    inside, rest = set(), set(re.findall(r"(?:body|condition)=%?([\w.-]+)", program))
    while rest:
        inside |= rest
        called = (re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)", bodies[name]) for name in rest)
        rest = set().union(*called) - inside
    return set().union(*(collectives(bodies[name]) for name in inside))


@pytest.mark.devices(8)
def test_layers_unrolled_for_processes_of_cpus_leave_no_collective_in_a_loop(monkeypatch):
    """Nothing orders it after the loops that run beside it, and processes would wait for different ones."""
    mesh = MESHES["fsdp and tensor"]
    assert kinds_in_loops(gradient(mesh)[0]) >= {"all-gather", "all-reduce"}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not kinds_in_loops(compiled_gradient(mesh)[1].as_text())


@pytest.mark.devices(8)
def test_texts_that_sequence_does_not_divide_leave_no_trace_in_gradients():
    """Three words over two devices: what pads them is nobody's word."""
    recipe = Recipe(
        name="complete",
        modules={
            "text": dataclasses.replace(text.tiny(), heads=4),
            "universal": dataclasses.replace(universal.tiny(), depth=1, heads=4),
            "decoder": dataclasses.replace(decoder.tiny(), vocabulary=world.VOCABULARY, depth=1, heads=4),
        },
        objectives={"complete": Objective(task=tasks.complete, data=None, batch=8)},
        mesh=Mesh(sequence=2, tensor=2),
    )
    random, found = np.random.default_rng(0), []
    batch = {
        "text": random.integers(1, world.VOCABULARY, (8, 24), np.int32),
        "target": random.integers(1, world.VOCABULARY, (8, 4), np.int32),
    }
    params = widened(fresh(recipe.parts))
    with in_float64():
        for each in (recipe, dataclasses.replace(recipe, mesh=Mesh())):
            trainer = Trainer(each, Network(each.parts, FLOAT64))
            step = jax.jit(functools.partial(trainer.gradients, key=None), compiler_options=QUICK_TO_COMPILE)
            batches = {"complete": jax.tree.map(trainer.place_batch, batch)}
            found.append(jax.device_get(step(trainer.begin(params)["params"], {}, batches)))
    assert_equal(*found)


def temporary_bytes(mesh: Mesh) -> int:
    """What a device takes beside the state for a step on a video of 4097 tokens: compiled, not run."""
    recipe = Recipe(
        name="long",
        modules={
            "vision": vision.Config(
                image=(224, 224), stem=vision.Patches(patch=14), width=32, depth=1, heads=2
            ),
            "universal": dataclasses.replace(universal.tiny(), depth=1),
            "vision_classifier": heads.ClassifierConfig(width=32, classes=4),
        },
        objectives={"classify": Objective(task=tasks.classify_vision, data=None, batch=1)},
        preprocessing=Preprocessing(height=224, width=224, frames=16),
        dropout=False,
        compiler=QUICK_TO_COMPILE,
        mesh=mesh,
    )
    batch = {
        "clips": jax.ShapeDtypeStruct((1, 16, 224, 224, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((1,), np.int32),
    }
    trainer = Trainer(recipe, Network(recipe.parts))
    plan: Any = trainer.lower({"classify": batch}).compile().memory_analysis()
    return plan.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.devices(8)
def test_a_videos_4097_tokens_are_spread_over_sequence():
    assert temporary_bytes(Mesh(sequence=8)) < temporary_bytes(Mesh()) / 6
