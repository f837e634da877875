"""Which characters a Penn Treebank token may hold: classes for regular expressions, Basic Multilingual
Plane only.

Found by passing every character through the reference tokenizer between two letters (`a?b`): it joins them
(a letter, or a mark treated as one), stands by itself (a symbol), or vanishes as unknown. Letters added to
Unicode after the reference's release count as letters here too. Everything in no class is dropped, like all
that lies outside the plane.
"""

import unicodedata


def _ranges(table: str) -> str:
    """`61-7a e9` -> the inside of a character class."""
    ends = (item.partition("-") for item in table.split())
    return "".join(f"\\u{int(low, 16):04x}-\\u{int(high or low, 16):04x}" for low, _, high in ends)


def _letters() -> str:
    """The inside of a character class with every letter of the plane."""
    codes = [code for code in range(0x10000) if unicodedata.category(chr(code))[0] == "L"]
    starts = [code for code, before in zip(codes, [-2, *codes[:-1]], strict=True) if code != before + 1]
    stops = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if code + 1 != after]
    return "".join(f"\\u{low:04x}-\\u{high:04x}" for low, high in zip(starts, stops, strict=True))


_MARKS = """
2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 384-385 3f6 483-487 55a-55f 58a 591-5bd 5bf 5c1-5c2 5c4-5c5 5c7
615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74a 7a6-7b0 7eb-7f3 900-903 93c 93e-94e 951-955
962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3 a01-a03 a3c a3e-a42 a47-a48 a4b-a4d a81-a83 abc
abe-ac5 ac7-ac9 acb-acd b82 bbe-bc2 bc6-bc8 bca-bcd c01-c03 c3e-c44 c46-c48 c4a-c4d c55-c56 d3e-d44 d46-d48
e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd 1885-1886 2010-2011
"""
_DIGIT_ZEROS = """
660 6f0 7c0 966 9e6 a66 ae6 b66 be6 c66 ce6 d66 e50 ed0 f20 1040 1090 17e0 1810 1946 19d0 1a80 1a90 1b50
1bb0 1c40 1c50 a620 a8d0 a900 a9d0 aa50 abf0 ff10
"""
_SYMBOLS = """
a1 a5-a9 ac ae-b1 b4 b6-b8 bf d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4 600-603 606-60c 614 61b 61e-61f 66a
66d 6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017 201a 201e-2023 2030-2038 203b 203e-2042 2044
2074-207e 2080-208e 20a4 2100-2101 2103-2106 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e
213a-213b 2140-2144 214a-214d 214f 2155-215e 2190-2bff 3001-3002 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40
ff5b-ff65 ffe0-ffe1 ffe5-ffe6
"""

LETTER = _letters() + _ranges(_MARKS) + "\u00ad"
DIGIT = "0-9" + "".join(f"\\u{int(zero, 16):04x}-\\u{int(zero, 16) + 9:04x}" for zero in _DIGIT_ZEROS.split())
SYMBOL = _ranges(_SYMBOLS)
SPACE = " \t\u00a0\u2000-\u200a\u3000"
