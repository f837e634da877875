"""Merging cards that do not belong together is refused with both sides, before anything is written."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cards_to_merge import MODULES, change, copy, parents, publish, read  # pyright: ignore[reportMissingImports]
from fresh import drawn

from mplug2 import hub
from mplug2.data.pixels import Preprocessing
from mplug2.errors import CardError
from mplug2.hub import merge, publishing, weights
from mplug2.hub.card import Parent, Parents, Tokens
from mplug2.hub.merge_methods import Graft, Slerp, Soup, TaskArithmetic, Ties
from mplug2.modules import vision
from mplug2.modules.forms import Lora
from mplug2.tools.main import main


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Directories of cards: `base`, and `a`, `b`, `c`."""
    return parents(tmp_path_factory.mktemp("cards"))


def refused(said: str, out: Path, *arguments, **options) -> None:
    with pytest.raises(CardError, match=said):
        merge.merge(out, *arguments, **options)
    assert not out.exists() or not list(out.iterdir())


def test_deltas_are_sent_to_what_merges_them(tmp_path):
    config = Lora().delta(vision.tiny())
    params = drawn({"": config})[""]
    for name in ("a", "b"):
        publishing.publish(tmp_path / name, f"d-{name}", "vision_delta", config, params, base="0" * 64)
    said = "d-a is a delta: mplug2.adapt's add and average merge deltas"
    refused(said, tmp_path / "out", Soup(), [tmp_path / "a", tmp_path / "b"])


def test_parents_of_another_config_are_refused_with_the_fields_that_differ(places, tmp_path):
    deep = {**MODULES, "vision": dataclasses.replace(vision.tiny(), depth=3)}
    other = publish(tmp_path / "deep", 5, "deep", modules=deep)
    said = r"vision-a and vision-deep cannot be .* differ in config.depth \(vision-a 2, vision-deep 3\)"
    refused(said, tmp_path / "out", Soup(), [places["a"], other])
    said = r"vision-deep and vision-a cannot be merged.*config.depth"
    refused(said, tmp_path / "out", TaskArithmetic(), [places["a"]], base=other)


def test_parents_of_other_tokenizers_or_preprocessing_are_refused(places, tmp_path):
    for fact, values, said in (
        (
            "tokenizer",
            [Tokens(file="x.model", sha256=digit * 64, ids={"pad": 0}) for digit in "cd"],
            "tokenizer.sha256 .contrastive-a c+, contrastive-b d+.",
        ),
        (
            "preprocessing",
            [Preprocessing(height=32), Preprocessing(height=64)],
            "preprocessing.height .contrastive-a 32, contrastive-b 64.",
        ),
    ):
        cards = [
            change(hub.find(copy(places[name], tmp_path / f"{fact}-{name}"), "contrastive"), **{fact: value})
            for name, value in zip("ab", values, strict=True)
        ]
        refused(said, tmp_path / "out", Soup(), cards)


def test_parents_of_different_modules_are_refused_until_some_are_chosen(places, tmp_path):
    card = hub.find(places["b"], "vision")
    said = "different modules: contrastive-a, vision-a and vision-b; choose"
    refused(said, tmp_path / "out", Soup(), [places["a"], card])
    assert set(merge.merge(tmp_path / "out", Soup(), [places["a"], card], modules=["vision"])) == {"vision"}
    refused(
        "no parent's 'visoin' among .*did you mean", tmp_path / "x", Soup(), [card] * 2, modules=["visoin"]
    )
    other = hub.find(places["b"], "contrastive")
    refused("different modules: vision-b and contrastive-b", tmp_path / "x", Soup(), [card, other])


def test_a_parent_that_states_another_base_is_refused_with_both(places, tmp_path):
    base, other = (hub.find(places[name], "vision") for name in ("base", "c"))
    stated = Parents(method="train", base=Parent(name=base.name, sha256=base.file.sha256))
    tuned = change(hub.find(copy(places["a"], tmp_path / "tuned"), "vision"), parents=stated)
    said = f"vision-a was trained from vision-base, sha256 {base.file.sha256}; the base is vision-c, sha256"
    refused(said, tmp_path / "out", Ties(), [tuned, hub.find(places["b"], "vision")], base=other)
    merged = merge.merge(tmp_path / "ok", Ties(), [tuned], base=base)["vision"]
    soup = merge.merge(tmp_path / "soup", Soup(), [tuned, merged])[
        "vision"
    ]  # it is still known as of its base
    assert soup.parents and soup.parents.base == Parent(name=base.name, sha256=base.file.sha256)
    refused("vision-soup was trained from", tmp_path / "out", TaskArithmetic(), [soup], base=other)


