"""Answer lists: which answer is chosen, by a decoder whose chances are written down."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_official_search import ANSWERED

from mplug2.data.wording import Official, Plain
from mplug2.data.wordpiece import OfficialWordPiece, WordPiece
from mplug2.errors import DataError
from mplug2.inference import Inference
from mplug2.ranking import OfficialRanked, Ranked

SPECIAL = ["[PAD]", "one", "[CLS]", "[SEP]", "four", "five", "[UNK]", "[MASK]"]
MEMORY = jnp.zeros((2, 1, 1))


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("".join(f"{word}\n" for word in SPECIAL))
    return str(path)


@pytest.fixture
def answers(tmp_path: Path) -> str:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(dict.fromkeys(("Five", "One", "four five"), 0)))
    return str(path)


@pytest.mark.parametrize("rows", [1, 2, 3, 128])
def test_the_likeliest_whole_answer_is_chosen_however_many_are_scored_at_once(rows, vocabulary, answers):
    write = Ranked(file=answers, length=4, rows=rows).writer(WordPiece(vocabulary))
    ids = write(ANSWERED, MEMORY, None, jnp.zeros(2))  # type: ignore
    assert [WordPiece(vocabulary).decode(row) for row in np.asarray(ids)] == ["four five"] * 2


def test_the_official_choice_goes_by_the_first_word_first(vocabulary, answers):
    tokenizer = OfficialWordPiece(vocabulary)
    for best, said in ((1, "one"), (2, "four five"), (128, "four five")):
        write = OfficialRanked(file=answers, length=4, wording=Official(), best=best).writer(tokenizer)
        ids = write(ANSWERED, MEMORY, None, jnp.zeros(2))  # type: ignore
        assert [tokenizer.decode(row) for row in np.asarray(ids)] == [said] * 2


def test_equal_lists_are_one_compiled_function_and_stand_where_a_search_does(vocabulary, answers):
    search = Ranked(file=answers, length=4)
    inference = Inference(compiled=None, recipe=None, tokenizer=WordPiece(vocabulary))  # type: ignore
    first, again = inference.writer(search), inference.writer(search)
    assert first == again and hash(first) == hash(again)
    assert inference.writer(replace(search, rows=2)) != first


def test_an_answer_that_would_be_cut_is_refused(vocabulary, answers):
    for tokenizer, wording in ((WordPiece(vocabulary), Plain()), (OfficialWordPiece(vocabulary), Official())):
        with pytest.raises(DataError, match='the answer "four five" does not fit into 3 ids'):
            Ranked(file=answers, length=3, wording=wording).writer(tokenizer)


def test_an_official_answer_without_its_end_is_refused(vocabulary, answers):
    with pytest.raises(DataError, match="does not fit"):
        Ranked(file=answers, length=4, wording=Plain()).writer(OfficialWordPiece(vocabulary))


def test_an_empty_or_missing_list_is_refused(vocabulary, tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        Ranked(file=str(tmp_path / "absent.json")).writer(WordPiece(vocabulary))
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(DataError, match="holds no answer"):
        Ranked(file=str(tmp_path / "none.json")).writer(WordPiece(vocabulary))
