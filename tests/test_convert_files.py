"""PyTorch's files are read without PyTorch, tensors only, and hostile ones are refused with a reason."""

import random
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_writer import rebuilt, save, write

from mplug2.convert import pickles
from mplug2.convert.tensors import read_safetensors, same
from mplug2.convert.torch_file import read_torch
from mplug2.errors import CheckpointError

FLOAT = np.arange(12, dtype="f4").reshape(3, 4)


def tensor(count=12, offset=0, shape=(3, 4), strides=(4, 1), key="0"):
    return rebuilt("f4", key, count, offset, shape, strides)


def pickled(*instructions: bytes) -> bytes:
    return b"\x80\x02}(X\x01\x00\x00\x00w" + b"".join(instructions) + b"u."


# --- what is read


@pytest.mark.parametrize("dtype", ["f4", "f2", ml_dtypes.bfloat16, "f8", "i8"])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    array = np.random.default_rng(0).normal(size=(5, 3)).astype(dtype)
    tensors, wrapper = read_torch(save(tmp_path / "x.pth", {"a.weight": array, "b": array[0].copy()}))
    assert wrapper == "" and list(tensors) == ["a.weight", "b"]
    assert (
        tensors["a.weight"].dtype == array.dtype and tensors["a.weight"].read().tobytes() == array.tobytes()
    )
    assert tensors["a.weight"].read(1, 3).tobytes() == array[1:3].tobytes()


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_wrappers_and_the_prefix_of_parallel_training_are_taken_off(tmp_path, wrapper):
    path = save(
        tmp_path / "x.pth",
        {wrapper: {"module.a": FLOAT, "module.b": FLOAT}, "epoch": 3, "config": {"eos": "x"}},
    )
    tensors, found = read_torch(path)
    assert found == wrapper and sorted(tensors) == ["a", "b"]
    assert (
        same(tensors["a"], tensors["b"]) and tensors["a"] == tensors["b"]
    )  # one storage: nothing to compare


def test_views_with_offsets_and_turned_axes_are_read_as_such(tmp_path):
    views = {"row": FLOAT[1], "turned": FLOAT.T, "part": FLOAT[1:, 1:3], "number": FLOAT[2, 3:4].reshape(())}
    tensors, _ = read_torch(save(tmp_path / "x.pth", {name: view for name, view in views.items()}))
    for name, view in views.items():
        assert np.array_equal(tensors[name].read(), view)
        assert np.array_equal(
            np.concatenate([np.atleast_1d(block) for block in tensors[name].blocks()]), np.atleast_1d(view)
        )
    assert np.array_equal(tensors["turned"].read(1, 3), FLOAT.T[1:3])


def test_a_scripted_archive_gives_its_modules_tensors(tmp_path):
    """OpenAI's CLIP is a TorchScript archive: objects of generated classes, whose code is never run."""
    inner = (
        b"c__torch__.Part\nPart\n)\x81}(X\x06\x00\x00\x00weight"
        + tensor()
        + b"X\x08\x00\x00\x00training\x89ub"
    )
    outer = b"\x80\x02c__torch__.Model\nModel\n)\x81}(X\x06\x00\x00\x00visual" + inner + b"ub."
    tensors, _ = read_torch(write(tmp_path / "x.pt", outer, {"0": FLOAT}))
    assert list(tensors) == ["visual.weight"] and np.array_equal(tensors["visual.weight"].read(), FLOAT)


def test_safetensors_are_read_where_they_lie(tmp_path):
    save_file({"a": FLOAT, "b": np.arange(3)}, tmp_path / "x.safetensors")
    tensors = read_safetensors(tmp_path / "x.safetensors")
    assert np.array_equal(tensors["a"].read(), FLOAT) and np.array_equal(tensors["b"].read(1, 2), [1])


# --- what is refused


def refuses(path, reason):
    with pytest.raises(CheckpointError, match=reason) as refusal:
        read_torch(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_pickle_that_calls_the_system_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "was-here"
    command = f"touch {mark}".encode()
    call = b"cos\nsystem\n(X" + len(command).to_bytes(4, "little") + command + b"tR"
    refuses(write(tmp_path / "x.pth", pickled(call)), r"asks for os\.system")
    stacked = b"\x8c\x05posix\x8c\x06system\x93(X" + len(command).to_bytes(4, "little") + command + b"tR"
    refuses(write(tmp_path / "y.pth", pickled(stacked)), r"asks for posix\.system")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        (b"c__builtin__\neval\n", r"asks for __builtin__\.eval"),
        (b"ctorch\nload\n", r"asks for torch\.load"),
        (b"ctorch.FloatStorage\nx\n", "asks for torch.FloatStorage.x"),
        (b"ctorch\nFloatStorage\n)R", "calls torch.FloatStorage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81", "makes an object"),
        (b"(i__main__\nX\n", "uses the instruction INST"),
        (b"\x82\x01", "uses the instruction EXT1"),
        (b"N}b", "sets the state of"),
        (b"}N\x85Ns", "a key of type tuple"),
        (b"h\x07", "its pickle is broken"),
        (b"R", "its pickle calls a Mark"),
        (b"t", "its pickle is broken"),
    ],
)
def test_other_programs_in_a_pickle_are_refused_by_name(tmp_path, instructions, reason):
    refuses(write(tmp_path / "x.pth", pickled(instructions)), reason)


