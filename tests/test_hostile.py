"""Files of strangers, mutated by the thousand: weights, cards, locks and bundles are read within their bounds
or refused by our own error: eleven thousand when slow, some hundreds by default. The seeds are fixed; the
last test lets hypothesis look for more."""

import json
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fresh import drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mplug2 import hub, recipes
from mplug2.errors import CardError, Mplug2Error
from mplug2.hub import archive, bundle, lock, release, weights
from mplug2.hub.card import read_card
from mplug2.hub.fit import check_routes

CONSTANT = 1 << 20
"""Bytes that reading may take beyond the file's own size."""

NUMBERS = ("0", "-1", "1", "7", "2147483648", "9223372036854775808", "1e999", "1" + "0" * 400, "NaN")
WORDS = (
    *('""', "null", "true", "[]", "{}", "[[[[[[]]]]]]"),
    *('"\\u0000"', '"../../x"', '"os:system"', '"\\ud800"'),
)


SIZES = (0, -1, 3, 7, 2**31 - 1, 0.5)


def mutated(content: bytes, draw: random.Random, upto: int | None = None) -> bytes:
    """`content` with one to four changes within its first `upto` bytes: a byte, a cut, a repetition, or a
    value of JSON exchanged for a hostile one."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(max(1, min(len(found), upto or len(found))))
        match draw.randrange(5):
            case 0 if found:
                found[at % len(found)] = draw.randrange(256)
            case 1:
                del found[at : at + draw.choice([1, 2, 9, 100])]
            case 2:
                found[at:at] = found[at : at + draw.choice([1, 2, 9, 100])]
            case 3:
                found[at : at + 1] = draw.choice(NUMBERS).encode()
            case 4:  # the next value, whole: numbers and words are where mistakes are
                start = found.find(b":", at) + 1
                end = min((e for e in (found.find(c, start) for c in b",}]") if e > 0), default=start)
                if start:
                    found[start:end] = draw.choice((*NUMBERS, *WORDS)).encode()
    return bytes(found)


def tried(content: bytes, path: Path, read: Callable[[Path], object], watch: bool = False) -> str:
    """Reads `content` as the file `path`: "read" or "refused", and within its bounds; any other error is the
    test's."""
    path.write_bytes(content)
    if watch:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
    try:
        read(path)
        end = "read"
    except Mplug2Error as error:
        assert len(str(error)) < 5000
        end = "refused"
    if watch:
        assert tracemalloc.get_traced_memory()[1] - before < len(content) + CONSTANT
    return end


def many(
    content: bytes,
    count: int,
    path: Path,
    read: Callable[[Path], object],
    *,
    seed: int,
    upto: int | None = None,
) -> Counter[str]:
    """`count` mutations; every tenth is watched for what it allocates."""
    draw, ends = random.Random(seed), Counter()
    tracemalloc.start()
    try:
        for turn in range(count):
            if turn % 500 == 499:
                tracemalloc.stop()
                tracemalloc.start()
            ends[tried(mutated(content, draw, upto), path, read, watch=turn % 10 == 0)] += 1
    finally:
        tracemalloc.stop()
    assert ends.total() == count and ends["refused"] > count / 2
    return ends


