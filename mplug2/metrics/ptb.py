"""Penn Treebank tokens of a caption: raw text -> lower-case words, most punctuation removed.

The caption metrics are defined on the output of the tokenizer of pycocoevalcap (Stanford CoreNLP 3.4.1, run
with `-preserveLines -lowerCase`, then seventeen kinds of punctuation token removed). This lexer aims at the
same tokens; its rules were fitted to that program's output. At every position all rules are tried and the
longest match wins, the earlier rule among equals; context that a rule needs counts as part of the match but
is not consumed.

A text is tokenised on its own, as if an empty line followed. Three behaviours of the original are therefore
left out as defects: rules that look across the end of a caption into the next one, rules that fail at the
end of the input (`they'll` as the last word of the last caption), and captions that lose their tail and
shift all later ones because they hold a carriage return, vertical tab, form feed, U+2028 or U+2029 (here
these separate words).
"""

import re
from collections.abc import Callable, Iterable
from functools import cache

from mplug2.metrics.ptb_characters import DIGIT, LETTER, SPACE, SYMBOL

REMOVED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that the reference drops after lower-casing; brackets are lower-case by then and stay."""

# Abbreviations by what their period does. Before the start of a sentence (a blank and a capital, or the end
# of the text) "ends" gives the period twice ("inc." "."); "stays" never does; "number" keeps it only before a
# digit.
_ENDS = """al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq
est etc ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev
nov oct okla penn plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc
wyo"""
_ENDS_CAPITAL = "ark az del ill la mass miss ore pa tex wash"
_ENDS_NOT_UPPER = "pte ptes pty ptys"
_STAYS = """adj adm adv assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr drs elec
ens ft gen gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms mt natl pfc ph pres prof profs
pvt rep reps rev sen sens sfc sgt spc st ste supt supts treas vs wm"""
_STAYS_NOT_UPPER = "mfg mtg"
_NUMBER = "art ca fig figs no nos op pp prop"
# A caption goes on with one of these after "U.S." or "A.": a new sentence began, so that was also its end.
_STARTERS = """A About According Additionally After An And As At But Earlier He Her Here However If In It
Last Many More Mr Ms Now Once One Other Our She Since So Some Such That The Their Then There These They This
We When While What Yet You"""
_QUOTES = {
    "\u201e": "\u201e",
    "`": "`\u2018\u201b\u2039\u0091",
    "'": "\u2019\u203a\u0092",
    "``": "\u201c\u00ab\u0093",
    "''": "\u201d\u00bb\u0094",
}
_CURLY = "".join(_QUOTES.values())
_PLAIN_QUOTE = {character: plain for plain, characters in _QUOTES.items() for character in characters}
_ASSIMILATED = {
    "cannot": 3,
    "gonna": 3,
    "gotta": 3,
    "lemme": 3,
    "gimme": 3,
    "wanna": 3,
    "'tis": 2,
    "'twas": 2,
}


def _any(words: str) -> str:
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


def _cased(words: str, *forms: Callable[[str], str]) -> str:
    return _any(" ".join(form(word) for word in words.split() for form in forms))


L, D, S = f"[{LETTER}]", f"[{DIGIT}]", f"[{SPACE}]"
W = f"[{LETTER}{DIGIT}]"
A = "['\u2019\u0092]"
_SMILE = r"[<>]?[:;=][\-o*']?[()DPdpO\\{@|\[\]]"
_EYE, _CHEEK = r"[\-\^x=~<>']", r"[\^x=~<>']"
_SENTENCE = rf"(?:{S}|\n)(?:{S}|\n|[A-Z]|</?[A-Za-z!?])"
_STARTER = rf"(?:{S}|\n)(?:{S}|\n|{_any(_STARTERS)}(?![A-Za-z]))"
_ENDING = "|".join(
    [
        f"(?i:{_any(_ENDS)})",
        _cased(_ENDS_CAPITAL, str.capitalize, str.upper),
        _cased(_ENDS_NOT_UPPER, str.lower, str.capitalize),
        r"(?i:(?:ph|ed)\.d)",
    ]
)
_STAYING = f"(?i:{_any(_STAYS)})|{_cased(_STAYS_NOT_UPPER, str.lower, str.capitalize)}"
_URL_PATH = r'(?:/[^ \t\n"<>|()]+[^ \t\n"<>|.!?(){},\-])'
_MAIL = r'[^ \t\n"<>|(){}\u00a0]'
_FRACTION = rf"(?:{D}{{1,4}}[- \u00a0])?{D}{{1,4}}[/\u2044]{D}{{1,4}}"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"

# (pattern, kind). Group 1 is the token, what follows it in the pattern is context. Kinds: "word" as it is,
# "period" the token and one more ".", "clitic" with a plain apostrophe, "quotes" as plain ones, otherwise the
# literal replacement.
_RULES: list[tuple[str, str]] = [
    (
        rf"(</?[A-Za-z][A-Za-z0-9:.\-]*(?:{S}+[A-Za-z][\w:.\-]*(?:={S}*(?:'[^'\n]*'|\"[^\"\n]*\"))?)*{S}*/?>)",
        "word",
    ),
    (r"(<[!?][A-Za-z\-][^>\n]*>)", "word"),
    (r"(&(?:mdash|ndash|MD);|[\u2013\u2014\u2015\u0096\u0097])", "--"),
    (r"(&amp;)", "&"),
    (r"(&lt;)", "<"),
    (r"(&gt;)", ">"),
    (r'(&quot;|["\u00ab\u00bb\u201c\u201d\u0093\u0094])', "''"),
    (r"(&nbsp;)", ""),
    (r"(&[aeiouAEIOU](?:acute|grave|uml);|&#[0-9]+;)", "word"),
    (rf"((?:{L}*[A-MO-Za-mo-z])?(?=[nN]{A}[tT](?![A-Za-z])))(?<=.)[nN]{A}[tT]", "word"),
    (rf"([nN]{A}[tT])[^A-Za-z]", "clitic"),
    (rf"({A}(?i:[msd]|re|ve|ll))[^A-Za-z]", "clitic"),
    (r"([\u2019\u0092](?i:[msd]|re|ve|ll))", "clitic"),
    (rf"({A}[nN]{A}?)", "word"),
    (rf"([lLdDjJ]{A})", "word"),
    (rf"([Ss]omethin{A}|[Oo]l{A}|[Dd]unkin{A})", "word"),
    (r"('[tT](?:[iI][sS]|[wW][aA][sS]))", "word"),
    (r"(-(?:[LR][RSC]B|[lr][rsc]b)-)", "word"),
    (rf"({A}em|{A}[Tt]ill?|{A}cause|{A}[2-9]0s|[Cc]{A}mon|[Cc]ap{A}n|[Ee]{A}er)", "word"),
    (rf"({L}{W}*){A}(?i:[msd]|re|ve|ll)", "word"),
    (rf"([Yy]{A}){L}", "clitic"),
    (rf"({L}+[aeiouyAEIOUY](?:{A}|`)[aeiouA-Z]{L}*)", "word"),
    (rf"([dDoOlL]{A}{L}+)", "word"),
    (rf"({A}[0-9][0-9])(?:{S}|\n)", "word"),
    (r"(')[A-Za-z]\S", "'"),
    (r'(https?://[^\s"<>|()]+[^\s"<>|.!?(){},\-])', "word"),
    (r'((?:www|WWW)\.(?:[^\s"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}' + _URL_PATH + "?)", "word"),
    (r"((?:[^\s\"`'|!?(){}$,-_]+\.)+(?:com|net|org|edu|COM|NET|ORG|EDU)" + _URL_PATH + "?)", "word"),
    (rf"(<?[a-zA-Z0-9]{_MAIL}*@(?:(?!\.){_MAIL}+?\.)*(?:(?!\.){_MAIL})+>?)", "word"),
    (r"(@[a-zA-Z_][a-zA-Z_0-9]*)", "word"),
    (rf"(#{L}+)", "word"),
    (rf"({L}{W}*(?:[.!?]{L}{W}*)*)", "word"),
    (rf"([\-+]?(?:{D}+(?:[.:,\u00ad\u066b\u066c]{D}+)*|(?:[.:,]{D}+)+))", "word"),
    (r"([\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+))", "word"),
    (rf"({_FRACTION})", "word"),
    (rf"({D}{{1,2}}[\-/]{D}{{1,2}}[\-/]{D}{{2,4}})", "word"),
    (
        r"((?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[\- \u00a0])?[0-9]{2,4}[\- \u00a0])"
        r"[0-9]{3,4}[\- \u00a0]?[0-9]{3,5})",
        "word",
    ),
    (r"([A-Za-z0-9][A-Za-z0-9.,_\u00ad]*(?:-(?:" + _ACRONYM + r"\.|[A-Za-z0-9\u00ad]+))+)", "word"),
    (r"([A-Za-z0-9]+(?:_[A-Za-z0-9]+)*)", "word"),
    (rf"({_SLASHED}(?:/{_SLASHED}){{1,2}})", "word"),
    (r"([A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)", "word"),
    (r"([A-Z]*\$)", "word"),
    (r"([Cc]\+\+|[CcFf]#)", "word"),
    (rf"((?:{_ENDING})\.){_SENTENCE}", "period"),
    (rf"((?:{_ENDING})\.)", "word"),
    (rf"({_ACRONYM}\.){_STARTER}", "period"),
    (rf"({_ACRONYM}\.|{_ACRONYM})", "word"),
    (rf"([A-Za-z])\.(?:{S}|\n){_any(_STARTERS)}(?![A-Za-z])", "word"),
    (rf"((?:[A-Za-z]|{_STAYING})\.)", "word"),
    (rf"((?i:{_any(_NUMBER)})\.){S}?{D}", "word"),
    (rf"({W}+\.)[,;:\u3001]", "word"),
    (rf"({_SMILE})[^A-Za-z0-9]", "word"),
    (rf"({_EYE}_{_EYE}|\({_EYE}[_.]?{_EYE}\)|\({_CHEEK}-{_CHEEK}\))", "word"),
    (rf"(\.\.\.+|\.(?:{S}\.){{2,}}|[\u2026\u0085])", "..."),
    (r"((?i:pro|anti)-)", "word"),
    (r"(--+)", "--"),
    (r"((?:\\\*)+|\*\*+|##+|@@|<<|>>)", "word"),
    (rf"([{_CURLY}]{{2}})", "quotes"),
    (r"([!?]+)", "word"),
    (r"(_+)", "word"),
    (r"(``|''|`|[\u2018\u2019\u201b\u2039\u203a\u0091\u0092]|')", "'"),
    (r"([\u20ac\u20a0\u00a4\u0080])", "$"),
    (r"(\u00a3)", "#"),
    (r"(\u00a2)", "cents"),
    (r"(\()", "-lrb-"),
    (r"(\))", "-rrb-"),
    (r"(\[)", "-lsb-"),
    (r"(\])", "-rsb-"),
    (r"(\{)", "-lcb-"),
    (r"(\})", "-rcb-"),
    (rf"([!-/:-@\[-`{{-~{SYMBOL}])", "word"),
]
_VULGAR = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_RULES += [(f"({character})", plain) for character, plain in _VULGAR.items()]


@cache
def _compiled() -> list[tuple[re.Pattern[str], str]]:
    """The rules, compiled on first use: it takes a tenth of a second."""
    return [(re.compile(pattern, re.DOTALL), kind) for pattern, kind in _RULES]


# Almost every word of a caption is this: letters up to a blank. No rule that starts with a letter crosses a
# blank without a period, so the long way round is needed only for the assimilated words.
_SIMPLE_WORD = re.compile(r"([A-Za-z]+)[ \n]")
_BLANKS = re.compile(rf"(?:{S}|[\n\r\v\f\u2028\u2029\u200b])+")


def _longest(text: str, position: int) -> tuple[str, str]:
    best, token, kind = 0, "", ""
    for pattern, its_kind in _compiled():
        match = pattern.match(text, position)
        if match and match.end() - position > best:
            best, token, kind = match.end() - position, match.group(1), its_kind
    return token, kind


def treebank_tokens(text: str) -> list[str]:
    """Lower-case tokens of one text, punctuation included; quotes appear as `'` or `''` whatever their
    direction.
    """
    text += "\n\n"
    tokens: list[str] = []
    position = 0
    while position < len(text):
        blank = _BLANKS.match(text, position)
        if blank:
            position = blank.end()
            continue
        simple = _SIMPLE_WORD.match(text, position)
        if simple and simple.group(1).lower() not in _ASSIMILATED:
            tokens.append(simple.group(1).lower())
            position = simple.end(1)
            continue
        token, kind = _longest(text, position)
        if not token:
            position += 1
            continue
        position += len(token)
        tokens += _written(token, kind)
    return tokens


def _written(token: str, kind: str) -> list[str]:
    """What the output shows for a matched token of that kind."""
    if kind == "word" or kind == "period":
        word = token.replace("\u00ad", "").lower()
        split = _ASSIMILATED.get(word.replace("\u2019", "'") if word[:1] != "\u2019" else word)
        if split:
            return [word[:split], word[split:]]
        word = word.replace(" ", "\u00a0").replace("(", "-lrb-").replace(")", "-rrb-")
        return [word, "."] if kind == "period" else [word] if word else []
    if kind == "quotes":
        return ["".join(_PLAIN_QUOTE[character] for character in token)]
    if kind == "clitic":
        return [re.sub(A, "'", token).lower()]
    return [kind] if kind else []


def tokenize(text: str) -> str:
    """One caption as the scorers want it: lower-case words joined by single blanks, without plain
    punctuation.
    """
    return " ".join(token for token in treebank_tokens(text) if token not in REMOVED)


def tokenize_all(texts: Iterable[str]) -> list[str]:
    """`tokenize` of each text; equal texts are worked out once."""
    seen: dict[str, str] = {}
    for text in (texts := list(texts)):
        if text not in seen:
            seen[text] = tokenize(text)
    return [seen[text] for text in texts]
