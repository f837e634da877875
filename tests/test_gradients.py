"""In bfloat16, what parameters get from many tokens or examples is summed in float32: by value, and read off
the programs of one device and of a mesh."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fresh import compiled
from jax.extend.core import jaxprs_in_params

from mplug2 import tasks
from mplug2.modules import decoder, fusion, heads, temporal, text, universal, vision
from mplug2.modules.forms import BitFit, Bottleneck, Lora
from mplug2.modules.functions import add, repeated, scale
from mplug2.modules.layers import Linear, Norm
from mplug2.modules.prompt import Prompt
from mplug2.network import Network, flat, parts_of
from mplug2.recipe import Objective, Recipe
from mplug2.roles import Array, Config, Execution
from mplug2.sharding import Mesh
from mplug2.step import Trainer

VIDEOS, FRAMES, PLACES, WIDTH = 16, 8, 257, 4
"""32,896 tokens."""


def drawn(*shape: int) -> Array:
    """Numbers that lean to one side, as gradients do: it is beside a large sum that bfloat16 loses what comes
    to it."""
    return jnp.asarray(np.random.default_rng(0).normal(0.3, 1, shape), jnp.bfloat16)


SPREAD: dict[str, tuple[tuple[int, ...], Any, Any]] = {
    "bias": ((WIDTH,), lambda p, x: add(x, p), lambda p, x: x + p),
    "positions": ((PLACES, WIDTH), lambda p, x: add(x, p), lambda p, x: x + p),
    "class token": ((WIDTH,), lambda p, x: repeated(p, x.shape, x.dtype), lambda p, x: p + 0 * x),
    "latents": ((1, 1, WIDTH), lambda p, x: repeated(p, x.shape, x.dtype), lambda p, x: p + 0 * x),
    "depthwise kernel": ((WIDTH,), lambda p, x: scale(x, p), lambda p, x: x * p),
}


@pytest.mark.parametrize("shape, ours, plain", SPREAD.values(), ids=SPREAD.keys())
def test_what_is_spread_over_32896_tokens_gets_the_sum_of_their_gradients(shape, ours, plain):
    x = 2 + drawn(VIDEOS, FRAMES, PLACES, WIDTH)
    parameter, exact = jnp.ones(shape), x.astype(jnp.float32)
    out, back = jax.vjp(ours, parameter, x)
    expected, expected_back = jax.vjp(plain, parameter, exact)
    assert out.dtype == jnp.bfloat16 and (out == expected.astype(jnp.bfloat16)).all()
    (found, to_x), (summed, to_exact) = back(x), expected_back(exact)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, summed, rtol=1e-4)
    assert (to_x == to_exact.astype(jnp.bfloat16)).all()


LAYERS: dict[str, tuple[Callable[[nnx.Rngs], Any], tuple[int, ...]]] = {
    "linear": (
        lambda rngs: Linear(WIDTH, WIDTH, axes=("embed", "mlp"), rngs=rngs),
        (VIDEOS, FRAMES * PLACES, WIDTH),
    ),
    "norm": (lambda rngs: Norm(WIDTH, epsilon=1e-5, rngs=rngs), (VIDEOS, FRAMES * PLACES, WIDTH)),
    "temporal": (lambda rngs: temporal.LocalTemporal(WIDTH, rngs=rngs), (VIDEOS, FRAMES, PLACES, WIDTH)),
    "convolution": (lambda rngs: vision.Convolution(3, WIDTH, stride=2, rngs=rngs), (32, 64, 64, 3)),
}


@pytest.mark.parametrize("build, shape", LAYERS.values(), ids=LAYERS.keys())
def test_gradients_from_32896_tokens_are_within_2_percent_of_those_in_float32(build, shape):
    random = np.random.default_rng(0)
    graph, state = nnx.split(build(nnx.Rngs(0)))
    state = jax.tree.map(lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape, np.float32), state)
    weights = drawn(WIDTH).astype(jnp.float32)

    def total(state: Any, x: Array) -> Array:
        return (jnp.square(nnx.merge(graph, state)(x).astype(jnp.float32)) * weights).sum()

    step, x = jax.jit(jax.grad(total)), drawn(*shape)
    rough, exact = (flat(nnx.to_pure_dict(step(state, x.astype(dtype)))) for dtype in ("bfloat16", "float32"))
    for name, gradient in exact.items():
        assert np.linalg.norm(rough[name] - gradient) < 0.02 * np.linalg.norm(gradient), name


# -----------------------------------------------------------------------------------------------------------
# Programs

EXAMPLES = 11
"""On a device: a number that no size of a parameter has as a factor."""

ONE_DEVICE = Mesh()


def over_examples(shape: Iterable[int]) -> bool:
    return any(size and size % EXAMPLES == 0 for size in shape)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The innermost ones."""
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        if not inner:
            yield equation
        for each in inner:
            yield from equations(each)


