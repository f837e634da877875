"""Loading onto devices: the values are the file's, the host holds no copy, and each device is given its own
slice."""

import dataclasses
import tracemalloc
from typing import Any

import jax
import numpy as np
import pytest
from fresh import drawn
from jax.sharding import NamedSharding, PartitionSpec

from mplug2 import benchmark_load, hub
from mplug2.data.pixels import Preprocessing
from mplug2.data.tokens import SentencePiece
from mplug2.errors import CardError
from mplug2.hub import bundle, lock, placing, publishing, weights
from mplug2.hub.card_tokenizer import tokens_of
from mplug2.hub.placing import on_first_device, place
from mplug2.modules import decoder, heads, text, universal, vision
from mplug2.network import Network, flat
from mplug2.predict import Predictor
from mplug2.recipes import image_caption
from mplug2.run import open_run
from mplug2.sharding import Mesh
from mplug2.step import Trainer
from mplug2.tools import evaluate
from mplug2.tools.predict import open_predictor


@pytest.fixture(params=["host", "accelerator"])
def memory(request, monkeypatch):
    """Whose memory the devices have, as far as placing is told."""
    monkeypatch.setattr(placing, "lie_on_host", lambda where: request.param == "host")
    return request.param


class Watched:
    """A matrix that notes which slices of it are read."""

    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.read = array, array.shape, []

    def __getitem__(self, index):
        self.read.append(self.array[index].size)
        return self.array[index]


@pytest.mark.parametrize("dtype", list(weights.FLOATS))
def test_placed_arrays_are_the_files_as_float32(dtype, memory, tmp_path):
    drawn = np.random.default_rng(0).random((3, 5), np.float32).astype(weights.FLOATS[dtype])
    weights.write(tmp_path / "w", {"kernel": drawn, "scale": drawn[0, :1].reshape(())})
    arrays = weights.read(tmp_path / "w")
    placed = place(arrays, on_first_device(arrays))
    for name, array in arrays.items():
        assert placed[name].dtype == np.float32 and placed[name].shape == array.shape
        np.testing.assert_array_equal(placed[name], array.astype(np.float32))