def test_a_base_is_given_where_the_method_needs_one_and_holds_the_modules(places, tmp_path):
    refused("ties needs the base .* none is given", tmp_path / "x", Ties(), [places["a"]])
    refused(
        "soup has no base, and .*base is given",
        tmp_path / "x",
        Soup(),
        [places["a"]] * 2,
        base=places["base"],
    )
    vision_only = hub.find(places["base"], "vision")
    refused(
        "holds vision, the parents contrastive too", tmp_path / "x", Ties(), [places["a"]], base=vision_only
    )


@pytest.mark.parametrize(
    ("method", "coefficients", "said"),
    [
        (Soup(), (1,), "1 coefficients for 2 parents, contrastive-a, contrastive-b"),
        (Soup(), (1, -1), "soup takes shares, none below 0"),
        (Slerp(), (0, 0), "slerp takes shares, none below 0 and one above"),
        (Soup(), (1, float("nan")), "expected finite numbers"),
        (Soup(), {"visoin": (1, 2)}, "coefficients of 'visoin': merged are .*did you mean"),
        (Soup(), {"vision": (1,)}, "1 coefficients for 2 parents"),
    ],
)
def test_coefficients_that_mean_nothing_are_refused(method, coefficients, said, places, tmp_path):
    refused(said, tmp_path / "x", method, [places["a"], places["b"]], coefficients=coefficients)


def test_too_many_and_too_few_parents_are_refused(places, tmp_path):
    refused(r"slerp of 3 parent\(s\), expected 2", tmp_path / "x", Slerp(), [places[name] for name in "abc"])
    refused(r"soup of 1 parent\(s\), expected at least 2", tmp_path / "x", Soup(), [places["a"]])
    refused(r"ties of 0 parent\(s\), expected at least 1", tmp_path / "x", Ties(), [])


def test_licences_that_differ_are_refused_until_one_is_stated(places, tmp_path):
    other = publish(tmp_path / "mit", 5, "mit", licence="MIT")
    said = "licences differ: .*-a has Apache-2.0, .*-mit has MIT"
    refused(said, tmp_path / "out", Soup(), [places["a"], other])
    assert (
        merge.merge(tmp_path / "out", Soup(), [other, places["a"]], licence="MIT")["vision"].licence == "MIT"
    )


def test_a_rule_that_takes_nothing_is_refused(places, tmp_path):
    method = Graft(take=("vision.blocks.*", "vision.clas_token"))
    said = 'take "vision.clas_token" matches no array .did you mean "vision.class_token"'
    refused(said, tmp_path / "out", method, [places["a"]], base=places["base"])


def test_a_damaged_parent_is_refused_and_nothing_is_left(places, tmp_path):
    card = hub.find(copy(places["a"], tmp_path / "damaged"), "vision")
    content = bytearray(card.weights.read_bytes())
    content[-1] ^= 1
    card.weights.write_bytes(content)
    refused("sha256 is .*, the card says", tmp_path / "out", Soup(), [card, card])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_parent_that_is_not_finite_is_refused_by_name_and_nothing_is_left(value, places, tmp_path):
    card = hub.find(copy(places["a"], tmp_path / "hostile"), "vision")
    arrays = read(card)
    arrays["class_token"][0] = value
    sha256, size = weights.write(card.weights, arrays)
    card = change(card, file=replace(card.file, sha256=sha256, bytes=size))
    said = "card vision-a: array 'class_token' has numbers that are not finite"
    refused(said, tmp_path / "out", Ties(), [card], base=hub.find(places["base"], "vision"))


def test_a_merge_that_overflows_its_type_is_refused_by_name(places, tmp_path):
    refused(
        "module vision: not finite as float16: ",
        tmp_path / "out",
        TaskArithmetic(),
        [hub.find(places["a"], "vision")],
        base=hub.find(places["base"], "vision"),
        coefficients=(1e6,),
        dtype="float16",
    )


# --- the command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sooup", "A"], 'no method "sooup".*did you mean "soup"'),
        (["soup", "A", "--density", "0.5"], "soup has no density"),
        (["soup", "A"], r"soup of 1 parent\(s\), expected at least 2"),
        (["soup", "A", "--score", "image_answer"], "--score chooses the parents of a greedy soup"),
        (["greedy", "A", "--base", "A", "--score", "x"], "--base: a greedy soup has none"),
        (["greedy", "A"], "greedy needs a validation score"),
        (["ties", "A"], "ties needs the base"),
    ],
)
def test_the_command_refuses_in_one_line(words, said, places, tmp_path, capsys):
    words = [str(places["a"]) if word == "A" else word for word in words]
    assert main(["merge", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(said, error), error
