"""Weights files: what is written comes back, by copy of nothing; what is malformed is refused by our own
error."""

import json
import os
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mplug2.errors import CardError
from mplug2.hub import weights

ARRAYS = {
    "stem.kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "norm.scale": np.ones(5, weights.BFLOAT16),
    "temperature": np.array(0.07, np.float16),
}


def file_of(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    weights.write(path, ARRAYS, {"card": "x"})
    return path


def test_arrays_come_back_bit_for_bit_in_their_own_types(good):
    found = weights.read(good)
    assert set(found) == set(ARRAYS)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_the_reference_library_reads_what_we_write(good):
    for name, array in load_file(good).items():
        np.testing.assert_array_equal(np.asarray(array, np.float32), ARRAYS[name].astype(np.float32))


def test_we_read_what_the_reference_library_writes(tmp_path):
    arrays = {"ids": np.arange(3), "mask": np.array([True, False]), "empty": np.zeros((0, 4), np.float32)}
    save_file(arrays, tmp_path / "theirs.safetensors")
    found = weights.read(tmp_path / "theirs.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_reading_copies_nothing_and_cannot_change_the_file(tmp_path):
    path = tmp_path / "large.safetensors"
    weights.write(path, {"kernel": np.ones((8, 1 << 20), np.float32)})
    tracemalloc.start()
    kernel = weights.read(path)["kernel"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert not kernel.flags.owndata and not kernel.flags.writeable
    assert kernel.ctypes.data % 64 == 0


def test_the_same_arrays_give_the_same_file(tmp_path):
    one = weights.write(tmp_path / "one", ARRAYS)
    other = weights.write(tmp_path / "other", dict(reversed(ARRAYS.items())))
    assert one == other
    assert one[1] == (tmp_path / "one").stat().st_size


def test_arrays_that_are_not_contiguous_are_written_as_they_read(tmp_path):
    weights.write(tmp_path / "t", {"t": ARRAYS["stem.kernel"].T})
    np.testing.assert_array_equal(weights.read(tmp_path / "t")["t"], ARRAYS["stem.kernel"].T)


def test_another_hash_is_refused_with_both(good):
    with pytest.raises(CardError, match=f"sha256 is [0-9a-f]{{64}}, the card says {'0' * 64}"):
        weights.read(good, "0" * 64)


def test_a_type_that_weights_do_not_have_is_refused(tmp_path):
    with pytest.raises(CardError, match="array 'ids' has dtype int64"):
        weights.write(tmp_path / "x", {"ids": np.arange(3)})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file_and_nothing_else(good, monkeypatch):
    before = good.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CardError, match="cannot be written .No space left on device."):
        weights.write(good, {"other": np.ones(3, np.float32)})
    assert good.read_bytes() == before
    assert list(good.parent.iterdir()) == [good]


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CardError, match="no such weights file"):
            weights.read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it has 0 bytes"),
        (b"\xff" * 8, "does not fit"),
        ((1 << 20).to_bytes(8, "little") + b"{}", "does not fit"),
        (file_of(b"\xff{}"), "not JSON"),
        (file_of(b"{"), "not JSON"),
        (file_of(b"[" * 90_000), "not JSON"),
        (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (file_of([]), "not a JSON object"),
        (file_of(b'{"a": 1, "a": 2}'), "occurs twice"),
        (file_of({"a": 3}), "not described by"),
        (file_of({"a": entry() | {"code": "x"}}, bytes(8)), "not described by"),
        (file_of({"a": entry("F33")}, bytes(8)), "dtype 'F33', known are .* .did you mean \"F32\""),
        (file_of({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
        (file_of({"a": entry(shape=(2.0,))}, bytes(8)), "shape"),
        (file_of({"a": entry(shape=(True, 2))}, bytes(8)), "shape"),
        (file_of({"a": entry(shape=(1,) * 33)}, bytes(4)), "shape"),
        (file_of({"a": entry(shape=(0, 10**30), offsets=(0, 0))}), "shape"),
        (file_of({"a": entry(shape=(0, 2**39, 2**39), offsets=(0, 0))}), "shape"),
        (file_of({"a": entry(offsets=(0,))}, bytes(8)), "data_offsets"),
        (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), "data_offsets"),
        (file_of({"a": entry(shape=(3,))}, bytes(8)), "takes 12 bytes"),
        (file_of({"a": entry()}, bytes(4)), "ends at byte 8 of 4"),
        (file_of({"a": entry()}, bytes(12)), "arrays take 8 bytes, the file has 12"),
        (file_of({"a": entry(offsets=(4, 12))}, bytes(12)), "begins at byte 4"),
        (file_of({"a": entry(), "b": entry()}, bytes(8)), "begins at byte 0, the one before it ends at 8"),
    ],
)
def test_a_malformed_file_is_refused_with_its_reason(content, said, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CardError, match=said):
        weights.read(path)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four bytes changed, a piece cut out, repeated or exchanged for a number; mostly in the
    header."""
    header = 8 + int.from_bytes(content[:8], "little")
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(len(found), header) if rng.random() < 0.9 else len(found))
        match rng.randrange(4):
            case 0:
                found[at] = rng.randrange(256)
            case 1:
                del found[at : at + rng.randint(1, 9)]
            case 2:
                found[at:at] = found[at : at + rng.randint(1, 9)]
            case 3:
                found[at : at + 1] = str(rng.choice([0, -1, 1, 2**31, 2**63, 10**20])).encode()
        if not found:
            break
    return bytes(found)


def read_or_refuse(path, size: int) -> None:
    try:
        arrays = weights.read(path)
    except CardError:
        return
    assert sum(array.nbytes for array in arrays.values()) <= size


def test_mutated_files_are_read_within_their_bounds_or_refused(good, tmp_path):
    rng, content = random.Random(2), good.read_bytes()
    path = tmp_path / "mutated"
    for _ in range(600):
        changed = mutated(content, rng)
        path.write_bytes(changed)
        read_or_refuse(path, len(changed))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["F32", "BF16", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
SIZES = st.lists(st.integers(-1, 2**70) | st.integers(0, 4), max_size=4)
ENTRIES = st.fixed_dictionaries({"dtype": JSON, "shape": SIZES | JSON, "data_offsets": SIZES | JSON})


@settings(max_examples=200, deadline=None)
@given(
    header=st.dictionaries(st.text(max_size=4), ENTRIES | JSON, max_size=4) | JSON,
    data=st.binary(max_size=32),
)
def test_any_header_is_read_within_its_bounds_or_refused(header, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(file_of(header, data))
    read_or_refuse(path, len(data))