@pytest.mark.parametrize("dtype", list(weights.FLOATS))
def test_an_accelerators_host_holds_no_copy(dtype, monkeypatch, tmp_path):
    monkeypatch.setattr(placing, "lie_on_host", lambda where: False)
    weights.write(tmp_path / "w", {"kernel": np.ones((4, 1 << 20), weights.FLOATS[dtype])})
    arrays = weights.read(tmp_path / "w")
    place(arrays, on_first_device(arrays))  # what compiling allocates is not what is measured
    tracemalloc.start()
    jax.block_until_ready(place(arrays, on_first_device(arrays)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_on_a_cpu_the_arrays_are_the_mapped_file_itself(tmp_path):
    weights.write(tmp_path / "w", {"kernel": np.ones((4, 1 << 10), np.float32)})
    arrays = weights.read(tmp_path / "w")
    placed = place(arrays, on_first_device(arrays))
    assert placed["kernel"].unsafe_buffer_pointer() == arrays["kernel"].ctypes.data


@pytest.mark.devices(8)
def test_each_device_reads_its_own_slice_and_nothing_else():
    mesh = Mesh(fsdp=2, tensor=4).build()
    watched = Watched(np.arange(8 * 16, dtype=np.float32).reshape(8, 16))
    placed = place({"w": watched}, {"w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))})["w"]  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(placed, watched.array)
    assert watched.read == [16] * 8


@pytest.mark.devices(8)
@pytest.mark.parametrize("verify", [True, False])
def test_a_module_lies_on_a_mesh_as_training_has_it(verify, memory, tmp_path):
    config = decoder.tiny()
    params = Network({"decoder": config}).init(0)["decoder"]
    card = publishing.publish(tmp_path, "d", "decoder", config, params, dtype="bfloat16")
    loaded = hub.load_onto(card, Mesh(fsdp=2, tensor=4).build(), verify=verify)
    for (name, one), other in zip(flat(hub.load(card)[1]).items(), flat(loaded).values(), strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
        assert other.dtype == np.float32
    assert max(len(array.sharding.device_set) for array in flat(loaded).values()) == 8
    assert not all(array.is_fully_replicated for array in flat(loaded).values())


def on_devices(params: Any) -> list[int]:
    """On how many devices arrays lie in parts."""
    arrays = flat(params).values()
    return sorted({len(array.sharding.device_set) for array in arrays if not array.is_fully_replicated})


@pytest.mark.devices(8)
def test_cards_say_on_a_mesh_what_they_say_on_one_device(tmp_path):
    modules = {
        "vision": vision.tiny(),
        "text": dataclasses.replace(text.tiny(), vocabulary=SentencePiece().size),
        "universal": universal.tiny(),
        "contrastive": heads.ContrastiveConfig(width=32, space=16),
    }
    params = jax.tree.map(lambda leaf: np.float32(leaf / 5), drawn(modules))
    stated = {"vision": {"preprocessing": Preprocessing()}, "text": {"tokenizer": tokens_of(SentencePiece())}}
    for module, config in modules.items():
        publishing.publish(tmp_path, module, module, config, params[module], **stated.get(module, {}))
    clips = np.random.default_rng(1).integers(0, 256, (4, 1, 32, 32, 3), np.uint8)
    asked = clips, ["two", "red seven"], ["a {}"]
    spread = Predictor.of(tmp_path, mesh=Mesh(fsdp=2, tensor=2))
    assert on_devices(spread.params) == [4]
    whole = jax.device_get(spread.params)
    on_one = Predictor(spread.network, whole, spread.tokenizer, spread.preprocessing).classify(*asked)
    assert np.ptp(on_one) > 1e-3
    np.testing.assert_allclose(spread.classify(*asked), on_one, rtol=1e-4)  # float32, sums in another order
    recipe, _, params, _ = evaluate.opened([str(tmp_path)], ["mesh.fsdp=4"])
    assert recipe.mesh == Mesh(fsdp=4) and on_devices(params) == [4]


@pytest.mark.devices(8)
def test_bundles_and_runs_are_opened_on_the_mesh_that_is_asked_for(tmp_path, monkeypatch):
    recipe = image_caption.tiny()
    bundle.write(tmp_path / "bundle", lock.of(recipe, recipe.name), recipe, drawn(recipe.modules))
    predictor = open_predictor([str(tmp_path / "bundle")], mesh=Mesh(fsdp=2))
    assert on_devices(predictor.params) == [2]
    found, _, params, _ = evaluate.opened([str(tmp_path / "bundle")], ["mesh.tensor=2"])
    assert found.mesh == Mesh(tensor=2) and on_devices(params) == [2]
    own = dataclasses.replace(recipe, mesh=Mesh(fsdp=4))
    open_run(tmp_path / "run", own)
    asked = []
    monkeypatch.setattr("mplug2.tools.predict.restore", lambda _, told: asked.append(told.mesh) or 1 / 0)
    for mesh in (None, Mesh(tensor=2)):
        with pytest.raises(ZeroDivisionError):
            open_predictor([str(tmp_path / "run")], mesh=mesh)
    assert asked == [Mesh(fsdp=4), Mesh(tensor=2)]


@pytest.mark.devices(8)
def test_what_a_recipe_loads_lies_on_its_mesh_and_goes_into_the_state_from_there(tmp_path):
    whole = image_caption.tiny()
    fresh = jax.jit(Network(whole.modules).init, static_argnums=0)(0)
    for name, config in whole.modules.items():
        publishing.publish(tmp_path, name, name, config, fresh[name], dtype="bfloat16")
    recipe = dataclasses.replace(
        whole,
        modes=dict.fromkeys(whole.modules, "full") | {"vision": "frozen"},
        cards=dict.fromkeys(whole.modules, str(tmp_path)),
        mesh=Mesh(fsdp=4, tensor=2),
    )
    network, params, _ = hub.assemble(recipe)
    trainer = Trainer(recipe, network)
    state = {**trainer.begin(params)["params"], **trainer.place_frozen(params)}
    for name in whole.modules:
        found, placed = flat(params[name]), flat(state[name])
        assert found.keys() == placed.keys()
        for key in found:
            assert found[key].sharding == placed[key].sharding
            np.testing.assert_array_equal(found[key], placed[key])
        assert not all(array.is_fully_replicated for array in found.values())


def test_a_file_of_another_config_is_not_placed(tmp_path):
    config = decoder.tiny()
    params = Network({"decoder": config}).init(0)["decoder"]
    card = publishing.publish(tmp_path, "d", "decoder", config, params)
    other = dataclasses.replace(card, config=dataclasses.replace(config, depth=config.depth + 1))
    with pytest.raises(CardError, match="of another shape"):
        hub.load_onto(other, Mesh().build())


def test_bench_load_times_every_way_on_the_same_arrays(tmp_path):
    report = benchmark_load.measure_load(tmp_path, 20_000_000, repeats=2)
    assert len(report.ways) == 4 and report.bytes > 16_000_000
    for way in report.ways:
        assert len(way.opened) == 2 and all(a <= b for a, b in zip(way.opened, way.used, strict=True))
    assert len(report.cached) == 2
    assert set(benchmark_load.as_json(report)) == {"bytes", "ways", "disk", "cached"}
