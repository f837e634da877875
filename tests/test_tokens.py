"""The shipped SentencePiece model and its wrapper."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mplug2.data import grammar, tokens
from mplug2.data.handwriting import VIEWS, Handwriting
from mplug2.errors import DataError

TOKENIZER = tokens.SentencePiece()


def test_every_word_of_the_grammar_is_one_piece():
    for word in grammar.words():
        ids = TOKENIZER.encode(word, 8)
        assert np.count_nonzero(ids) == 3, word
        assert len(tokens.SPECIAL) <= ids[1] < TOKENIZER.size


def test_ids_are_begin_text_end_padding():
    ids = TOKENIZER.encode("a red three", 8)
    assert ids.dtype == np.int32 and ids.shape == (8,)
    assert ids[0] == 2 and ids[4] == 3 and not ids[5:].any()


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("view", VIEWS)
def test_decoding_gives_back_every_text(view, frames):
    source = Handwriting(view, frames).source("train")
    for index in range(200):
        for text in source.texts(index).values():
            ids = TOKENIZER.encode(text, 32)
            assert 1 not in ids
            assert TOKENIZER.decode(ids) == text


def test_words_outside_the_grammar_are_spelled():
    ids = TOKENIZER.encode("a quick brown fox", 32)
    assert 1 not in ids and TOKENIZER.decode(ids) == "a quick brown fox"


def test_case_and_question_marks_do_not_matter():
    plain, typed = (
        TOKENIZER.encode(text, 12) for text in ("what colour is the three", "What Colour is the THREE?")
    )
    np.testing.assert_array_equal(plain, typed)


def test_text_that_does_not_fit_loses_whole_words_but_never_its_end():
    ids = TOKENIZER.encode("a red three above a blue five", 6)
    assert TOKENIZER.decode(ids) == "a red three above" and ids[-1] == 3
    ids = TOKENIZER.encode("a xylophone", 6)  # the second word needs more than the two ids left
    assert TOKENIZER.decode(ids) == "a" and ids.tolist().count(3) == 1


def test_text_cannot_smuggle_in_special_tokens():
    ids = TOKENIZER.encode("<mask> <s> </s> <pad>", 40)
    body = ids[1 : np.flatnonzero(ids == 3)[0]]
    assert not set(body.tolist()) & {0, 2, 3, 4}
    assert ids.tolist().count(3) == 1


def test_the_table_states_special_ids_and_size():
    expected = {"pad": 0, "unknown": 1, "begin": 2, "end": 3, "mask": 4, "size": TOKENIZER.size}
    assert TOKENIZER.table() == expected


def test_training_again_gives_the_shipped_file(tmp_path: Path):
    tokens.train(tmp_path / "again.model")
    shipped = Path(tokens.__file__).parents[1] / "checkpoints" / "handwriting.model"
    assert (tmp_path / "again.model").read_bytes() == shipped.read_bytes()


def test_a_tokenizer_survives_pickling_after_use():
    again = pickle.loads(pickle.dumps(TOKENIZER))
    assert again == TOKENIZER and again.sha256 == TOKENIZER.sha256
    np.testing.assert_array_equal(again.encode("a red three", 8), TOKENIZER.encode("a red three", 8))


def test_a_missing_or_foreign_model_is_refused_by_name(tmp_path: Path):
    with pytest.raises(DataError, match='no tokenizer "absent.model"'):
        tokens.SentencePiece("absent.model").encode("a", 4)
    (tmp_path / "junk.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match="junk.model"):
        tokens.SentencePiece(str(tmp_path / "junk.model")).encode("a", 4)


def test_a_length_without_room_for_begin_and_end_is_refused():
    with pytest.raises(DataError, match="length 1"):
        TOKENIZER.encode("a", 1)


def test_words_that_strangers_ask_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(tokens, "WORDS_KEPT", 10)
    pieces = tokens.SentencePiece()
    texts = [f"word{number}" for number in range(50)]
    found = [pieces.encode(text, 32).tolist() for text in texts]
    assert len(pieces._words) <= 10
    assert [TOKENIZER.encode(text, 32).tolist() for text in texts] == found
