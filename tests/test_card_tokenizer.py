"""The tokenizer that cards state: it comes back as it was, with its file, and no other is taken for it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_card import card_of

from mplug2.data.tokens import SentencePiece
from mplug2.data.wordpiece import OfficialWordPiece, WordPiece
from mplug2.errors import CardError, DataError
from mplug2.hub.card import Card, read_card
from mplug2.hub.card_tokenizer import stated, tokenizer_of

VOCABULARY = str(Path(__file__).parent / "golden" / "aux" / "vocab.txt")
CASED = WordPiece(VOCABULARY, lowercase=False)
PROMPTED = OfficialWordPiece(VOCABULARY, prompt="a video of")


def written(tokenizer: Any, folder: Path, name: str = "a") -> Card:
    """A card of the tokenizer, read again from its file."""
    card = card_of(name=name, tokenizer=stated(tokenizer, folder), folder=folder)
    return read_card(card.write())


@pytest.mark.parametrize("tokenizer", [WordPiece(VOCABULARY), CASED, PROMPTED], ids=lambda it: repr(it)[:20])
def test_word_pieces_come_back_with_their_file(tokenizer, tmp_path):
    found = tokenizer_of([written(tokenizer, tmp_path)])
    assert found == dataclasses.replace(tokenizer, vocabulary=str(tmp_path / "vocab.txt"))
    assert found.table() == tokenizer.table() and type(found) is type(tokenizer)


def test_the_shipped_tokenizer_is_not_copied(tmp_path):
    assert tokenizer_of([written(SentencePiece(), tmp_path)]) == SentencePiece()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_card_that_does_not_say_what_reads_its_file_means_sentencepiece(tmp_path):
    written(SentencePiece(), tmp_path)
    value = json.loads((tmp_path / "a.json").read_text())
    del value["tokenizer"]["kind"]
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert tokenizer_of([read_card(tmp_path / "a.json")]) == SentencePiece()


def test_stating_twice_into_one_folder_is_no_matter(tmp_path):
    beside = dataclasses.replace(PROMPTED, vocabulary=str(tmp_path / "vocab.txt"))
    assert stated(PROMPTED, tmp_path) == stated(beside, tmp_path)


def test_cards_that_state_different_tokenizers_of_one_file_do_not_fit(tmp_path):
    plain, prompted = written(WordPiece(VOCABULARY), tmp_path), written(PROMPTED, tmp_path, "b")
    with pytest.raises(CardError, match="cards a and b state different tokenizers"):
        tokenizer_of([plain, prompted])


def test_a_file_that_is_another_or_has_other_ids_is_refused(tmp_path):
    card = written(PROMPTED, tmp_path)
    assert card.tokenizer is not None
    ids = {**card.tokenizer.ids, "end": 5}
    wrong = dataclasses.replace(card, tokenizer=dataclasses.replace(card.tokenizer, ids=ids))
    with pytest.raises(CardError, match="expected .*'end': 5"):
        tokenizer_of([wrong])
    (tmp_path / "vocab.txt").write_text("x")
    with pytest.raises(CardError, match="vocab.txt has sha256"):
        tokenizer_of([card])
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(DataError, match='no vocabulary "vocab.txt"'):
        tokenizer_of([card])


def test_a_tokenizer_without_a_kind_and_one_without_a_file_cannot_be_stated(tmp_path):
    with pytest.raises(CardError, match="a str cannot be stated by a card"):
        stated("words", tmp_path)  # type: ignore
    with pytest.raises(DataError, match="no vocabulary.*put BERT's vocab.txt there"):
        stated(WordPiece(str(tmp_path / "absent.txt")), tmp_path)
    assert not list(tmp_path.iterdir())
