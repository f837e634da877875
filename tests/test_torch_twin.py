"""The PyTorch twin, which timings compare with, computes what the zoo computes: loss, gradients, a step of
AdamW, captions. Needs PyTorch (the extra `compare`)."""

from dataclasses import replace

import jax
import pytest

from mplug2.modules import decoder, temporal, universal, vision
from mplug2.network import Network

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch==2.13.0")

from compare_torch import BEGIN, END, Ours, Theirs, work  # noqa: E402  they import torch
from torch_twin import Twin  # noqa: E402


@pytest.fixture(scope="module")
def network():
    configs = {
        "vision": replace(vision.tiny(), stem=vision.Patches(patch=8)),
        "temporal": temporal.tiny(),
        "universal": universal.tiny(),
        "decoder": decoder.tiny(),
    }
    return Network(configs)


@pytest.fixture(scope="module")
def params(network):
    """Every parameter counts: what begins at zero is moved away from it."""
    fresh = jax.jit(network.init)(0)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(fresh))))
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), fresh)


@pytest.fixture(scope="module")
def batch(network):
    return work(network.configs, batch=2, frames=3, words=5)


def test_losses_and_the_parameters_after_two_steps_agree(network, params, batch):
    ours = Ours(network, params, batch, dropout=False)
    theirs = Theirs(network, params, batch, dropout=False)
    before = {name: parameter.detach().clone() for name, parameter in theirs.twin.named_parameters()}
    for _ in range(2):
        assert ours.step() == pytest.approx(theirs.step(), abs=1e-5)
    moved = Twin(network.configs)
    moved.load(ours.state["params"])
    for name, parameter in moved.named_parameters():
        if name.endswith("key.bias"):  # its gradient is zero but for rounding, of which Adam makes full steps
            continue
        expected = theirs.twin.get_parameter(name)
        torch.testing.assert_close(
            parameter, expected, atol=3e-4, rtol=0, msg=lambda said, name=name: name + said
        )
        assert not torch.equal(expected, before[name]), name


def test_captions_agree_id_for_id(network, params, batch):
    ours, theirs = (side(network, params, batch, dropout=False).captions(length=6) for side in (Ours, Theirs))
    assert ours.tolist() == theirs.tolist() and ours.shape == (2, 6) and not {0, BEGIN, END} & {*ours.flat}
