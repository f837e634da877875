"""The tokenizer that cards, locks and bundles state: `tokens_of` says it, `carried` lets its file travel,
`opened` opens it again.

A card names a file and its sha256, never code: which class reads the file is one of three kinds.
"""

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from mplug2 import hub
from mplug2.data.tokens import SentencePiece, Tokenizer
from mplug2.data.wordpiece import OfficialWordPiece, WordPiece
from mplug2.errors import CardError
from mplug2.hub.card import Card, TokenizerKind, Tokens
from mplug2.hub.weights import replacing


def tokens_of(tokenizer: Tokenizer) -> Tokens:
    """What a card says of a tokenizer. Raises CardError for one that cards have no name for, DataError where
    its file cannot be read."""
    known, kind, path = _known(tokenizer)
    return Tokens(
        file=Path(path).name,
        sha256=known.sha256,
        ids=known.table(),
        kind=kind,
        lowercase=known.lowercase if isinstance(known, WordPiece) else None,
        prompt=known.prompt if isinstance(known, OfficialWordPiece) else None,
    )


def carried(tokenizer: Tokenizer, folder: Path) -> Tokens:
    """What a card in `folder` says of a tokenizer, whose file is copied there. Raises CardError, DataError as
    `tokens_of`."""
    said = tokens_of(tokenizer)
    content = _known(tokenizer)[0].content
    with replacing(folder / said.file) as file:
        file.write(content)
    return said


def stated(tokenizer: Tokenizer, folder: Path) -> Tokens:
    """The same; a file that the package ships is not copied."""
    path = _known(tokenizer)[2]
    shipped = Path(path).name == path and (resources.files("mplug2.checkpoints") / path).is_file()
    return tokens_of(tokenizer) if shipped else carried(tokenizer, folder)


def _known(tokenizer: Tokenizer) -> tuple[SentencePiece | WordPiece, TokenizerKind, str]:
    """The tokenizer, its kind on cards, and its file."""
    if isinstance(tokenizer, SentencePiece):
        return tokenizer, "sentencepiece", tokenizer.model
    if isinstance(tokenizer, WordPiece):
        official = isinstance(tokenizer, OfficialWordPiece)
        return tokenizer, "official_wordpiece" if official else "wordpiece", tokenizer.vocabulary
    raise CardError(f"a {type(tokenizer).__name__} cannot be stated by a card: it has no kind there")


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
    with hub.of_this_publication(first):
        try:
            return opened(said, first.folder)
        except CardError as error:
            raise CardError(f"card {first.name}: {error}") from None


def opened(said: Tokens, folder: Path) -> SentencePiece | WordPiece:
    """The tokenizer that was stated, beside what states it or shipped, verified. Raises CardError, with both
    sides, DataError if it cannot be read."""
    beside = folder / said.file
    tokenizer = _of_kind(said, str(beside) if beside.is_file() else said.file)
    if tokenizer.sha256 != said.sha256:
        raise CardError(
            f"tokenizer {said.file} has sha256 {tokenizer.sha256}, expected {said.sha256} as was stated"
        )
    if any(tokenizer.table().get(name) != id for name, id in said.ids.items()):
        raise CardError(
            f"tokenizer {said.file} has ids {tokenizer.table()}, expected {dict(said.ids)} as was stated"
        )
    return tokenizer


def _of_kind(said: Tokens, path: str) -> SentencePiece | WordPiece:
    if said.kind == "sentencepiece":
        return SentencePiece(path)
    lowercase = said.lowercase is not False
    if said.kind == "wordpiece":
        return WordPiece(path, lowercase)
    return OfficialWordPiece(path, lowercase, said.prompt or "")
