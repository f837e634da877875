"""WordPiece: the promises of every tokenizer, and the official code's own behaviour beside them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from mplug2.data.wordpiece import TOKENS, OfficialWordPiece, WordPiece
from mplug2.errors import DataError

AUX = Path(__file__).parent / "golden" / "aux"
RECORDED = json.loads((AUX / "aux.json").read_text())
VOCABULARY = str(AUX / "vocab.txt")
TOKENIZER = WordPiece(VOCABULARY)
OFFICIAL = OfficialWordPiece(VOCABULARY)
CLS, SEP, UNK = 101, 102, 100


def written(folder: Path, *words: str) -> str:
    (folder / "vocab.txt").write_text("\n".join([*TOKENS.values(), *words]) + "\n")
    return str(folder / "vocab.txt")


# --- the zoo's own


def test_ids_are_begin_text_end_padding():
    ids = TOKENIZER.encode("a man is walking", 9)
    assert ids.dtype == np.int32 and ids.shape == (9,)
    assert ids.tolist() == [CLS, 1, 2, 8, UNK, SEP, 0, 0, 0]


def test_a_word_is_its_longest_pieces():
    assert TOKENIZER.encode("dogs cooked", 8).tolist() == [CLS, 4, 70, UNK, SEP, 0, 0, 0]
    assert TOKENIZER.decode(TOKENIZER.encode("slowly dogs", 8)) == "slowly dogs"


def test_text_that_does_not_fit_loses_whole_words_but_never_its_end():
    assert TOKENIZER.encode("a man dogs", 6).tolist() == [CLS, 1, 2, 4, 70, SEP]
    assert TOKENIZER.encode("a man dogs", 5).tolist() == [CLS, 1, 2, SEP, 0]  # "dog" alone is another word
    assert TOKENIZER.encode("a man dogs cat", 5).tolist() == [CLS, 1, 2, SEP, 0]
    assert TOKENIZER.encode("man,dog cat", 4).tolist() == [CLS, SEP, 0, 0]  # up to a blank, it is one word
    assert TOKENIZER.encode("a man", 2).tolist() == [CLS, SEP]


def test_text_cannot_smuggle_in_special_tokens():
    ids = TOKENIZER.encode("[SEP] [MASK] [CLS] [PAD] a", 40).tolist()
    assert ids.count(SEP) == 1 and not {0, CLS, 103} & set(ids[1 : ids.index(SEP)])


def test_decoding_skips_special_tokens_and_stops_at_the_first_end():
    assert TOKENIZER.decode([CLS, 1, 103, 2, UNK, SEP, 4, SEP, 0]) == "a man"


def test_marks_are_written_up_against_words(tmp_path: Path):
    tokenizer = WordPiece(written(tmp_path, "a", "man", "'", "s", "dog", ",", "?", ".", "it"))
    for text in ("a man's dog, it is a dog?", "a dog.", "it's a man"):
        known = text.replace("is ", "")
        assert tokenizer.decode(tokenizer.encode(known, 20)) == known


def test_accents_case_and_chinese_characters_are_as_bert_has_them(tmp_path: Path):
    tokenizer = written(tmp_path, "cafe", "中", "文", "Café")
    assert WordPiece(tokenizer).encode("CAFÉ 中文", 8).tolist() == [2, 5, 6, 7, 3, 0, 0, 0]
    assert WordPiece(tokenizer, lowercase=False).encode("Café cafe", 5).tolist() == [2, 8, 5, 3, 0]


def test_a_word_of_more_than_a_hundred_characters_is_unknown(tmp_path: Path):
    tokenizer = WordPiece(written(tmp_path, "a", "##a"))
    assert tokenizer.encode("a" * 100, 110).tolist().count(6) == 99
    assert tokenizer.encode("a" * 101, 110).tolist()[:3] == [2, 1, 3]


def test_the_table_states_special_ids_and_size():
    expected = {"pad": 0, "unknown": UNK, "begin": CLS, "end": SEP, "mask": 103, "size": 200}
    assert TOKENIZER.table() == expected and TOKENIZER.size == 200


def test_a_tokenizer_survives_pickling_after_use():
    for tokenizer in (TOKENIZER, OFFICIAL):
        before = tokenizer.encode("a man[SEP]", 8)
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again == tokenizer and again.sha256 == tokenizer.sha256
        np.testing.assert_array_equal(again.encode("a man[SEP]", 8), before)


# --- the official code's


@pytest.mark.parametrize("case", RECORDED["tokenizer"], ids=lambda case: case["text"][:12])
def test_official_ids_are_the_recorded_ones(case):
    expected, tokens = case["input_ids"], case["tokens"]
    ids = OFFICIAL.encode(case["text"], len(expected) + 3).tolist()
    assert ids == expected + [0, 0, 0]
    words = (AUX / "vocab.txt").read_text().splitlines()
    assert [words[id] for id in ids[1 : len(expected)]] == tokens


@pytest.mark.parametrize("case", RECORDED["tokenizer"], ids=lambda case: case["text"][:12])
def test_official_texts_are_the_recorded_ones_without_begin_end_and_padding(case):
    expected = case["decoded"]
    for token in ("[SEP]", "[CLS]", "[PAD]"):
        expected = expected.replace(token, "")
    assert OFFICIAL.decode(case["input_ids"]) == expected.strip()


def test_official_truncation_cuts_off_the_end():
    recorded = RECORDED["tokenizer_truncation20"]
    whole = TOKENIZER.decode(recorded) + " boy[SEP]"
    assert OFFICIAL.encode(whole, 20).tolist() == recorded and SEP not in recorded
    assert OFFICIAL.encode(whole, 22).tolist()[-1] == SEP


def test_the_prompts_ids_are_counted_without_begin():
    for prompt, length in RECORDED["prompt_length"].items():
        assert OfficialWordPiece(VOCABULARY, prompt=prompt).prompt_length == length
    assert OFFICIAL.prompt_length == 0


def test_official_decoding_reads_past_the_end_and_drops_the_prompt():
    ids = OFFICIAL.encode("a video ofa man[SEP]dog", 12)
    assert OFFICIAL.decode(ids) == "a video ofa man  dog"
    assert OfficialWordPiece(VOCABULARY, prompt="a video of").decode(ids) == "a man  dog"


# --- refusals


def test_a_missing_vocabulary_is_refused_by_name(tmp_path: Path):
    with pytest.raises(DataError, match='no vocabulary "absent.txt"'):
        WordPiece("absent.txt").encode("a", 4)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"[PAD]\n\xff\xfe", "not UTF-8"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\na\n", 'lines 6 and 8 are both "a"'),
        (b"[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n", r"\[PAD\] at 1; the zoo needs it at 0"),
        (b"[PAD]\n[UNK]\n[CLS]\n[MASK]\n[SEP] \n", r'no \[SEP\] \(did you mean "\[SEP\] "'),
    ],
)
def test_a_broken_vocabulary_is_refused_with_its_reason(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(DataError, match=reason):
        WordPiece(str(tmp_path / "vocab.txt")).encode("a", 4)


def test_windows_line_ends_and_rare_separators_do_not_shift_ids(tmp_path: Path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*TOKENS.values(), "\u2028", "a"]).encode() + b"\r\n")
    assert WordPiece(str(tmp_path / "vocab.txt")).encode("a", 3).tolist() == [2, 6, 3]


def test_a_length_without_room_is_refused():
    with pytest.raises(DataError, match="length 1"):
        TOKENIZER.encode("a", 1)
    with pytest.raises(DataError, match="length 0"):
        OFFICIAL.encode("a", 0)
