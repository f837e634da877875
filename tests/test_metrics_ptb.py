"""The Penn Treebank tokenizer against the reference's output (golden/metrics), by rule, and by property."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2.metrics import tokenize, tokenize_all

ITEMS = json.loads((Path(__file__).parent / "golden" / "metrics" / "tokenizer.json").read_text())


def test_at_least_99_percent_of_the_reference_texts_agree():
    different = [
        (category, text, tokenize(text)) for category, text, expected in ITEMS if tokenize(text) != expected
    ]
    assert len(different) <= len(ITEMS) // 100, different


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man isn't here, is he?", "a man is n't here is he"),
        ("the dog's bone (white)", "the dog 's bone -lrb- white -rrb-"),
        ("I cannot; they're gonna", "i can not they 're gon na"),
        ("Mr. Smith left Jones Inc. The end.", "mr. smith left jones inc. the end"),
        ("a 3-inch, $5 cup -- 50% off!!", "a 3-inch $ 5 cup 50 % off !!"),
        ("“quoted” ‘words’ don’t stay", "quoted words do n't stay"),
        ("1 1/2 cups at 10:30", "1\u00a01/2 cups at 10:30"),
        ("see www.example.com/a_b. #tag @user :-)", "see www.example.com/a_b #tag @user :--rrb-"),
        ("It rains in the U.S. They say no. 5", "it rains in the u.s. they say no. 5"),
        ("\U0001f600 smile \u200b caf\u00e9", "smile caf\u00e9"),
        ("", ""),
        (" \t\n", ""),
    ],
)
def test_a_rule_of_the_treebank_shows_in_a_caption(text, expected):
    assert tokenize(text) == expected


def test_line_breaks_inside_a_caption_part_words_instead_of_cutting_it():
    assert tokenize("one\rtwo\u2028three\x0bfour") == "one two three four"


@given(st.text(max_size=60))
def test_any_text_gives_lower_case_words_joined_by_single_blanks(text):
    result = tokenize(text)
    assert result == " ".join(word for word in result.split(" ") if word)


@given(st.lists(st.text(alphabet="bdfghjklmpqrsxyz", min_size=3, max_size=8), min_size=1, max_size=8))
def test_plain_words_come_back_as_they_are(words):
    assert tokenize(" ".join(words)) == " ".join(words)
    assert tokenize_all([" ".join(words).upper(), "A dog."]) == [" ".join(words), "a dog"]


def test_two_thousand_captions_are_tokenised_in_a_second_or_two():
    texts = [f"A dog, number {index}, is running by the lake; it's happy." for index in range(2000)]
    start = time.perf_counter()
    tokenize_all(texts)
    assert time.perf_counter() - start < 4
