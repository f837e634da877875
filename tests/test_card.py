"""Cards: JSON and back, every field checked, and no code of a stranger's run while reading."""

import copy
import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError
from mplug2.hub import card as cards
from mplug2.hub.card import Card, File, Score, Tokens, Trained, read_card
from mplug2.hub.typed_json import decode, encode
from mplug2.modules import decoder, fusion, heads, temporal, text, universal, vision
from mplug2.roles import Config

SCHEMA = json.loads((Path(__file__).parent.parent / "checkpoints" / "card.schema.json").read_text())


def card_of(module: str = "vision", config: Config | None = None, **more) -> Card:
    config = config or vision.tiny()
    fields = {
        "name": f"{module}-tiny",
        "file": File(
            path=f"{module}-tiny.safetensors", sha256="a" * 64, bytes=10, urls=("https://example.org/a",)
        ),
        "interface": cards.interface(module, config, "bfloat16"),
        "licence": "Apache-2.0",
        "trained": Trained(
            recipe="pretrain.tiny", commit="1c4be24", steps=5, seed=0, data="handwriting", machine="2 cores"
        ),
        "scores": {"image_caption": Score(metric="exact match", value=0.9, low=0.88, high=0.92, n=1000)},
        "preprocessing": Preprocessing(),
        "tokenizer": Tokens(file="handwriting.model", sha256="b" * 64, ids={"pad": 0, "size": 96}),
    }
    return Card(module=module, config=config, **fields | more)


@pytest.fixture
def example(tmp_path) -> dict:
    return json.loads(dataclasses.replace(card_of(), folder=tmp_path).write().read_text())


def refusal(value: object, tmp_path: Path) -> str:
    path = tmp_path / "strange.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(CardError) as refused:
        read_card(path)
    said = str(refused.value)
    assert said.startswith(f"card {path}: ") and "\n" not in said
    return said.removeprefix(f"card {path}: ")


def changed(value: dict, path: str, part: object) -> dict:
    whole = node = copy.deepcopy(value)
    *parents, last = path.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = part
    return whole


@pytest.mark.parametrize(
    ("module", "config"),
    [
        ("vision", vision.tiny()),
        ("vision", vision.large()),
        ("temporal", temporal.tiny()),
        ("text", text.base()),
        ("universal", universal.small()),
        ("fusion", dataclasses.replace(fusion.base(), connected_at=(0, 2))),
        ("decoder", decoder.tiny()),
        ("contrastive", heads.ContrastiveConfig(width=32, space=16)),
        ("unmasker", heads.UnmaskerConfig(width=32, vocabulary=96)),
    ],
)
def test_a_card_comes_back_as_it_was_written_and_fits_the_schema(module, config, tmp_path):
    card = card_of(module, config, folder=tmp_path)
    path = card.write()
    assert read_card(path) == card
    assert read_card(path).weights == tmp_path / card.file.path
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)


def test_the_schema_has_exactly_the_fields_of_the_dataclasses():
    parts = {
        "file": File,
        "trained": Trained,
        "interface": cards.Interface,
        "tokenizer": Tokens,
        "questions": cards.Questions,
    }
    parts = {SCHEMA["$defs"][name]["title"]: (SCHEMA["$defs"][name], kind) for name, kind in parts.items()}
    parts |= {"card": (SCHEMA, Card), "score": (SCHEMA["$defs"]["score"], Score)}
    parts |= {"parents": (SCHEMA["$defs"]["parents"], cards.Parents)}
    parts |= {"parent": (SCHEMA["$defs"]["parent"], cards.Parent)}
    for schema, kind in parts.values():
        fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "folder"}
        missing = dataclasses.MISSING
        required = {name for name, f in fields.items() if f.default is f.default_factory is missing}
        assert set(schema["properties"]) == set(fields)
        assert set(schema["required"]) == required
        assert schema["additionalProperties"] is False


def test_what_a_card_leaves_out_is_the_default(example, tmp_path):
    for name in ("trained", "scores", "preprocessing", "tokenizer"):
        del example[name]
    path = tmp_path / "card.json"
    path.write_text(json.dumps(example))
    assert read_card(path).tokenizer is None and read_card(path).scores == {}


