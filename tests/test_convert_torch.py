"""Files that PyTorch itself wrote are read without it, number for number, or refused with what they hold.

golden/torch/ was written by torch 2.13.0 (tests/torch_files.py). Where torch is installed (extra `compare`),
it writes them anew, and more.
"""

import importlib.util
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_files
from torch_files import EXPECTED, GOLDEN, KEPT, MODULE, REFUSED

from mplug2.convert.torch_file import read_torch
from mplug2.errors import CheckpointError

# Asked, not tried: a torch that is there takes seconds to import.
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed (pip install mplug2[compare])"
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    import torch  # pyright: ignore[reportMissingImports]

    folder = tmp_path_factory.mktemp("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own old formats
        torch_files.make(torch, folder)
        for name, (write, _) in REFUSED.items():
            write(torch, folder / f"{name}.pth")
    return folder


def assert_read(path: Path) -> None:
    tensors, wrapper = read_torch(path)
    assert wrapper == "model" and tensors.keys() == EXPECTED.keys() | {"brain"}
    for name, expected in EXPECTED.items():
        read = tensors[name].read()
        assert (read.dtype, read.shape) == (expected.dtype, expected.shape), name
        assert np.array_equal(read, expected), name
        blocks = [np.atleast_1d(block) for block in tensors[name].blocks()]
        if blocks:
            assert np.array_equal(np.concatenate(blocks), np.atleast_1d(expected)), name
    brain = tensors["brain"].read()
    assert brain.dtype == ml_dtypes.bfloat16
    assert np.array_equal(brain, EXPECTED["half"].astype(ml_dtypes.bfloat16))
    assert tensors["tied"] == tensors["0.weight"]  # one place of the file


def assert_scripted(path: Path) -> None:
    tensors, wrapper = read_torch(path)
    assert wrapper == "" and tensors.keys() == MODULE.keys()
    assert all(np.array_equal(tensors[name].read(), MODULE[name]) for name in MODULE)


def test_a_state_dict_beside_an_optimizer_is_read_number_for_number():
    assert_read(GOLDEN / "state.pth")


def test_a_scripted_archive_is_read_and_its_compressed_code_left_alone():
    assert_scripted(GOLDEN / "scripted.pt")


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_state_dict_is_refused_by_name(name):
    with pytest.raises(CheckpointError, match=REFUSED[name][1]):
        read_torch(GOLDEN / f"{name}.pth")


@needs_torch
def test_what_torch_writes_today_is_read_alike(fresh):
    assert_read(fresh / "state.pth")
    assert_scripted(fresh / "scripted.pt")


@needs_torch
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_writes_today_is_refused_alike(fresh, name):
    with pytest.raises(CheckpointError, match=REFUSED[name][1]):
        read_torch(fresh / f"{name}.pth")


@needs_torch
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_torch_is_read(tmp_path, protocol):
    import torch  # pyright: ignore[reportMissingImports]

    torch.save({"a": torch.arange(3.0)}, tmp_path / "x.pth", pickle_protocol=protocol)
    assert read_torch(tmp_path / "x.pth")[0]["a"].read().tolist() == [0, 1, 2]
