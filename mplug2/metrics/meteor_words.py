"""What METEOR 1.5 calls a word: the normalisation of its English texts, and which words count as function
words.

Independent of METEOR's own files (LGPL, not shipped): the rules were written from observed input and
output, and the list holds the words that the reference reports as function words among the common English
words asked about.
"""

import re

# Letters for this purpose: Latin and Cyrillic; every other character that is no digit is a symbol by itself.
_L = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u0527\u1d00-\u1d7f\ua640-\ua66e\ua67e-\ua697"
_N = "0-9"
_BEFORE = [
    (re.compile("[\u2018\u2019`]"), "'"),
    (re.compile("[\u201c\u201d]"), '"'),
    (re.compile("[\u2013\u2014]"), " - "),
    (re.compile("--"), "-"),
    (re.compile(r"(\.{2,})"), r" \1 "),
    (re.compile(rf"([^{_L}{_N}\s.',\-])"), r" \1 "),
    (re.compile(rf"([{_L}{_N}])-([{_L}{_N}])"), r"\1 \2"),
    (re.compile(rf"([^{_N}]),|,(?![{_N}])"), r"\1 , "),
    (re.compile(rf"([^{_L}])'([^{_L}])"), r"\1 ' \2"),
    (re.compile(rf"([^{_L}{_N}])'([{_L}])"), r"\1 ' \2"),
    (re.compile(rf"([{_L}])'([^{_L}])"), r"\1 ' \2"),
    (re.compile(rf"([{_L}])'([{_L}])"), r"\1 '\2"),
    (re.compile(rf"([{_N}])'(s)"), r"\1 '\2"),
]
_ACRONYM = re.compile(rf"(?:[{_L}]\.){{2,}}")
_FINAL_PERIOD = re.compile(r"(\S+)\.")
_ABBREVIATIONS = frozenset(
    """Adj Adm Adv Bart Bldg Brig Bros Capt Cmdr Col Comdr Con Corp Cpl Dr DR Drs Ens Gen Gov Hon Hosp Hr
    Insp Lt Maj Messrs Mlle MM Mme MR Mr Mrs MRS Ms MS Msgr Nos Nr Op Ord Pfc Ph Prof Pvt Rep Reps Res rev
    Rev Rt Sen Sens Sfc Sgt Sr St Supt Surg v vs A B C D E F G H I J K L M N O P Q R S T U V W X Y
    Z""".split()
)
_NUMBER_ABBREVIATIONS = frozenset(("Art", "No", "pp"))

FUNCTION_WORDS = frozenset(
    """a about after all also an and are as at be been but by can could first for from had has have he her
    his i if in into is it its last more new no not of on one or other out over people s said she so some
    than that the their there they this time to two up was we were what when which who will with would year
    years you 't . , ? : - -- ' " ( ) $ -lrb- -rrb-""".split()
)


def meteor_words(text: str) -> list[str]:
    """The lower-case words that METEOR compares, punctuation kept as words of its own."""
    return [word.lower() for word in normalise(text)]


def normalise(text: str) -> list[str]:
    """The words of a text as METEOR's `-norm` splits it, case kept."""
    text = f" {text} "
    for pattern, replacement in _BEFORE:
        text = pattern.sub(replacement, text)
    words = text.split()
    result: list[str] = []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        if _ACRONYM.fullmatch(word):
            result.append(word.replace(".", ""))
        elif (
            word.strip(".")
            and (final := _FINAL_PERIOD.fullmatch(word))
            and not _keeps_period(final.group(1), following)
        ):
            result += [final.group(1), "."]
        else:
            result.append(word)
    return result


def _keeps_period(word: str, following: str) -> bool:
    if "." in word and any(map(str.isalpha, word)):
        return True
    if word in _ABBREVIATIONS or following[:1].islower():
        return True
    return word in _NUMBER_ABBREVIATIONS and following[:1].isdecimal()
