"""Tokenizers: text -> int32 ids `begin ... end pad pad`, pad == 0, and back.

`SentencePiece()` is the zoo's own: a unigram model trained on the train split's grammar, shipped as
`checkpoints/handwriting.model`. Every word of the grammar is one piece; other lower-case words are spelled.
Upper case is folded and `?` `!` `,` `;` are dropped by the model itself.
"""

import functools
import hashlib
import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from mplug2.errors import DataError
from mplug2.places import Place

SPECIAL = {"pad": 0, "unknown": 1, "begin": 2, "end": 3, "mask": 4}


class Tokenizer(Protocol):
    """What a stream, a task or a card needs of a tokenizer; ids below `len(SPECIAL)` never come from text."""

    @property
    def size(self) -> int:
        """The number of ids, V."""
        ...

    def encode(self, text: str, length: int) -> np.ndarray:
        """Text -> int32 (length,): `begin ... end pad pad`; whole words that do not fit before `end` are left
        out."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; special tokens are skipped and reading stops at the first `end`."""
        ...

    def table(self) -> dict[str, int]:
        """The special ids by name, and `size`."""
        ...

    @property
    def prompt_length(self) -> int:
        """So many first ids of a caption are not learned."""
        ...


def shipped_or_read(name: str, what: str, advice: str) -> bytes:
    """The content of a shipped file of that name, or of the file at that path. Raises DataError that calls it
    a `what` and ends with `advice`."""
    shipped = resources.files("mplug2.checkpoints") / name
    try:
        return shipped.read_bytes() if shipped.is_file() else Path(name).read_bytes()
    except OSError as error:
        raise DataError(
            f'no {what} "{name}": neither shipped nor a readable file ({error.strerror}); {advice}'
        ) from None


WORDS_KEPT = 1 << 16
"""What strangers ask has no end of words."""


@dataclass(frozen=True)
class SentencePiece:
    """A SentencePiece model: the name of a shipped one, or a path. Raises DataError if it cannot be read or
    if its special ids are not those of SPECIAL."""

    model: Place = "handwriting.model"

    @functools.cached_property
    def content(self) -> bytes:
        return shipped_or_read(self.model, "tokenizer", "name another with tokenizer.model=FILE")

    @functools.cached_property
    def _pieces(self) -> sentencepiece.SentencePieceProcessor:
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(self.content)
        except RuntimeError:
            raise DataError(f'"{self.model}" is not a SentencePiece model') from None
        found = [
            pieces.pad_id(),
            pieces.unk_id(),
            pieces.bos_id(),
            pieces.eos_id(),
            pieces.PieceToId("<mask>"),
        ]
        if found != list(SPECIAL.values()):
            raise DataError(f'"{self.model}" has special ids {found}; the zoo needs {SPECIAL}')
        return pieces

    @functools.cached_property
    def _words(self) -> dict[str, list[int]]:
        return {}

    @property
    def size(self) -> int:
        return self._pieces.GetPieceSize()

    @property
    def sha256(self) -> str:
        """The content hash of the model file, for cards."""
        return hashlib.sha256(self.content).hexdigest()

    def encode(self, text: str, length: int) -> np.ndarray:
        if length < 2:
            raise DataError(f"a text of length {length} has no room for begin and end; the least is 2")
        ids, known = [SPECIAL["begin"]], self._words
        for word in text.split():
            # Pieces never cross a blank, so words are encoded one by one, and each only once.
            if (piece := known.get(word)) is None:
                if len(known) >= WORDS_KEPT:
                    known.clear()
                piece = known[word] = self._pieces.EncodeAsIds(word)
            if len(ids) + len(piece) >= length:
                break
            ids += piece
        ids.append(SPECIAL["end"])
        return np.array(ids + [SPECIAL["pad"]] * (length - len(ids)), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        read = []
        for id in map(int, ids):
            if id == SPECIAL["end"]:
                break
            if id >= len(SPECIAL):
                read.append(id)
        return self._pieces.DecodeIds(read)

    def table(self) -> dict[str, int]:
        return SPECIAL | {"size": self.size}

    @property
    def prompt_length(self) -> int:
        """0: every word of a caption is learned."""
        return 0


def train(file: Path, size: int = 96) -> None:
    """Trains the zoo's tokenizer on the train split's grammar and writes it to `file`; the same bytes every
    time."""
    from sentencepiece import sentencepiece_model_pb2

    from mplug2.data.grammar import words
    from mplug2.data.handwriting import VIEWS, Handwriting

    texts = []
    for view in VIEWS:
        for frames in (1, 4):
            source = Handwriting(view, frames).source("train")
            for index in range(1000):
                texts += source.texts(index).values()
    texts += [
        f"{one} {other}" for one in words() for other in words()
    ] * 20  # a rare word is one piece as well
    random.Random(0).shuffle(texts)
    rules = [(chr(upper), chr(upper + 32)) for upper in range(65, 91)] + [(mark, " ") for mark in "?!,;"]
    model = io.BytesIO()
    normal = file.with_suffix(".tsv")
    normal.write_text("".join(f"{ord(old):X}\t{ord(new):X}\n" for old, new in rules))
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,  # no more pieces than there are letters and words
            required_chars="abcdefghijklmnopqrstuvwxyz",
            normalization_rule_tsv=str(normal),
            control_symbols=["<mask>"],
            pad_id=SPECIAL["pad"],
            unk_id=SPECIAL["unknown"],
            bos_id=SPECIAL["begin"],
            eos_id=SPECIAL["end"],
            num_threads=1,
            minloglevel=2,
        )
    finally:
        normal.unlink()
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())  # pyright: ignore[reportAttributeAccessIssue]
    proto.normalizer_spec.ClearField(
        "normalization_rule_tsv"
    )  # a path of this machine; the rules are compiled in
    file.write_bytes(proto.SerializeToString(deterministic=True))