@pytest.mark.parametrize(
    ("path", "part", "said"),
    [
        ("tokenizer.kind", "os:system", "tokenizer.kind: is 'os:system', expected one of"),
        ("tokenizer.kind", [], "tokenizer.kind: is .., expected one of"),
        ("tokenizer.lowercase", True, "tokenizer.lowercase: is True, expected nothing, for sentencepiece"),
        ("tokenizer.prompt", "a video of", "tokenizer.prompt: is 'a video of', expected nothing"),
        ("tokenizer.prompt", 3, "tokenizer.prompt: is 3, expected a text"),
        ("naem", "x", 'naem: no such field, known are .*did you mean "name"'),
        ("name", "../evil", "name: is '../evil', expected a plain file name"),
        ("module", "vision tower", "module: is 'vision tower'"),
        ("licence", "", "licence: is '', expected an SPDX name"),
        ("config.widht", 3, 'config.widht: no such field, .*did you mean "width"'),
        ("config.width", "32", "config.width: is '32', expected a whole number"),
        ("config.width", True, "config.width: is True, expected a whole number"),
        ("config.width", 10**12, "config.width: is 10+, expected a whole number of 32 bits"),
        (
            "config.width",
            33,
            "config: Config refuses these values .vision: width 33 does not divide into 2 heads",
        ),
        ("config.width", 64, "interface.width: is 32, expected 64, as the config has it"),
        ("config.heads", 0, "config: Config refuses these values"),
        ("config.image", [32], "config.image: is .32., expected 2 values"),
        ("config.image", [32, 3.5], r"config.image\[1\]: is 3.5"),
        ("config.stem.type", "mplug2.modules.vision:Config", "config.stem.type: is .*, expected one of"),
        ("config.stem.type", "mplug2.modules.vision:Patchs", 'config.stem.type: is .*did you mean "Patches"'),
        ("config.type", "mplug2.modules.visoin:Config", 'config.type: is .*did you mean "vision"'),
        ("config.drop_path", None, "config.drop_path: is None, expected a finite number"),
        ("file.path", "/etc/passwd", "file.path: is '/etc/passwd', expected a plain file name"),
        ("file.path", "../x.safetensors", "file.path: is"),
        ("file.sha256", "A" * 64, "file.sha256: is"),
        ("file.bytes", 0, "file.bytes: is 0, expected a positive number"),
        ("file.urls", ["ftp://a"], "file.urls: is 'ftp://a', expected addresses"),
        ("file", None, "file: is None, expected an object"),
        ("interface.dtype", "bfloat61", 'interface.dtype: is .*did you mean "bfloat16"'),
        ("interface.reads", "clips", "interface.reads: is 'clips', expected a list"),
        (
            "scores.image_caption.low",
            2.0,
            "scores.image_caption.low: is 2.0, expected at most high, 0.92",
        ),
        ("scores.image_caption.n", 0, "scores.image_caption.n: is 0"),
        (
            "scores.image_caption.high",
            1e300,
            "scores.image_caption.high: is 1e.300, expected a finite number",
        ),
        ("trained.steps", -1, "trained.steps: is -1"),
        ("tokenizer.ids", {"pad": 1}, "tokenizer.ids: is {'pad': 1}, expected a table in which pad is 0"),
        ("tokenizer.file", "a/b", "tokenizer.file: is 'a/b'"),
    ],
)
def test_a_wrong_field_is_refused_by_name_with_both_sides(path, part, said, example, tmp_path):
    assert re.match(said, refusal(changed(example, path, part), tmp_path))


@pytest.mark.parametrize("field", ["name", "module", "config", "file", "interface", "licence"])
def test_a_missing_field_is_named(field, example, tmp_path):
    del example[field]
    assert refusal(example, tmp_path) == f"{field}: missing"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 90_000, '{"a": NaN}', "9" * 5000, "\ufeff{}", " " * 2_000_000]
)
def test_what_is_not_a_card_is_refused(text, tmp_path):
    refusal(text, tmp_path)


def test_bytes_that_are_no_text_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "a.json", tmp_path / "b.json", tmp_path):
        with pytest.raises(CardError, match="card "):
            read_card(path)


@pytest.mark.parametrize(
    "path",
    [
        "evil:Config",
        "os:PathLike",
        "mplug2.network:Network",
        "mplug2.modules:Config",
        "mplug2.modules.evil.deeper:Config",
        "mplug2.modules.vision:Vision",
        "mplug2.modules.vision:dataclass",
        "mplug2.modules.vision:Execution",
        "mplug2.modules.vision:Config\n",
        "mplug2.modules..vision:Config",
        "mplug2.modules.vision:Config.__init__",
        7,
        None,
    ],
)
def test_no_code_but_the_zoos_own_dataclasses_is_imported(path, example, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('a card ran code')")
    monkeypatch.syspath_prepend(tmp_path)
    refusal(changed(example, "config.type", path), tmp_path)
    assert "evil" not in sys.modules


def test_an_interface_of_an_unknown_module_must_be_stated():
    with pytest.raises(CardError, match='none of .*did you mean "decoder".*: state its interface yourself'):
        cards.interface("decodr", decoder.tiny(), "float32")


STRANGE = [None, True, -1, 0, 10**9, 1e308, "", "x", "../x", [], {}, [[]], {"type": "os:system"}]


def mutated(value: object, rng: random.Random) -> object:
    """One place of a JSON value changed: taken away, renamed, or made a strange value."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return copy.deepcopy(rng.choice(STRANGE))
    value = copy.copy(value)
    key = rng.choice(sorted(value)) if isinstance(value, dict) else rng.randrange(len(value))
    match rng.randrange(6):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[f"{key}x"] = value.pop(key)
        case _:
            value[key] = mutated(value[key], rng)
    return value


def read_or_refuse(path: Path) -> None:
    try:
        card = read_card(path)
    except CardError as error:
        assert "\n" not in str(error)
        return
    assert decode(Card, encode(card), "") == card
    assert card.weights.parent == path.parent


def test_mutated_cards_are_read_or_refused_in_one_sentence(example, tmp_path):
    rng, path = random.Random(3), tmp_path / "mutated.json"
    for _ in range(600):
        path.write_text(json.dumps(mutated(example, rng)))
        read_or_refuse(path)


def test_cards_with_mutated_bytes_are_read_or_refused(example, tmp_path):
    rng, path = random.Random(4), tmp_path / "mutated.json"
    content = json.dumps(example).encode()
    for _ in range(400):
        broken = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        read_or_refuse(path)


def test_a_field_that_no_line_can_show_is_named_as_python_would(example, tmp_path):
    text = refusal(changed(example, "file.two\nlines", None), tmp_path)
    assert r"'two\nlines': no such field" in text


PARTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from([f.name for f in dataclasses.fields(Card)]), part=PARTS)
def test_any_value_of_any_field_is_read_or_refused(name, part, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(encode(card_of()) | {name: part}))
    read_or_refuse(path)
