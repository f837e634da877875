"""The English Snowball stemmer ("Porter 2"), written from its published description (snowballstem.org).

A word is lower-case without blanks; anything that is not made of letters comes back unchanged but for its
suffix.
"""

import re
from functools import lru_cache

_VOWEL = "[aeiouy]"
_EXCEPTIONS = {
    word: result
    for word, _, result in (
        pair.partition(":")
        for pair in """skis:ski skies:sky dying:die lying:lie tying:tie idly:idl gently:gentl ugly:ugli
        early:earli only:onli singly:singl sky:sky news:news howe:howe atlas:atlas cosmos:cosmos bias:bias
        andes:andes""".split()
    )
}
_AFTER_STEP_1A = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
_STEP_2 = [
    pair.split(":")
    for pair in """ational:ate ization:ize fulness:ful ousness:ous iveness:ive tional:tion biliti:ble
    lessli:less entli:ent ation:ate alism:al aliti:al ousli:ous iviti:ive fulli:ful enci:ence anci:ance
    abli:able izer:ize ator:ate alli:al bli:ble ogi:og li:""".split()
]
_STEP_3 = [
    pair.split(":")
    for pair in "ational:ate tional:tion alize:al icate:ic iciti:ic ative: ical:ic ness: ful:".split()
]
_STEP_4 = "ement ance ence able ible ment ant ent ism ate iti ous ive ize ion al er ic".split()
_REGION = re.compile("[aeiouy][^aeiouy]")
_SHORT_END = re.compile("(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])$")


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """The stem of one lower-case English word."""
    if len(word) <= 2:
        return word
    if word in _EXCEPTIONS:
        return _EXCEPTIONS[word]
    word = word.removeprefix("'")
    word = re.sub("^y|(?<=[aeiouy])y", "Y", word)
    first, second = _regions(word)
    word = _step_1a(word)
    if word in _AFTER_STEP_1A:
        return word
    word = _step_1b(word, first)
    if len(word) > 2 and word[-1] in "yY" and word[-2] not in "aeiouy":
        word = word[:-1] + "i"
    word = _step_2(word, first)
    word = _step_3(word, first, second)
    word = _step_4(word, second)
    word = _step_5(word, first, second)
    return word.replace("Y", "y")


def _regions(word: str) -> tuple[int, int]:
    """Where R1 and R2 begin: after the first consonant that follows a vowel, and the same again within R1."""
    prefix = re.match("gener|commun|arsen", word)
    found = prefix or _REGION.search(word)
    first = found.end() if found else len(word)
    found = _REGION.search(word, first)
    return first, found.end() if found else len(word)


def _step_1a(word: str) -> str:
    for ending in ("'s'", "'s", "'"):
        if word.endswith(ending):
            word = word.removesuffix(ending)
            break
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    if word.endswith(("us", "ss")):
        return word
    if word.endswith("s") and re.search(_VOWEL, word[:-2]):
        return word[:-1]
    return word


def _step_1b(word: str, first: int) -> str:
    for ending in ("eedly", "eed"):
        if word.endswith(ending):
            return word.removesuffix(ending) + "ee" if len(word) - len(ending) >= first else word
    for ending in ("ingly", "edly", "ing", "ed"):
        if word.endswith(ending):
            rest = word.removesuffix(ending)
            if not re.search(_VOWEL, rest):
                return word
            if rest.endswith(("at", "bl", "iz")):
                return rest + "e"
            if rest.endswith(("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")):
                return rest[:-1]
            return rest + "e" if len(rest) <= first and _SHORT_END.search(rest) else rest
    return word


def _step_2(word: str, first: int) -> str:
    for ending, replacement in _STEP_2:
        if word.endswith(ending):
            rest = word.removesuffix(ending)
            fits = len(rest) >= first
            if ending == "ogi":
                fits = fits and rest.endswith("l")
            if ending == "li":
                fits = fits and rest[-1:] in tuple("cdeghkmnrt")
            return rest + replacement if fits else word
    return word


def _step_3(word: str, first: int, second: int) -> str:
    for ending, replacement in _STEP_3:
        if word.endswith(ending):
            rest = word.removesuffix(ending)
            return rest + replacement if len(rest) >= (second if ending == "ative" else first) else word
    return word


def _step_4(word: str, second: int) -> str:
    for ending in _STEP_4:
        if word.endswith(ending):
            rest = word.removesuffix(ending)
            fits = len(rest) >= second and (ending != "ion" or rest.endswith(("s", "t")))
            return rest if fits else word
    return word


def _step_5(word: str, first: int, second: int) -> str:
    if word.endswith("e"):
        rest = word[:-1]
        if len(rest) >= second or (len(rest) >= first and not _SHORT_END.search(rest)):
            return rest
    elif word.endswith("ll") and len(word) - 1 >= second:
        return word[:-1]
    return word
