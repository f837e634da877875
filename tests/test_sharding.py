"""Where arrays lie on a mesh, by the table of mplug2.sharding."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import IN_FLOAT32

from mplug2 import sharding
from mplug2.errors import RecipeError
from mplug2.generate import Greedy, decode
from mplug2.modules import decoder, universal
from mplug2.network import Network
from mplug2.sharding import Mesh, idle, mesh_of

pytestmark = pytest.mark.devices(8)


def lies(mesh: Mesh, *axes: str | None, shape: tuple[int, ...]) -> tuple:
    return tuple(sharding.sharding(mesh.build(), axes, shape).spec)


def constrained(mesh: Mesh, *axes: str | None, shape: tuple[int, ...]) -> tuple:
    """The spec that `constrain` asks for."""

    def traced(x: jax.Array) -> jax.Array:
        with sharding.on(mesh.build()):
            return sharding.constrain(x, *axes)

    (equation,) = jax.make_jaxpr(traced)(jnp.zeros(shape)).eqns
    return tuple(equation.params["sharding"].spec)


def test_kernels_lie_over_fsdp_and_tensor_and_norms_everywhere():
    mesh = Mesh(fsdp=2, tensor=4)
    assert lies(mesh, "layers", "embed", "heads", shape=(2, 32, 32)) == (None, "fsdp", "tensor")
    assert lies(mesh, "mlp", "embed", shape=(64, 32)) == ("tensor", "fsdp")
    assert lies(mesh, "norm", shape=(32,)) == (None,)


def test_a_dimension_that_does_not_divide_is_whole():
    assert lies(Mesh(fsdp=2, tensor=4), "embed", "mlp", shape=(32, 10)) == ("fsdp", None)


def test_a_vocabulary_that_does_not_divide_lies_by_columns():
    assert lies(Mesh(fsdp=2, tensor=4), "vocab", "embed", shape=(96, 32)) == ("tensor", "fsdp")
    assert lies(Mesh(fsdp=2, tensor=4), "vocab", "embed", shape=(30522, 32)) == (None, ("fsdp", "tensor"))
    assert lies(Mesh(fsdp=4, tensor=2), "vocab", "embed", shape=(97, 36)) == (None, "fsdp")


def test_frames_are_spread_over_sequence_and_tokens_where_frames_do_not_divide():
    mesh, axes = Mesh(data=2, sequence=4), ("batch", "frames", "tokens", None)
    assert constrained(mesh, *axes, shape=(2, 16, 257, 8)) == (("data", "fsdp"), "sequence", None, None)
    assert constrained(mesh, *axes, shape=(2, 1, 257, 8)) == (("data", "fsdp"), None, "sequence", None)
    assert constrained(mesh, *axes, shape=(2, 1, 3, 8)) == (("data", "fsdp"), None, None, None)


def test_off_a_mesh_activations_are_not_touched():
    assert not jax.make_jaxpr(lambda x: sharding.constrain(x, "batch"))(jnp.zeros(8)).eqns
    with sharding.on(Mesh().build()):
        assert sharding.here() is None


def test_heads_are_never_cut_and_the_refusal_says_what_fits():
    mesh = Mesh(tensor=8).build()
    sharding.check_heads(mesh, {"universal": replace(universal.tiny(), heads=16)})
    said = (
        "mesh tensor=8: the 12 heads of universal do not divide among 8 devices;"
        " tensor may be 1, 2, 3, 4, 6, 12, or universal.heads 8 or 16"
    )
    with pytest.raises(RecipeError, match=re.escape(said)):
        sharding.check_heads(mesh, {"universal": universal.base()})


def test_a_parameter_is_gathered_over_fsdp_alone_and_its_gradient_lies_as_it_did():
    mesh = Mesh(fsdp=2, tensor=4).build()
    place = sharding.sharding(mesh, ("embed", "mlp"), (32, 64))
    x = jax.device_put(jnp.ones((8, 32)), sharding.batch_sharding(mesh))

    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        with sharding.on(mesh):
            return (x @ sharding.gathered(kernel, ("embed", "mlp"))).sum()

    kernel = jax.device_put(jnp.ones((32, 64)), place)
    compiled: Any = jax.jit(jax.grad(loss)).lower(kernel, x).compile()
    assert compiled.output_shardings == place
    assert "f32[32,64]" not in compiled.as_text()
    np.testing.assert_array_equal(compiled(kernel, x), 8.0)


@pytest.mark.parametrize(
    "mesh", [pytest.param(Mesh(fsdp=2, tensor=4), marks=pytest.mark.slow), Mesh(data=2, sequence=2, tensor=2)]
)
def test_captions_on_a_mesh_are_those_of_one_device_and_caches_lie_by_heads(mesh):
    config = replace(decoder.tiny(), vocabulary=97, heads=4)
    network = Network({"decoder": config})
    params = jax.jit(network.init, static_argnums=0)(0)
    memory = jax.random.normal(jax.random.key(1), (8, 5, 32))

    def captions(params, memory):
        return decode(network.bind(params)["decoder"], memory, None, Greedy(length=3), begin=1, end=2)

    expected = jax.jit(captions)(params, memory)
    built = mesh.build()
    with jax.set_mesh(built):
        placed = jax.device_put(params, sharding.shardings(built, network.axes, network.shapes))
        compiled: Any = jax.jit(captions).lower(placed, memory).compile()
        found = compiled(placed, memory)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=IN_FLOAT32)
    shares = sharding.batch_shares(built)
    assert f"f32[{8 // shares},{4 // mesh.tensor},3,8]" in compiled.as_text()
    assert "f32[8,4,3,8]" not in compiled.as_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fsdp=4,fsdp=2", "fsdp is given twice, 4 and 2"),
        ("fsdp=4, fsdp=4", "fsdp is given twice, 4 and 4"),
        ("fspd=4", 'no axis "fspd".*did you mean "fsdp"'),
        ("fsdp=-1", 'fsdp is "-1", expected a number of devices'),
        ("fsdp", 'fsdp is "", expected'),
    ],
)
def test_a_mesh_that_says_two_things_or_none_is_refused(text, reason):
    with pytest.raises(RecipeError, match=reason):
        mesh_of(text)


def test_devices_that_a_mesh_leaves_idle_are_said(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    one = Mesh().build(jax.devices()[:1])
    assert idle(one) == "mesh data=1 uses 1 of the 4 devices here, 3 are idle (mesh.data=N)"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert idle(one) == ""
