"""Fused attention is our own, written-out one: values and gradients, with every kind of mask."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import IN_FLOAT32, assert_equal
from jax.sharding import NamedSharding, PartitionSpec

from mplug2 import sharding, tasks
from mplug2.data.pixels import Preprocessing
from mplug2.modules import heads, universal, vision
from mplug2.modules.functions import attention, fused_attention
from mplug2.modules.splash import BLOCK, TILE, _block, fits, splash_attention
from mplug2.network import Network
from mplug2.plan import machines
from mplug2.recipe import Objective, Recipe
from mplug2.roles import Array, Execution
from mplug2.sharding import Mesh
from mplug2.step import Trainer

MASKS = {
    "none": None,
    "causal": jnp.tril(jnp.ones((6, 6), bool)),
    "padding": (jnp.arange(6) < jnp.array([[4], [6]]))[:, None, None, :],
}


AXES = {4: ("batch", "heads", "tokens", None), 5: ("batch", "frames", "heads", "tokens", None)}
"""The logical ones of queries, by the number of their dimensions."""

Attend = Callable[[Array, Array, Array], Array]


def value_and_gradients(attend: Attend, parts: Sequence[Array]) -> Any:
    """Of a sum of what is attended to, by weights that no two numbers share."""

    def weighed(*parts: Array) -> Array:
        mixed = attend(*parts)
        return (mixed * jnp.cos(jnp.arange(mixed.size)).reshape(mixed.shape)).sum()

    return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(*parts)


def assert_ours(attend: Attend, parts: Sequence[Array], mask: Array | None) -> None:
    written: Any = attention
    ours = value_and_gradients(lambda q, k, v: written(q, k, v, mask, None, 0.0), parts)
    found = value_and_gradients(attend, parts)
    assert_equal(found, ours, IN_FLOAT32)  # their softmax is float32 whatever comes


def normal(*shapes: tuple[int, ...]) -> list[Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", [(2, 3, 6, 8), (2, 4, 3, 6, 8)], ids=["tokens", "frames"])
def test_xlas_attention_and_its_gradients_are_ours(mask, shape):
    if mask is not None and len(shape) == 5:
        mask = mask if mask.ndim == 2 else mask[:, None]
    assert_ours(
        lambda q, k, v: fused_attention(q, k, v, mask, "xla", AXES[q.ndim]), normal(shape, shape, shape), mask
    )


# ------------------------------------------------------------------------------------------------------------
# TPUs' kernels, run as plain JAX

HIDDEN = (jnp.arange(130) < jnp.array([[97], [130]]))[:, None, None, :]
"""Of 130 keys, no multiple of a tile: the first of two examples has but 97."""


def splash(query: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    return splash_attention(query, keys, values, mask, AXES[query.ndim], interpret=True)


@pytest.mark.parametrize("keys, mask", [(130, None), (130, HIDDEN), (128, None)])
def test_splash_attention_and_its_gradients_are_ours(keys, mask):
    query, *memory = normal((2, 2, 140, 8), (2, 2, keys, 8), (2, 2, keys, 8))
    assert_ours(lambda q, k, v: splash(q, k, v, mask), [query, *memory], mask)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "frames, spread",
    [
        ((), PartitionSpec(("data", "fsdp"), "tensor", "sequence", None)),
        ((2,), PartitionSpec(("data", "fsdp"), "sequence", "tensor", None, None)),
    ],
    ids=["tokens", "frames"],
)
def test_splash_attention_on_a_mesh_is_ours_with_heads_and_queries_spread(frames, spread):
    mesh = Mesh(data=2, sequence=2, tensor=2).build()
    shape, mask = (2, *frames, 2, 130, 8), HIDDEN[:, None] if frames else HIDDEN

    def attend(query: Array, keys: Array, values: Array) -> Array:
        with sharding.on(mesh):
            return splash(query, keys, values, mask)

    parts = normal(shape, shape, shape)
    assert_ours(attend, jax.device_put(parts, NamedSharding(mesh, PartitionSpec())), mask)
    (mapped,) = (step for step in jax.make_jaxpr(attend)(*parts).eqns if step.primitive.name == "shard_map")
    sides = [
        (side.aval.shape[-2], spec)
        for side, spec in zip(mapped.invars, mapped.params["in_specs"], strict=True)
        if side.aval.ndim == len(shape)
    ]
    memory = PartitionSpec(*spread[:-2], None, None)
    assert sides == [(256, spread), (256, memory), (256, memory)]  # two tiles, or one of each of two devices
    assert mapped.params["out_specs"] == (spread,)


@pytest.mark.parametrize(
    "queries, keys, mask, fit",
    [
        (257, 257, None, True),
        (130, 130, HIDDEN, True),
        (130, 130, jnp.tril(jnp.ones((130, 130), bool)), False),
        (130, 130, jnp.tril(jnp.ones((2, 1, 130, 130), bool)), False),
        (50, 785, None, False),  # the keys are what a mesh spreads
        (197, 20, None, False),  # mostly padding
    ],
)
def test_splash_serves_where_tiles_are_filled_and_the_mask_is_of_keys(queries, keys, mask, fit):
    query, memory = jnp.zeros((2, 2, queries, 8)), jnp.zeros((2, 2, keys, 8))
    assert fits(query, memory, mask) == fit


def test_of_tokens_any_side_is_taken_in_blocks_of_tiles():
    for tokens in range(TILE, 5000, TILE):
        assert tokens % _block(tokens) == 0 and _block(tokens) % TILE == 0 and _block(tokens) <= BLOCK
    assert [_block(tokens) for tokens in (384, 640, 896, 4224)] == [384, 640, 896, 384]


# ------------------------------------------------------------------------------------------------------------
# TPUs that are not here

for_tpus = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "mplug2[plan-tpu]"',
)


@for_tpus
@pytest.mark.parametrize("how", ["xla", "splash"])
def test_compiled_for_tpus_splash_alone_writes_no_weights(how):
    mesh = Mesh(sequence=2, tensor=2).build(machines.find("v5e:2x2").devices)
    place = NamedSharding(mesh, PartitionSpec(None, "tensor", "sequence"))
    side = jax.ShapeDtypeStruct((2, 2, 512, 64), jnp.bfloat16, sharding=place)

    def attend(query: Array, keys: Array, values: Array) -> Array:
        with sharding.on(mesh):
            return fused_attention(query, keys, values, None, how, AXES[4]).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(attend, argnums=(0, 1, 2))).lower(side, side, side).compile()
    program = compiled.as_text() or ""
    assert ("tpu_custom_call" in program) == (how == "splash")
    assert bool(re.search(r"\[[\d,]*256,512\]", program)) == (how == "xla")


@for_tpus
def test_a_train_step_with_splash_is_compiled_for_tpus():
    mesh, patches = Mesh(fsdp=2, tensor=2), vision.Patches(patch=16)
    recipe = Recipe(
        name="pictures",
        modules={
            "vision": vision.Config(image=(192, 192), stem=patches, width=128, depth=2, heads=2),
            "universal": universal.Config(width=128, depth=1, heads=2, hidden=128, latents=4),
            "vision_classifier": heads.ClassifierConfig(width=128, classes=4),
        },
        objectives={"classify": Objective(task=tasks.classify_vision, data=None, batch=4)},
        preprocessing=Preprocessing(height=192, width=192, frames=1),
        execution=Execution(attention="splash", remat="dots", dtype="bfloat16"),
        mesh=mesh,
    )
    batch = {
        "clips": jax.ShapeDtypeStruct((4, 1, 192, 192, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((4,), np.int32),
    }
    network = Network(recipe.parts, recipe.execution)
    trainer = Trainer(recipe, network, mesh.build(machines.find("v5e:2x2").devices))
    program = trainer.lower({"classify": batch}).compile().as_text() or ""
    assert "tpu_custom_call" in program