@pytest.mark.parametrize(
    ("described", "storage", "reason"),
    [
        (tensor(count=13), FLOAT, "should have 52 bytes, the file has 48"),
        (tensor(count=-1), FLOAT, "should have -4 bytes"),
        (tensor(offset=1), FLOAT, "needs more than the 12 numbers"),
        (tensor(shape=(3, 5)), FLOAT, "needs more"),
        (tensor(shape=(10**9, 4), strides=(0, 1)), FLOAT, "needs more"),
        (tensor(shape=(3, 4), strides=(-4, 1)), FLOAT, "strides"),
        (tensor(shape=(2**60,), strides=(1,)), FLOAT, "shape"),
        (tensor(key="../0"), FLOAT, "is not in the archive"),
        (tensor(key="7"), FLOAT, "is not in the archive"),
    ],
)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(tmp_path, described, storage, reason):
    refuses(write(tmp_path / "x.pth", pickled(described), {"0": storage}), reason)


def test_a_compressed_archive_a_bomb_is_refused_before_it_is_opened(tmp_path):
    bomb = write(
        tmp_path / "x.pth",
        pickled(tensor(count=1 << 24)),
        {"0": bytes(1 << 26)},
        compression=zipfile.ZIP_DEFLATED,
    )
    assert bomb.stat().st_size < 1 << 17
    refuses(bomb, "is compressed")


def test_compressed_code_is_no_bomb_for_it_stays_packed(tmp_path):
    """TorchScript archives compress their code, which is never needed; a storage cannot hide among it."""
    path = write(tmp_path / "x.pt", pickled(tensor()), {"0": FLOAT})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/code/x.py", bytes(1 << 26), zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    tensors, _ = read_torch(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert np.array_equal(tensors["w"].read(), FLOAT)
    refuses(
        write(tmp_path / "y.pt", pickled(tensor(key="../code/x.py")), {"../code/x.py": FLOAT}), "leads out"
    )
    refuses(write(tmp_path / "z.pt", pickled(tensor(key="code")), {"code": FLOAT}), "is not in the archive")


def test_a_tensor_that_repeats_its_numbers_is_read_where_it_is_small(tmp_path):
    """`expand` gives strides of 0; without a bound, a few bytes would be converted to a full disk."""
    described = tensor(count=3, shape=(3, 1 << 10), strides=(1, 0))
    few = np.arange(3, dtype="f4")
    tensors, _ = read_torch(write(tmp_path / "x.pth", pickled(described), {"0": few}))
    assert np.array_equal(tensors["w"].read(), np.repeat(few[:, None], 1 << 10, axis=1))
    described = tensor(count=3, shape=(3, 1 << 17), strides=(1, 0))
    refuses(write(tmp_path / "y.pth", pickled(described), {"0": few}), "needs more than the 3 numbers")


def test_a_file_that_unfolds_by_many_small_repeats_is_refused(tmp_path):
    one = tensor(count=1, shape=(256, 1024), strides=(0, 0))  # 1 MiB, as `expand` shows one number
    more = [b"X\x02\x00\x00\x00" + f"w{number}".encode() + one for number in range(8)]
    content = pickled(one, *more)
    refuses(write(tmp_path / "x.pth", content, {"0": np.ones(1, "f4")}), "unfold to 9437184 bytes")


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path):
    whole = save(tmp_path / "x.pth", {"a": FLOAT}).read_bytes()
    for end in range(0, len(whole), 7):
        path = tmp_path / "cut.pth"
        path.write_bytes(whole[:end])
        refuses(path, "refused")


def test_entries_over_one_another_are_refused(tmp_path):
    data = bytearray(write(tmp_path / "x.pth", pickled(tensor()), {"0": FLOAT, "1": FLOAT}).read_bytes())
    first, second = (
        data.index(name, data.index(b"PK\x01\x02")) for name in (b"archive/data/0", b"archive/data/1")
    )
    data[second - 4 : second] = data[
        first - 4 : first
    ]  # both entries of the directory lie at the first one's place
    (tmp_path / "y.pth").write_bytes(data)
    refuses(tmp_path / "y.pth", "over another one")


@pytest.mark.parametrize("key", ["../up", "a/b", "a\\b", "a\x00b", ""])
def test_keys_that_are_no_names_of_parameters_are_refused(tmp_path, key):
    refuses(save(tmp_path / "x.pth", {key: FLOAT}), "no names of parameters")


def test_entries_that_lead_out_of_the_archive_are_refused(tmp_path):
    refuses(save(tmp_path / "x.pth", {"a": FLOAT}, root="../archive"), "leads out")


def test_other_files_are_refused_with_what_they_are(tmp_path):
    for name, data, reason in (
        ("legacy.pth", bytes.fromhex("80028a0a6cfc9c46f920") + bytes(90), "legacy format"),
        ("text.pth", b"hello", "not a torch checkpoint"),
        ("empty.pth", b"", "not a torch checkpoint"),
    ):
        (tmp_path / name).write_bytes(data)
        refuses(tmp_path / name, reason)
    refuses(write(tmp_path / "no.pth", b"\x80\x02}."), "holds no tensors")


def test_modules_that_hold_one_another_are_refused(tmp_path):
    loop = b"\x80\x02c__torch__.M\nM\n)\x81q\x00}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ub."
    refuses(write(tmp_path / "x.pt", loop), "hold one another")


def test_two_thousand_mutated_pickles_never_do_more_than_be_refused():
    chance, good = random.Random(0), pickled(tensor(), b"X\x01\x00\x00\x00b", tensor(shape=(2, 2)))
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            pickles.unpickle(bytes(data))
        except CheckpointError:
            pass
