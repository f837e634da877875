"""Exact match and VQA accuracy against the official evaluation (golden/metrics) and by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2.errors import DataError
from mplug2.metrics import exact_match, normalise_answer, vqa_accuracy
from mplug2.metrics.answers import normalise_punctuation, normalise_words

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics" / "vqa.json").read_text())


def test_official_accuracy_is_that_of_the_official_evaluation():
    predictions, answers, expected = zip(*GOLDEN["questions"], strict=True)
    score = vqa_accuracy(predictions, answers, official=True)
    np.testing.assert_allclose(score.per_example * 100, expected, atol=1e-9)


def test_official_normalisation_is_that_of_the_official_evaluation():
    for text, punctuation, full, words in GOLDEN["normalisation"]:
        assert normalise_punctuation(text, official=True) == punctuation, text
        assert normalise_answer(text, official=True) == full, text
        assert normalise_words(text, official=True) == words, text


def test_defects_of_the_official_evaluation_are_only_in_the_official_option():
    assert vqa_accuracy(["Yes."], [["yes"] * 10]).value == 1
    assert vqa_accuracy(["Yes."], [["yes"] * 10], official=True).value == 0
    assert normalise_answer("no" + "." * 40) == "no"
    assert normalise_answer("no" + "." * 40, official=True) != "no"
    assert (normalise_answer("Im"), normalise_answer("Im", official=True)) == ("i'm", "im")
    assert normalise_answer("somebody'd") == normalise_answer("somebodyd") == "somebody'd"


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_grows_with_the_people_who_agree(matches, expected):
    answers = ["red"] * matches + [f"other{index}" for index in range(10 - matches)]
    assert vqa_accuracy(["red"], [answers]).value == pytest.approx(expected)


def test_a_single_answer_is_right_or_wrong():
    assert vqa_accuracy(["The red", "two"], [["red"], ["3"]]).per_example.tolist() == [1, 0]


def test_exact_match_ignores_case_and_blank_space_and_takes_any_reference():
    score = exact_match(["A  dog ", "cat", "a dog."], [["a dog"], ["dog", "Cat"], ["a dog"]])
    assert score.per_example.tolist() == [1, 1, 0]
    assert score.value == pytest.approx(2 / 3)


@given(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=10))
def test_an_answer_given_by_all_is_right_and_every_score_is_a_share(prediction, answers):
    assert 0 <= vqa_accuracy([prediction], [answers]).value <= 1
    assert vqa_accuracy([answers[0]], [[answers[0]] * 10]).value == 1
    assert exact_match([answers[0]], [answers]).value == 1


@pytest.mark.parametrize("function", [exact_match, vqa_accuracy])
def test_empty_and_unequal_input_is_refused(function):
    with pytest.raises(DataError, match="no predictions"):
        function([], [])
    with pytest.raises(DataError, match="1 predictions were given for 2"):
        function(["a"], [["a"], ["b"]])
