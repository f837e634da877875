"""What METEOR compares: normalised words, stems and function words, as the reference program has them."""

import json
from pathlib import Path

import pytest

from mplug2.metrics.meteor_words import FUNCTION_WORDS, normalise
from mplug2.metrics.stemmer import stem

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics" / "meteor_parts.json").read_text())


def test_texts_are_normalised_as_the_reference_does():
    assert [" ".join(normalise(text)) for text, _ in GOLDEN["normalise"]] == [
        want for _, want in GOLDEN["normalise"]
    ]


def test_words_have_the_reference_stems():
    assert [stem(word) for word, _, _ in GOLDEN["words"]] == [want for _, want, _ in GOLDEN["words"]]


def test_function_words_are_the_reference_ones():
    assert [word for word, _, function in GOLDEN["words"] if (word in FUNCTION_WORDS) != function] == []


PUBLISHED = """caresses:caress ties:tie cries:cri gas:gas this:this kiwis:kiwi luxuriated:luxuri hopping:hop
hoping:hope agreed:agre relational:relat conditional:condit hopefulness:hope generously:generous skies:sky
communism:communism dying:die succeeding:succeed adjustment:adjust rate:rate controlled:control youth:youth
sayings:say analogy:analog""".split()


@pytest.mark.parametrize("pair", PUBLISHED)
def test_a_published_example_of_the_stemmer_holds(pair):
    word, expected = pair.split(":")
    assert stem(word) == expected
