"""Wording of captions, questions and answers: the official code's as recorded, ours without its defects."""

import json
from pathlib import Path

import pytest

from mplug2.data.wording import Official, Plain, official_caption, official_question, plain
from mplug2.data.wordpiece import OfficialWordPiece

AUX = Path(__file__).parent / "golden" / "aux"
RECORDED = json.loads((AUX / "aux.json").read_text())


@pytest.mark.parametrize("text, words, expected", RECORDED["pre_caption"])
def test_official_captions_are_the_recorded_ones(text, words, expected):
    assert official_caption(text, words) == expected


@pytest.mark.parametrize("text, words, expected", RECORDED["pre_question"])
def test_official_questions_are_the_recorded_ones(text, words, expected):
    assert official_question(text, words) == expected


def test_an_official_question_counts_blanks_as_words_and_a_plain_one_does_not():
    assert official_question("two-dogs / running fast", 5) == "two dogs   running"
    assert plain("two-dogs / running fast", 4) == "two dogs running fast"


@pytest.mark.parametrize("text, words, expected", RECORDED["pre_caption"] + RECORDED["pre_question"])
def test_plain_words_are_the_official_ones_up_to_blanks_and_persons(text, words, expected):
    if len(text.split()) <= words:
        assert plain(text, words) == " ".join(expected.replace("<person>", "person").split())


def test_plain_texts_hold_one_blank_between_words_and_no_marks():
    wording = Plain(caption_words=5, question_words=3)
    assert wording.caption(" A man,\twho's\n(at) the sea-side ") == "a man whos at the"
    assert (
        wording.question("What -- is it?", "train") == wording.question("What is it", "test") == "what is it"
    )
    assert wording.answer(" St.  Paul ") == "st. paul"


def test_an_official_caption_runs_into_its_prompt_and_spells_its_end():
    """Parity with the ids of the official caption text."""
    said = Official().caption("A man is playing the guitar!")
    recorded = RECORDED["tokenizer"][0]
    assert said == recorded["text"] == "a video ofa man is playing the guitar[SEP]"
    ids = OfficialWordPiece(str(AUX / "vocab.txt")).encode(said, len(recorded["input_ids"]))
    assert ids.tolist() == recorded["input_ids"]
    assert Official(prompt="").caption("A man") == "a man[SEP]"


def test_official_questions_are_longer_after_training_and_answers_are_left_alone():
    long = " ".join(f"w{number}" for number in range(60))
    assert len(Official().question(long, "train").split()) == 30
    assert len(Official().question(long, "test").split()) == 50
    assert Official().answer("The Dog") == "The Dog[SEP]"
