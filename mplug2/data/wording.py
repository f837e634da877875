"""Wording: how captions, questions and answers of a data set are written before a tokenizer sees them.

`Plain` is the zoo's. `Official` writes what the official mPLUG-2 code wrote, for weights and numbers that
came from it: its captions run into the prompt ("a video ofa man"), a question keeps the blanks that its marks
leave (each counts as a word), and the end is spelled out, which `OfficialWordPiece` reads as the token.
"""

import re
from dataclasses import dataclass
from typing import Protocol

_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_BLANK = str.maketrans("-/", "  ")


class Wording(Protocol):
    """What is learned, and asked, of the texts of a data set."""

    def caption(self, text: str) -> str:
        """What a decoder learns of a caption."""
        ...

    def question(self, text: str, split: str) -> str:
        """What an encoder reads of a question of `split`."""
        ...

    def answer(self, text: str) -> str:
        """What a decoder learns of an answer."""
        ...


@dataclass(frozen=True)
class Plain:
    """Lower case without marks, one blank between words, the first so many words: the same for captions and
    questions, in training and after it. Answers keep their marks."""

    caption_words: int = 80
    question_words: int = 50

    def caption(self, text: str) -> str:
        return plain(text, self.caption_words)

    def question(self, text: str, split: str) -> str:
        return plain(text, self.question_words)

    def answer(self, text: str) -> str:
        return " ".join(text.lower().split())


@dataclass(frozen=True)
class Official:
    """As the official code has it. `prompt`: what every caption begins with ("" for --no_prompt). Questions
    have more words after training (`asked_words`) than in it. Answers are as the file has them."""

    prompt: str = "a video of"
    end: str = "[SEP]"
    caption_words: int = 80
    question_words: int = 30
    asked_words: int = 50

    def caption(self, text: str) -> str:
        return self.prompt + official_caption(text, self.caption_words) + self.end

    def question(self, text: str, split: str) -> str:
        return official_question(text, self.question_words if split == "train" else self.asked_words)

    def answer(self, text: str) -> str:
        return text + self.end


def plain(text: str, words: int) -> str:
    """The first `words` words in lower case; marks are dropped, `-` and `/` part words, `<person>` is a
    person."""
    return " ".join(_bare(text).replace("<person>", "person").split()[:words])


def official_caption(text: str, words: int) -> str:
    """`pre_caption` of the official code."""
    text = re.sub(r"\s{2,}", " ", _bare(text).replace("<person>", "person"))
    return _first(text.rstrip("\n").strip(" "), words)


def official_question(text: str, words: int) -> str:
    """`pre_question` of the official code; unlike captions, blanks and `<person>` stay as they are."""
    return _first(_bare(text).rstrip(" "), words)


def _bare(text: str) -> str:
    return _DROPPED.sub("", text.lower()).translate(_BLANK)


def _first(text: str, words: int) -> str:
    return " ".join(text.split(" ")[:words])
