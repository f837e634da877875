"""The tokenizer that cards state: `stated` writes it down and lets its file travel, `tokenizer_of` opens it.

A card names a file and its sha256, never code: which class reads the file is one of three kinds.
"""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from mplug2.card import Card, TokenizerKind, Tokens
from mplug2.data.tokens import SentencePiece, Tokenizer
from mplug2.data.wordpiece import OfficialWordPiece, WordPiece
from mplug2.errors import CardError
from mplug2.weights import replacing


def stated(tokenizer: Tokenizer, folder: Path) -> Tokens:
    """What a card in `folder` says of a tokenizer. Its file is copied there unless the package ships it.

    Raises CardError for a tokenizer that cards have no name for and where the file cannot be written,
    DataError where it cannot be read.
    """
    kind: TokenizerKind
    if isinstance(tokenizer, SentencePiece):
        kind, path, lowercase, prompt = "sentencepiece", Path(tokenizer.model), None, None
    elif isinstance(tokenizer, OfficialWordPiece):
        kind, path = "official_wordpiece", Path(tokenizer.vocabulary)
        lowercase, prompt = tokenizer.lowercase, tokenizer.prompt
    elif isinstance(tokenizer, WordPiece):
        kind, path, lowercase, prompt = "wordpiece", Path(tokenizer.vocabulary), tokenizer.lowercase, None
    else:
        raise CardError(f"a {type(tokenizer).__name__} cannot be stated by a card: it has no kind there")
    tokens = Tokens(
        file=path.name,
        sha256=tokenizer.sha256,
        ids=tokenizer.table(),
        kind=kind,
        lowercase=lowercase,
        prompt=prompt,
    )
    shipped = path.name == str(path) and (resources.files("mplug2.checkpoints") / path.name).is_file()
    if not shipped:
        with replacing(folder / path.name) as file:
            file.write(path.read_bytes())
    return tokens


def tokenizer_of(cards: Iterable[Card]) -> SentencePiece | WordPiece:
    """The tokenizer that cards state, beside a card or shipped, verified. Raises CardError if there is none,
    if two cards state different ones, or if the file is not the one that was stated."""
    stating = [card for card in cards if card.tokenizer is not None]
    if not stating:
        raise CardError("none of the cards states a tokenizer; those of text and decoder modules do")
    first, said = stating[0], stating[0].tokenizer
    assert said is not None
    for card in stating:
        if card.tokenizer != said:
            raise CardError(
                f"cards {first.name} and {card.name} state different tokenizers: {said}, {card.tokenizer}"
            )
    beside = first.folder / said.file
    tokenizer = _opened(said, str(beside) if beside.is_file() else said.file)
    if tokenizer.sha256 != said.sha256:
        raise CardError(
            f"card {first.name}: tokenizer {said.file} has sha256 {tokenizer.sha256}, "
            f"the card says {said.sha256}"
        )
    if any(tokenizer.table().get(name) != id for name, id in said.ids.items()):
        raise CardError(
            f"card {first.name}: tokenizer {said.file} has ids {tokenizer.table()}, "
            f"the card says {dict(said.ids)}"
        )
    return tokenizer


def _opened(said: Tokens, path: str) -> SentencePiece | WordPiece:
    if said.kind == "sentencepiece":
        return SentencePiece(path)
    lowercase = said.lowercase is not False
    if said.kind == "wordpiece":
        return WordPiece(path, lowercase)
    return OfficialWordPiece(path, lowercase, said.prompt or "")
