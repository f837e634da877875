"""Inference spread over a mesh says what one device says. Over 8 virtual CPU devices in one process."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from exact import FLOAT64, assert_equal, in_float64, widened
from toy import run, same, toy

from mplug2 import inference
from mplug2.data.pixels import Preprocessing
from mplug2.errors import RecipeError
from mplug2.generate import Beam
from mplug2.inference import Compiled, Writer, captions, in_buckets, vision_vectors
from mplug2.modules import decoder, heads, temporal, universal, vision
from mplug2.modules.forms import Bottleneck
from mplug2.network import Network
from mplug2.run import read_run
from mplug2.sharding import Mesh
from mplug2.trained import restore

NETWORK = Network(
    {
        "vision": replace(vision.tiny(), heads=4),
        "temporal": temporal.tiny(),
        "universal": replace(universal.tiny(), heads=4),
        "decoder": replace(decoder.tiny(), vocabulary=97, heads=4),
        "contrastive": heads.ContrastiveConfig(width=32, space=16),
    }
)
SPREAD = Mesh(fsdp=2, sequence=2, tensor=2)


def compiled(mesh: Mesh, network: Network = NETWORK) -> Compiled:
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32), NETWORK.shapes)
    if network.execution is FLOAT64:
        params = widened(params)
    return Compiled(network, params, Preprocessing(), mesh.of_process())


def batch(size: int) -> dict[str, np.ndarray]:
    clips = np.random.default_rng(0).integers(0, 256, (size, 2, *vision.tiny().image, 3), np.uint8)
    return {"clips": clips, "index": np.arange(size, dtype=np.int32)}


@pytest.mark.devices(8)
@pytest.mark.parametrize("size", [4, pytest.param(3, marks=pytest.mark.slow)], ids=["divides", "divides not"])
def test_captions_and_vectors_on_a_mesh_are_those_of_one_device(size):
    write = Writer(Beam(length=4, rows=2), begin=1, end=2)
    with in_float64():
        exact = Network(NETWORK.configs, FLOAT64)
        alone, spread = compiled(Mesh(), exact), compiled(SPREAD, exact)
        texts = spread(captions, write)(batch(size)), alone(captions, write)(batch(size))
        vectors = spread(vision_vectors)(batch(size)), alone(vision_vectors)(batch(size))
    np.testing.assert_array_equal(*texts)
    assert_equal(*vectors)


@pytest.mark.devices(8)
def test_on_a_mesh_a_device_holds_its_part_of_the_parameters_alone():
    kernel = compiled(SPREAD)._params["decoder"]["layers"]["layers"]["mlp"]["up"]["kernel"]
    _, width, hidden = kernel.shape
    assert {shard.data.shape[1:] for shard in kernel.addressable_shards} == {(width // 2, hidden // 2)}


@pytest.mark.devices(8)
def test_a_delta_from_one_device_merges_into_a_base_on_a_mesh():
    """A bottleneck widens the MLP, by a number here that the mesh does not divide."""
    base = universal.tiny()
    plain = Network({"universal": base})
    adapted = Network({"universal": base, "universal_delta": Bottleneck(width=3).delta(base)})
    params = jax.jit(adapted.init, static_argnums=0)(0)
    bare = {"universal": params["universal"]}
    found = []
    for mesh in (Mesh(), Mesh(fsdp=2, tensor=2)):
        one = Compiled(plain, bare, Preprocessing(), mesh.of_process()).on(adapted, params)
        found.append(jax.device_get(one._params))
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.devices(8)
def test_a_mesh_that_cuts_a_head_is_refused():
    with pytest.raises(RecipeError, match="the 4 heads of vision do not divide among 8 devices"):
        compiled(Mesh(tensor=8))


@pytest.mark.devices(8)
@pytest.mark.parametrize("fsdp, devices", [(4, 4), (16, 1)], ids=["there are enough", "there are too few"])
def test_what_a_run_learned_lies_on_its_mesh_where_devices_are_enough(fsdp, devices, tmp_path):
    recipe = toy(steps=2, ema=0.9)
    run(recipe, tmp_path)
    _, _, params = restore(read_run(tmp_path), replace(recipe, mesh=Mesh(fsdp=fsdp)))
    assert len(params["vision"]["kernel"].sharding.device_set) == devices
    same(params, restore(read_run(tmp_path), recipe)[2])


def test_few_sizes_of_batches_are_asked_for_whatever_callers_send():
    asked = set()

    def compute(batch):
        asked.add(len(batch["x"]))
        return {"twice": 2 * batch["x"], "index": batch["index"]}

    for rows in range(1, 140):
        x = np.arange(3 * rows).reshape(rows, 3)
        found = in_buckets(compute)({"x": x, "index": np.arange(rows)})
        np.testing.assert_array_equal(found["twice"], 2 * x)
        np.testing.assert_array_equal(found["index"], np.arange(rows))
    assert asked == {1, 2, 4, 8, 16, 32}


def test_programs_that_were_not_used_for_long_are_let_go(monkeypatch):
    monkeypatch.setattr(inference, "PROGRAMS", 2)
    traced = []

    def outputs(batch, *, contrastive):
        traced.append(len(batch["x"]))
        return batch["x"]

    compute = compiled(Mesh())
    for rows in (1, 2, 1, 3, 1, 2):  # 2 is let go for 3, 1 is used again and again
        compute(outputs)({"x": np.zeros(rows, np.float32)})
    assert traced == [1, 2, 3, 2] and len(compute) == 2


def test_parameters_are_put_on_a_device_once():
    """NumPy arrays would go there again with every batch."""
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(compiled(Mesh())._params))