def adds_up(equation: Any) -> bool:
    """Whether the equation makes of several examples what is of none, or what is of another example."""
    if equation.primitive.name == "scatter-add":
        return equation.params["dimension_numbers"].scatter_dims_to_operand_dims == (0,)
    before, after = (
        any(over_examples(side.aval.shape) for side in sides) for sides in (equation.invars, equation.outvars)
    )
    return before and not after


def gradient_of(
    task: Any,
    batch: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, Config],
    *,
    deltas: Mapping[str, Any] = MappingProxyType({}),
    mesh: Mesh = ONE_DEVICE,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(the function, the shapes that it is given) of a gradient in bfloat16."""
    size = EXAMPLES * mesh.data * mesh.fsdp
    recipe = Recipe(
        name="bfloat16",
        modules=dict(modules),
        objectives={"one": Objective(task=task, data=None, batch=size)},
        deltas=deltas,
        modes=dict.fromkeys(deltas, "lora"),
        cards=dict.fromkeys(deltas, "a card"),
        execution=Execution(dtype="bfloat16"),
        mesh=mesh,
    )
    trainer = Trainer(recipe, Network(recipe.parts, recipe.execution))
    shapes = {
        name: jax.ShapeDtypeStruct((size, *shape), np.uint8 if name == "clips" else np.int32)
        for name, shape in batch.items()
    }
    given = trainer.abstract["params"], trainer.abstract_frozen, trainer.abstract_batches({"one": shapes})
    return functools.partial(trainer.gradients, key=None), given


MODULES: dict[str, Config] = {
    "vision": replace(vision.tiny(), depth=1),
    "temporal": replace(temporal.tiny(), depth=1),
    "text": text.tiny(),
    "universal": replace(universal.tiny(), depth=1),
    "fusion": fusion.tiny(),
    "decoder": decoder.tiny(),
    "contrastive": heads.ContrastiveConfig(width=32, space=16),
    "matching": heads.ClassifierConfig(width=32, classes=2),
    "unmasker": heads.UnmaskerConfig(width=32, vocabulary=128),
}
CLIPS = {"clips": (2, 32, 32, 3)}
DELTAS = {
    "vision": Lora(targets=("*.kernel",)),
    "text": BitFit(),
    "universal": Prompt(),
    "decoder": Bottleneck(),
}


@pytest.mark.parametrize(
    "task, batch, deltas",
    [
        (tasks.answer, CLIPS | {"question": (13,), "answer": (5,)}, {}),
        pytest.param(
            tasks.answer, CLIPS | {"question": (13,), "answer": (5,)}, DELTAS, marks=pytest.mark.slow
        ),
        pytest.param(tasks.match, CLIPS | {"text": (13,)}, {}, marks=pytest.mark.slow),
        pytest.param(tasks.unmask, {"masked": (13,), "masked_target": (13,)}, {}, marks=pytest.mark.slow),
    ],
    ids=["answer", "answer with deltas", "match", "unmask"],
)
def test_no_sum_over_examples_is_in_bfloat16(task, batch, deltas):
    modules = {name: MODULES[name] for name in parts_of(task) if name in MODULES}
    function, given = gradient_of(task, batch, modules, deltas=deltas)
    sums = [equation for equation in equations(jax.make_jaxpr(function)(*given).jaxpr) if adds_up(equation)]
    assert {"reduce_sum", "dot_general"} <= {equation.primitive.name for equation in sums}
    assert not [str(equation) for equation in sums if equation.outvars[0].aval.dtype == jnp.bfloat16]


def square(batch: Mapping[str, Array], key: Array | None = None, *, vision: Any, temporal: Any) -> Array:
    return jnp.square(vision(batch["clips"], temporal).astype(jnp.float32)).mean()


@pytest.mark.devices(4)
def test_no_gradient_crosses_a_mesh_in_bfloat16(tmp_path):
    """Read where XLA has just split the program among devices: later, CPUs compute bfloat16 in float32."""
    eye = vision.Config(image=(16, 16), stem=vision.BiasedPatches(patch=8), width=32, depth=1, heads=2)
    modules: dict[str, Config] = {"vision": eye, "temporal": temporal.Config(width=32, depth=1)}
    function, given = gradient_of(square, {"clips": (2, 16, 16, 3)}, modules, mesh=Mesh(data=2, sequence=2))
    options = compiled.keywords["compiler_options"] | {
        "xla_dump_to": str(tmp_path),
        "xla_dump_hlo_pass_re": "spmd-partitioning",
    }
    jax.jit(function, compiler_options=options).lower(*given).compile()
    (program,) = tmp_path.glob("*after_spmd-partitioning*")
    summed = re.findall(r"= (.*?) (?:all-reduce|reduce-scatter)\(", program.read_text())
    arrays = [array for shapes in summed for array in re.findall(r"(\w+)\[([\d,]*)\]", shapes)]
    crossing = {
        (dtype, shape)
        for dtype, shape in arrays
        if not over_examples(map(int, filter(None, shape.split(","))))
    }
    assert ("f32", "32") in crossing and not [shape for dtype, shape in crossing if dtype == "bf16"]
