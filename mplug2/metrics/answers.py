"""Accuracy of answers: exact match, and VQA accuracy with the normalisation of the official evaluation.

VQA accuracy (Antol et al., ICCV 2015): each question has the answers of several people (ten); a prediction
scores the mean over people of min(1, how many of the others gave it / 3).

Normalisation: line breaks and tabs become blanks; the marks ; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? ! are
deleted if the text has them beside a blank or holds digit-comma-digit anywhere, and become a blank
otherwise; a period goes unless a digit follows; then lower case, number words zero (none) to ten as digits,
articles dropped, missing apostrophes put back.

`official=True` reproduces four defects of the public evaluation code: texts are normalised only where the
given answers differ ("Yes" scores 0 against ten times "yes"); only the first 32 periods of a text go; "im",
"ive" and "id've" keep no apostrophe, because their keys are capitalised; "somebody'd" loses its apostrophe.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mplug2.metrics.captions import Score, check_captions

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset(("a", "an", "the"))
_PERIODS_REMOVED_OFFICIALLY = 32


def _missing_apostrophes() -> dict[str, str]:
    """What is written without (all of) its apostrophes -> with them."""
    simple = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
    how'd how'll how's i'm i've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't
    not've o'clock oughtn't shan't should've shouldn't somebody'd somebody'll somebody's someone'd
    someone'll someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're
    you've""".split()
    table = {word.replace("'", ""): word for word in simple}
    for ambiguous in ("its", "well", "were", "ill", "shell", "hell"):
        table.pop(ambiguous, None)
    double = """couldn't've hadn't've he'd've i'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've
    you'd've""".split()
    for word in double:
        start, end = word.rsplit("'", 1)
        table[start + end] = word  # the last one is missing: "couldn'tve"
        before, middle = start.rsplit("'", 1)
        table[f"{before}{middle}'{end}"] = word  # the one before is missing: "couldnt've"
    table |= {"'ow'sat": "'ow's'at", "'ows'at": "'ow's'at", "ow's'at": "'ow's'at"}
    table |= {"yall'll": "y'all'll", "y'allll": "y'all'll", "yall'd've": "y'all'd've"}
    return table


_APOSTROPHES = _missing_apostrophes()
_APOSTROPHES_OFFICIAL = {
    key: value
    for key, value in _APOSTROPHES.items()
    if key not in ("im", "ive", "id've", "i'dve", "somebodyd")
} | {"somebody'd": "somebodyd"}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """The share of predictions equal to one of their references, in 0..1, up to case and the amount of
    blank space.

    Raises DataError for empty or unequal input.
    """
    check_captions(predictions, references)
    per_example = np.array(
        [
            float(_plain(prediction) in map(_plain, several))
            for prediction, several in zip(predictions, references, strict=True)
        ]
    )
    return Score(float(per_example.mean()), per_example)


def equal_strings(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """The share of predictions that are, letter by letter, one of their references: the accuracy of the
    official mPLUG-2 video question answering. Raises DataError for empty or unequal input."""
    check_captions(predictions, references)
    per_example = np.array(
        [float(one in several) for one, several in zip(predictions, references, strict=True)]
    )
    return Score(float(per_example.mean()), per_example)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def vqa_accuracy(
    predictions: Sequence[str], references: Sequence[Sequence[str]], official: bool = False
) -> Score:
    """VQA accuracy in 0..1 (the official tables say percent); `references` are the answers people gave,
    normally ten.

    A question with a single answer counts as answered by one person: right or wrong. `official` is
    explained in the file's docstring. Raises DataError for empty or unequal input.
    """
    check_captions(predictions, references)
    per_example = np.array(
        [_question(one, several, official) for one, several in zip(predictions, references, strict=True)]
    )
    return Score(float(per_example.mean()), per_example)


def _question(prediction: str, answers: Sequence[str], official: bool) -> float:
    prediction, *answers = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers)
    )
    if not official or len(set(answers)) > 1:
        prediction, *answers = (normalise_answer(text, official) for text in (prediction, *answers))
    if len(answers) == 1:
        return float(prediction == answers[0])
    matches = Counter(answers)[prediction]
    # A person who gave it sees one fewer among the others.
    agreed = matches * min(1.0, (matches - 1) / 3) + (len(answers) - matches) * min(1.0, matches / 3)
    return agreed / len(answers)


def normalise_answer(text: str, official: bool = False) -> str:
    """One answer as VQA accuracy compares it."""
    return normalise_words(normalise_punctuation(text, official), official)


def normalise_punctuation(text: str, official: bool = False) -> str:
    """The first of the two official steps: marks and periods."""
    inside_number = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in _MARKS:
        if mark in text:
            beside_blank = f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if beside_blank or inside_number else " ")
    return _PERIOD.sub("", result, count=_PERIODS_REMOVED_OFFICIALLY if official else 0)


def normalise_words(text: str, official: bool = False) -> str:
    """The second official step: lower case, number words, articles, apostrophes."""
    table = _APOSTROPHES_OFFICIAL if official else _APOSTROPHES
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(table.get(word, word) for word in words if word not in _ARTICLES)
