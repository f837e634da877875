"""WordPiece, the tokenizer of BERT (Devlin et al. 2018, arXiv:1810.04805) and of the released mPLUG-2.

`WordPiece` keeps the promises of every tokenizer of the zoo: `[CLS] ... [SEP] [PAD] [PAD]`, whole words, and
no special token out of a text. `OfficialWordPiece` does what the official mPLUG-2 code does, for weights and
numbers that came from it. The vocabulary is one token a line, its id the number of the line, as Google and
Hugging Face publish it; it travels beside the card that names it.
"""

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from mplug2.data.tokens import SPECIAL, shipped_or_read
from mplug2.errors import DataError, nearest
from mplug2.places import Place
from mplug2.roles import PAD

TOKENS = {"pad": "[PAD]", "unknown": "[UNK]", "begin": "[CLS]", "end": "[SEP]", "mask": "[MASK]"}
"""BERT's special tokens by the zoo's names for them."""

LONGEST_WORD = 100  # characters; a longer one is unknown as a whole

# Marks are pieces of their own, parted by blanks that nobody wrote: transformers' `clean_up_tokenization`.
_TIGHT = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


@dataclass(frozen=True)
class WordPiece:
    """A vocabulary: the name of a shipped file, or a path. `lowercase` as the vocabulary was made: "uncased"
    ones also drop accents. Raises DataError if it cannot be read, repeats a token, lacks one of TOKENS, or
    does not begin with [PAD]."""

    vocabulary: Place
    lowercase: bool = True

    @functools.cached_property
    def content(self) -> bytes:
        advice = "put BERT's vocab.txt there, or name it with tokenizer.vocabulary=FILE"
        return shipped_or_read(self.vocabulary, "vocabulary", advice)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        try:
            # Only line feeds part tokens: there are tokens that hold other separators of Unicode.
            words = self.content.decode().removesuffix("\n").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f'vocabulary "{self.vocabulary}" is not UTF-8 (byte {error.start})') from None
        ids: dict[str, int] = {}
        for number, token in enumerate(word.removesuffix("\r") for word in words):
            if token in ids:
                lines = f"lines {ids[token] + 1} and {number + 1}"
                raise DataError(f'vocabulary "{self.vocabulary}": {lines} are both "{token}"')
            ids[token] = number
        for token in TOKENS.values():
            if token not in ids:
                raise DataError(f'vocabulary "{self.vocabulary}" has no {token}{nearest(token, ids)}')
        if ids[TOKENS["pad"]] != PAD:
            raise DataError(
                f'vocabulary "{self.vocabulary}" has [PAD] at {ids[TOKENS["pad"]]}; the zoo needs it at {PAD}'
            )
        return ids

    @functools.cached_property
    def _words(self) -> list[str]:
        return list(self._ids)

    @functools.cached_property
    def _pieces(self) -> tokenizers.Tokenizer:
        model = models.WordPiece(
            self._ids, unk_token=TOKENS["unknown"], max_input_chars_per_word=LONGEST_WORD
        )
        pieces = tokenizers.Tokenizer(model)
        pieces.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return pieces

    @property
    def size(self) -> int:
        return len(self._ids)

    @property
    def sha256(self) -> str:
        """The content hash of the vocabulary file, for cards."""
        return hashlib.sha256(self.content).hexdigest()

    def encode(self, text: str, length: int) -> np.ndarray:
        if length < 2:
            raise DataError(f"a text of length {length} has no room for begin and end; the least is 2")
        found = self._pieces.encode(text.split(), is_pretokenized=True)
        ids, word = found.ids, found.word_ids
        if len(ids) > (room := length - 2):
            ids = ids[: word.index(word[room])]  # up to the first piece of the word that does not fit
        return self._padded([self._ids[TOKENS["begin"]], *ids, self._ids[TOKENS["end"]]], length)

    def decode(self, ids: Iterable[int]) -> str:
        special = set(TOKENS.values())
        read = []
        for id in map(int, ids):
            if self._words[id] == TOKENS["end"]:
                break
            if self._words[id] not in special:
                read.append(self._words[id])
        return _joined(read)

    def table(self) -> dict[str, int]:
        return {name: self._ids[TOKENS[name]] for name in SPECIAL} | {"size": self.size}

    @property
    def prompt_length(self) -> int:
        """0: every word of a caption is learned."""
        return 0

    def _padded(self, ids: list[int], length: int) -> np.ndarray:
        return np.array(ids + [PAD] * (length - len(ids)), np.int32)


@dataclass(frozen=True)
class OfficialWordPiece(WordPiece):
    """As the official code of mPLUG-2 has it, for what it trained and published.

    Texts get [CLS] and no [SEP]: an end is where the text itself says "[SEP]", as `wording.Official` writes
    it, and any special token that is spelled out in a text is that token. What does not fit is cut off, the
    end first of all. Decoding reads past [SEP], whatever was generated after it, and gives unknown words as
    "[UNK]". `prompt`: what captions were trained to begin with; decoding drops it and all before it.
    """

    prompt: str = ""

    @functools.cached_property
    def _pieces(self) -> tokenizers.Tokenizer:
        pieces = super()._pieces
        pieces.add_special_tokens(list(TOKENS.values()))
        return pieces

    @property
    def prompt_length(self) -> int:
        """The number of ids of `prompt`, begin left out: so many targets of a caption are not trained."""
        return len(self._pieces.encode(self.prompt).ids)

    def encode(self, text: str, length: int) -> np.ndarray:
        if length < 1:
            raise DataError(f"a text of length {length} has no room for begin; the least is 1")
        ids = [self._ids[TOKENS["begin"]], *self._pieces.encode(text).ids]
        return self._padded(ids[:length], length)

    def decode(self, ids: Iterable[int]) -> str:
        text = _joined(self._words[id] for id in map(int, ids))
        for name in ("end", "begin", "pad"):
            text = text.replace(TOKENS[name], "")
        return (text.rpartition(self.prompt)[2] if self.prompt else text).strip()


def _joined(pieces: Iterable[str]) -> str:
    """Pieces -> text: "##" continues a word, and marks move up to the word before them."""
    text = " ".join(pieces).replace(" ##", "")
    for tight in _TIGHT:
        text = text.replace(tight, tight.strip())
    return text