share = pytest.mark.parametrize("share", [0.04, pytest.param(1, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A bundle of one network, whole."""
    folder = tmp_path_factory.mktemp("hostile") / "good"
    recipe = recipes.find("image_caption.tiny")
    bundle.write(folder, lock.of(recipe), recipe, drawn(recipe.modules))
    return folder


@share
def test_mutated_weights(share, tmp_path):
    path = tmp_path / "w.safetensors"
    arrays = {f"layer{at}.kernel": np.full((at, 3), at, np.float32) for at in range(5)}
    weights.write(path, arrays | {"scale": np.ones(7, np.float16)}, {"card": "x"})
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")

    def read(path: Path) -> None:
        found = weights.read(path)
        assert sum(array.nbytes for array in found.values()) <= path.stat().st_size

    many(content, int(6000 * share), path, read, seed=1, upto=header)


@share
def test_mutated_cards(share, good, tmp_path):
    content = next(good.glob("vision-*.json")).read_bytes()
    many(content, int(3000 * share), tmp_path / "card.json", read_card, seed=2)


def traced(path: Path) -> None:
    """Whether a card's module fits into a network, as `mplug2 compose` sees it."""
    card = read_card(path)
    check_routes({card.module: card.config}, card.preprocessing)


@share
def test_mutated_cards_are_traced_or_refused(share, good, tmp_path):
    content, draw = json.loads(next(good.glob("universal-*.json")).read_text()), random.Random(6)
    fields = sorted(name for name, value in content["config"].items() if name != "type")
    for _ in range(int(250 * share)):
        config = {draw.choice(fields): draw.choice(SIZES)}
        hostile = json.dumps(content | {"config": content["config"] | config})
        tried(hostile.encode(), tmp_path / "card.json", traced)


@share
def test_mutated_locks(share, good, tmp_path):
    many((good / "lock.json").read_bytes(), int(1000 * share), tmp_path / "a.lock.json", lock.read, seed=3)


@share
def test_mutated_bundles(share, good, tmp_path):
    small = tmp_path / "small"  # without the weights, which have a test of their own
    small.mkdir()
    for path in good.glob("*.json"):
        (small / path.name).write_bytes(path.read_bytes())
    archive.pack(small, tmp_path / "good.tar")
    content = (tmp_path / "good.tar").read_bytes()
    draw, ends = random.Random(4), Counter()
    for turn in range(int(1000 * share)):
        found = bytearray(mutated(content, draw, upto=draw.choice([512, len(content)])))
        if draw.random() < 0.7 and len(found) > 512:  # a right sum, so that what is behind it is tried
            found[148:156] = b"%06o\0 " % (sum(found[:148] + found[156:512]) + 256)
        into = tmp_path / "into" / str(turn)

        def read(path: Path, into: Path = into) -> None:
            archive.unpack(path, into)
            lock.read(into / lock.FILE)
            hub.cards(into)

        ends[tried(bytes(found), tmp_path / "b.tar", read)] += 1
        unpacked = list(into.rglob("*"))
        assert sum(path.stat().st_size for path in unpacked) <= len(found)
        assert all(path.is_file() and path.parent == into for path in unpacked)
    assert ends["refused"] > 500 * share and {path.name for path in tmp_path.iterdir()} == {
        "small",
        "good.tar",
        "b.tar",
        "into",
    }


@pytest.mark.parametrize("read", [read_card, lock.read, release.read], ids=["card", "lock", "release"])
@pytest.mark.parametrize("depth", [25, 320, 900, 100_000])
def test_what_is_nested_too_deeply_is_refused(read, depth, good, tmp_path):
    delta = '{"type": "mplug2.modules.delta:Config", "form": {"type": "mplug2.modules.prompt:Prompt"}, "of": '
    for value in ("[" * depth + "]" * depth, delta * depth + "{}" + "}" * depth):
        for path, fields in ((next(good.glob("vision-*.json")), "config"), (good / lock.FILE, "modules")):
            content = json.loads(path.read_text()) | {fields: {"x": "HERE"}}
            (tmp_path / "deep.json").write_text(json.dumps(content).replace('"HERE"', value))
            with pytest.raises(CardError, match="deep.json: (not JSON|longer than)"):
                read(tmp_path / "deep.json")


@pytest.mark.parametrize("read", [read_card, lock.read, release.read], ids=["card", "lock", "release"])
def test_half_a_character_is_refused(read, good, tmp_path):
    for path, field in ((next(good.glob("vision-*.json")), "source"), (good / lock.FILE, "recipe")):
        content = json.loads(path.read_text()) | {field: "\ud800"}
        (tmp_path / "half.json").write_text(json.dumps(content))
        with pytest.raises(CardError, match="half.json: not JSON .*surrogates not allowed"):
            read(tmp_path / "half.json")


def test_a_file_larger_than_two_gigabytes_has_a_card(good, tmp_path):
    path = next(good.glob("vision-*.json"))
    value = json.loads(path.read_text())
    value["file"]["bytes"] = 5_000_000_000
    (tmp_path / "large.json").write_text(json.dumps(value))
    assert read_card(tmp_path / "large.json").file.bytes == 5_000_000_000
    value["file"]["bytes"] = 2**60
    (tmp_path / "large.json").write_text(json.dumps(value))
    with pytest.raises(CardError, match="file.bytes: is 1152921504606846976, expected a whole number of at"):
        read_card(tmp_path / "large.json")


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_at_any_place_of_a_lock_is_read_or_refused(data, good, tmp_path_factory):
    value = json.loads((good / "lock.json").read_text())
    node = value
    for _ in range(data.draw(st.integers(0, 3))):
        inner = [part for part in node.values() if isinstance(part, dict) and part]
        if not inner:
            break
        node = data.draw(st.sampled_from(inner))
    node[data.draw(st.sampled_from(sorted(node)))] = data.draw(ANY)
    path = tmp_path_factory.getbasetemp() / "any.lock.json"
    tried(json.dumps(value).encode(), path, lock.read)
