"""The network owns each module once; what it computes does not depend on how it is run or on who else is
selected."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import FLOAT64, IN_FLOAT32, RTOL, assert_equal, in_float64, widened
from fresh import compiled, fresh
from jax.extend.core import jaxprs_in_params

from mplug2 import recipes, tasks
from mplug2.errors import RecipeError
from mplug2.modules import decoder, temporal, text, universal, vision
from mplug2.network import Network, flat, nested, parts_of, select
from mplug2.plan.textbook import batches
from mplug2.roles import Execution, padding_mask, sum_dtype
from mplug2.routes import read
from mplug2.step import Trainer

SEED = 3
CONFIGS = {
    "vision": vision.tiny(),
    "temporal": temporal.tiny(),
    "universal": universal.tiny(),
    "text": text.tiny(),
}
IDS = jnp.array([[2, 9, 7, 3, 0], [2, 8, 3, 0, 0]])


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in flat(tree).items()}


def assert_same(one: Any, other: Any, **tolerance: Any) -> None:
    assert leaves(one).keys() == leaves(other).keys()
    for name, value in leaves(one).items():
        np.testing.assert_allclose(value, leaves(other)[name], err_msg=name, **tolerance)


def test_state_is_one_subtree_a_module_with_shapes_and_axes_alike():
    network = Network(CONFIGS)
    params = fresh(network.configs, SEED)
    assert set(params) == set(network.shapes) == set(network.axes) == set(CONFIGS)
    for name, value in leaves(params).items():
        shape, axes = flat(network.shapes)[name], flat(network.axes)[name]
        assert (value.shape, value.dtype) == (shape.shape, np.float32)
        assert len(axes) == value.ndim, name


def test_adding_a_module_does_not_change_how_the_others_begin():
    alone = compiled(Network({"text": text.tiny()}).init)(SEED)
    among = compiled(Network({"decoder": decoder.tiny(), **CONFIGS}).init)(SEED)
    assert_same(alone["text"], among["text"], rtol=0)
    renamed = compiled(Network({"other": text.tiny()}).init)(SEED)
    assert not np.array_equal(
        leaves(renamed["other"])["embedding.words"], leaves(alone["text"])["embedding.words"]
    )


def test_the_gradient_of_universal_is_the_sum_over_the_routes_that_call_it():
    recipe = recipes.find("image_retrieval.tiny")
    network = Network(recipe.modules, FLOAT64)
    params = widened(fresh(network.configs, SEED))
    clips, ids = np.random.default_rng(0).normal(size=(2, 1, 32, 32, 3)), IDS

    def loss(through_vision: Any, through_text: Any) -> jax.Array:
        """Both routes, each with parameters of universal of its own."""
        seeing, reading = (
            network.bind(params | {"universal": through_vision}),
            network.bind(params | {"universal": through_text}),
        )
        seen = seeing["universal"].vision(seeing["vision"](clips))
        said = reading["universal"].text(reading["text"](ids), padding_mask(ids))
        return jnp.square(seen).mean() * 3 + jnp.sin(said).mean() + (seen[:, 0] * said[:, 0]).mean()

    with in_float64():
        shared = compiled(jax.grad(lambda both: loss(both, both)))(params["universal"])
        apart = compiled(jax.grad(loss, argnums=(0, 1)))(params["universal"], params["universal"])
        assert_equal(shared, jax.tree.map(jnp.add, *apart))
    kernel = "layers.layers.mlp.up.kernel"
    assert all(np.abs(leaves(part)[kernel]).max() > 1e-6 for part in apart)


@pytest.mark.slow
def test_what_comes_in_float64_is_nowhere_narrowed():
    """So that tests in float64 compare 16 digits."""
    recipe = recipes.find("pretrain.tiny")
    network = Network(recipe.modules, FLOAT64)
    trainer = Trainer(recipe, network)

    def narrowed(jaxpr: Any) -> list[str]:
        own = [
            str(step)
            for step in jaxpr.eqns
            if any(side.aval.dtype == jnp.float64 for side in step.invars)
            and any(side.aval.dtype in (jnp.float32, jnp.bfloat16) for side in step.outvars)
        ]
        inner = (narrowed(inner) for step in jaxpr.eqns for inner in jaxprs_in_params(step.params))
        return sum(inner, own)

    with in_float64():
        differentiate = jax.make_jaxpr(functools.partial(trainer.gradients, key=jax.random.key(0)))
        jaxpr = differentiate(widened(network.shapes), {}, widened(batches(recipe)))
        assert {side.dtype for side in jaxpr.out_avals} == {np.dtype("float64")}
        assert narrowed(jaxpr.jaxpr) == []


def run(execution: Execution) -> tuple[jax.Array, Any]:
    """A loss through every kind of stack, and its gradients."""
    network = Network(CONFIGS, execution)
    params = fresh(CONFIGS, SEED)
    if execution.dtype == FLOAT64.dtype:
        params = widened(params)
    rng = np.random.default_rng(1)
    shaken = jax.tree.map(
        lambda leaf: (leaf + 0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype), params["temporal"]
    )
    params |= {"temporal": shaken}  # no longer zero
    clips = rng.normal(size=(2, 3, 32, 32, 3))

    @compiled
    @jax.value_and_grad
    def loss(params: Any) -> jax.Array:
        parts = network.bind(params)
        seen = parts["universal"].vision(parts["vision"](clips, parts["temporal"]))
        said = read(IDS, text=parts["text"], universal=parts["universal"])
        seen, said = seen.astype(sum_dtype(seen)), said.astype(sum_dtype(said))
        return jnp.sin(seen).mean() + jnp.square(said[:, :2] - 0.5).mean()

    return loss(params)


@pytest.fixture(scope="module")
def scanned() -> tuple[jax.Array, Any]:
    with in_float64():
        return run(dataclasses.replace(FLOAT64, scan=True))


@pytest.mark.parametrize(
    "execution, rtol",
    [
        ({"scan": False}, RTOL),
        ({"remat": "full"}, RTOL),
        ({"remat": "dots"}, RTOL),
        ({"remat": "offload"}, RTOL),
        ({"attention": "xla"}, IN_FLOAT32),  # JAX's softmax is float32 whatever comes
        ({"scan": False, "remat": "full"}, RTOL),
    ],
    ids=str,
)
def test_execution_never_changes_what_is_computed(execution, rtol, scanned):
    with in_float64():
        assert_equal(run(dataclasses.replace(FLOAT64, **execution)), scanned, rtol)


@pytest.mark.parametrize(
    "remat, hidden, weights", [("none", True, True), ("dots", True, False), ("full", False, False)]
)
def test_remat_dots_keeps_products_with_weights_and_none_of_attentions(remat, hidden, weights):
    network = Network(
        {"text": text.tiny(), "universal": universal.tiny()}, Execution(remat=remat, scan=False)
    )

    def left(params: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: read(IDS, **network.bind(params)), params)[1])

    shapes = {leaf.shape for leaf in jax.eval_shape(left, network.shapes)}
    examples, tokens = IDS.shape
    assert ((examples, tokens, text.tiny().hidden) in shapes) == hidden
    assert ((examples, text.tiny().heads, tokens, tokens) in shapes) == weights


def test_bfloat16_is_close_to_float32(scanned):
    value, gradient = run(Execution(dtype="bfloat16"))
    assert float(value) == pytest.approx(float(scanned[0]), rel=2e-2)
    assert value.dtype == jnp.float32
    assert all(leaf.dtype == np.float32 for leaf in leaves(gradient).values())
    # All of it as one vector: parts of the exact gradient are zero but for rounding.
    exact, rough = (
        np.concatenate([leaf.ravel() for leaf in leaves(it).values()]) for it in (scanned[1], gradient)
    )
    assert np.linalg.norm(rough - exact) < 0.1 * np.linalg.norm(exact)


def test_dropout_happens_only_with_a_key_and_follows_it():
    network = Network({"text": text.tiny(), "universal": universal.tiny()})
    params = fresh(network.configs, SEED)

    def tokens(key: jax.Array | None) -> jax.Array:
        return read(IDS, **network.bind(params), key=key)

    assert (tokens(None) == tokens(None)).all()
    assert (tokens(jax.random.key(0)) == tokens(jax.random.key(0))).all()
    assert not jnp.allclose(tokens(jax.random.key(0)), tokens(jax.random.key(1)))
    assert not jnp.allclose(tokens(jax.random.key(0)), tokens(None))


def test_a_task_declares_its_modules_by_its_signature():
    assert parts_of(tasks.caption) == {
        "vision": True,
        "universal": True,
        "decoder": True,
        "temporal": False,
        "connector": False,
    }
    assert set(select(tasks.caption, dict.fromkeys(["vision", "universal", "decoder", "text"]))) == {
        "vision",
        "universal",
        "decoder",
    }
    with pytest.raises(RecipeError, match="caption composes .*missing .*decoder.*did you mean"):
        select(tasks.caption, dict.fromkeys(["vision", "universal", "decoders"]))


def test_flat_and_nested_are_inverse_by_path():
    tree = {"a": {"b": 1, "c": {"d": 2}}}
    assert flat(tree) == {"a.b": 1, "a.c.d": 2}
    assert nested({("a", "b"): 1, ("a", "c", "d"): 2}) == tree
