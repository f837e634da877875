"""Cards state how questions were worded, and what is asked of them is worded alike."""

import dataclasses

import pytest

from mplug2 import hub, recipes
from mplug2.card_wording import questions_of, wording_of, wording_of_cards
from mplug2.data.wording import Official, Plain
from mplug2.errors import CardError
from mplug2.hub.card import Questions
from mplug2.predict import Predictor

TEXT = hub.find("text-small")


@pytest.mark.parametrize("wording", [Plain(question_words=7), Official(asked_words=9), None])
def test_what_cards_state_of_a_wording_words_questions_alike(wording):
    card = dataclasses.replace(TEXT, questions=questions_of(wording))
    found, question = wording_of_cards([card]), "Is it BIG,  or <person>-like?" + " and" * 20
    if wording is None:
        assert found is None and card.questions is None
    else:
        assert found is not None and found.question(question, "test") == wording.question(question, "test")


def test_recipes_say_how_their_data_word_questions():
    assert wording_of(recipes.find("msrvtt_qa")) == Plain()
    assert isinstance(wording_of(recipes.find("msrvtt_qa.large_official")), Official)
    assert wording_of(recipes.find("image_qa")) is None


def test_cards_that_word_differently_are_refused_with_both():
    one, other = (dataclasses.replace(TEXT, questions=Questions(kind="plain", words=n)) for n in (5, 6))
    with pytest.raises(CardError, match="text-small and text-small word questions differently: .*5.*6"):
        wording_of_cards([one, other])
    with pytest.raises(CardError, match="words: is 0, expected a positive number"):
        Questions(kind="plain", words=0)


def test_a_predictor_of_cards_words_as_trained():
    card = dataclasses.replace(TEXT, questions=Questions(kind="plain", words=4))
    asked = Predictor.of("vision-small", card)
    assert asked.wording == Plain(question_words=4)
    assert Predictor.of("vision-small", TEXT).wording is None
