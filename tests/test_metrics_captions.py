"""Caption metrics against the public reference implementations (golden/metrics), by hand, and by property."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.errors import DataError
from mplug2.metrics import bleu, cider, cider_d, cider_plain, document_frequencies, meteor, rouge_l
from mplug2.metrics.rouge import longest_common_subsequence

GOLDEN = Path(__file__).parent / "golden" / "metrics"
CORPORA = json.loads((GOLDEN / "captions.json").read_text())
CASES = {case["name"]: case for case in json.loads((GOLDEN / "degenerate.json").read_text())}
METRICS = {
    "ROUGE_L": lambda ours, theirs: rouge_l(ours, theirs, coco=True),
    "CIDEr": cider,
    "CIDErD": cider_d,
    "CIDEr_plain": cider_plain,
    "METEOR_exact_stem": meteor,
    "METEOR_exact": lambda ours, theirs: meteor(ours, theirs, form="exact"),
}
ALL = [rouge_l, cider, cider_d, cider_plain, meteor, bleu]

word = st.sampled_from("a the red blue circle square left of two three".split())
caption = st.lists(word, min_size=1, max_size=9).map(" ".join)
corpus = st.lists(st.tuples(caption, st.lists(caption, min_size=1, max_size=3)), min_size=1, max_size=6)


def split(items):
    return [item["candidate"] for item in items], [item["references"] for item in items]


@pytest.mark.parametrize("name", CORPORA)
def test_every_metric_equals_the_reference_implementation(name):
    golden = CORPORA[name]
    predictions, references = split(golden["items"])
    for metric, function in METRICS.items():
        score = function(predictions, references)
        assert score.value == pytest.approx(golden["corpus"][metric], abs=1e-9), metric
        expected = [item["scores"][metric] for item in golden["items"]]
        np.testing.assert_allclose(score.per_example, expected, atol=1e-9, err_msg=metric)
    score = bleu(predictions, references)
    names = [f"BLEU_{n}" for n in range(1, 5)]
    np.testing.assert_allclose(score.values, [golden["corpus"][name] for name in names], atol=1e-9)
    expected = [[item["scores"][name] for name in names] for item in golden["items"]]
    np.testing.assert_allclose(score.per_example, expected, atol=1e-9)
    for option in ("shortest", "average"):
        np.testing.assert_allclose(
            bleu(predictions, references, option).values, golden["corpus"][f"BLEU_{option}"], atol=1e-9
        )


@pytest.mark.parametrize("name", CASES)
def test_degenerate_corpora_score_as_the_reference_or_are_refused(name):
    predictions, references = split(CASES[name]["items"])
    results = CASES[name]["results"]
    for metric, function in METRICS.items():
        if "error" in results[metric]:
            with pytest.raises(DataError, match="all references are empty"):
                function(predictions, references)
        else:
            score = function(predictions, references)
            assert score.value == pytest.approx(results[metric]["corpus"], abs=1e-9), metric
            np.testing.assert_allclose(score.per_example, results[metric]["items"], atol=1e-9)
    score = bleu(predictions, references)
    for n in range(4):
        assert score.values[n] == pytest.approx(results[f"BLEU_{n + 1}"]["corpus"], abs=1e-9)


def test_rouge_by_default_parts_words_at_any_blank_and_gives_nothing_for_nothing():
    assert rouge_l([""], [[""]]).value == 0
    assert rouge_l([""], [[""]], coco=True).value == 1
    assert rouge_l(["a  red\tdog "], [["a red dog"]]).value == pytest.approx(1)
    assert rouge_l(["a  red dog"], [["a red dog"]], coco=True).value < 1


def test_bleu_of_a_worked_example():
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples; as long as the reference.
    score = bleu(["the cat sat on the mat"], [["the cat is on the mat"]])
    assert score.values[0] == pytest.approx(5 / 6, abs=1e-6)
    assert score.values[1] == pytest.approx(math.sqrt(5 / 6 * 3 / 5), abs=1e-6)
    assert score.values[2] == pytest.approx((5 / 6 * 3 / 5 * 1 / 4) ** (1 / 3), abs=1e-6)
    # Half as long as the reference: all right, times exp(1 - 2).
    assert bleu(["the cat"], [["the cat is here"]]).values[0] == pytest.approx(math.exp(-1), abs=1e-6)


def test_rouge_of_a_worked_example():
    # Longest common subsequence "police the gunman" of 4 and 4 words: P = R = 3/4.
    assert rouge_l(["police kill the gunman"], [["police killed the gunman"]]).value == pytest.approx(0.75)
    # P from the first reference (2/2), R from the second (1/1).
    assert rouge_l(["a b"], [["a b c d", "a"]]).value == pytest.approx(1)


def test_cider_of_a_worked_example():
    # Two examples with words of their own: identical captions of four words reach 10, of one word a quarter.
    assert cider(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]]).value == pytest.approx(10)
    assert cider(["a", "b"], [["a"], ["b"]]).value == pytest.approx(2.5)
    # CIDEr-D clips repetition (cosine 1 -> 1/2) and penalises the longer caption; the paper's CIDEr does not.
    assert cider_plain(["a a", "b"], [["a"], ["b"]]).per_example[0] == pytest.approx(2.5)
    assert cider_d(["a a", "b"], [["a"], ["b"]]).per_example[0] == pytest.approx(1.25 * math.exp(-1 / 72))


def test_cider_takes_the_frequencies_of_another_corpus():
    frequencies = document_frequencies([["a dog runs"], ["a cat sits"], ["two cats"]])
    assert (frequencies.examples, frequencies.counts[("a",)], frequencies.counts[("a", "cat")]) == (3, 2, 1)
    assert cider_d(["a dog runs"], [["a dog runs"]]).value == 0
    assert cider_d(["a dog runs"], [["a dog runs"]], frequencies).value == pytest.approx(7.5)


def test_meteor_of_a_worked_example():
    # "dogs" has the stem of "dog": weight 0.6. All matched in one piece: no penalty.
    score = meteor(["red dogs run"], [["red dog run"]])
    assert score.value == pytest.approx(2.6 / 3)
    # All matched, in as many pieces as words: 1 - 0.6.
    assert meteor(["run red"], [["red run"]]).value == pytest.approx(0.4)
    # "the" is a function word: P = 1 / 1.75 (weights 0.25, 0.75, 0.75), R = 1, two words, one piece.
    precision = 1 / 1.75
    harmonic = precision / (0.85 * precision + 0.15)
    assert meteor(["the dog barks"], [["the dog"]]).value == pytest.approx(harmonic * (1 - 0.6 * 0.5**0.2))
    assert meteor(["red dogs run"], [["red dog run"]], form="exact").value < score.value
    assert meteor(["red dog"], [["red dog"]]).value == 1


@settings(max_examples=40, deadline=None)
@given(corpus)
def test_no_metric_leaves_its_range_and_order_of_references_does_not_matter(pairs):
    predictions, references = [one for one, _ in pairs], [several for _, several in pairs]
    for function in ALL:
        score = function(predictions, references)
        assert -1e-9 <= score.value <= (10 if "cider" in function.__name__ else 1) + 1e-9
        assert len(score.per_example) == len(pairs)
        backwards = function(predictions, [several[::-1] for several in references])
        np.testing.assert_allclose(score.per_example, backwards.per_example, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(caption, min_size=1, max_size=6))
def test_a_caption_that_is_its_reference_scores_highest(captions):
    references = [[one] for one in captions]
    assert rouge_l(captions, references).value == pytest.approx(1)
    assert bleu(captions, references).values[0] == pytest.approx(1, abs=1e-6)
    assert meteor(captions, references).value == pytest.approx(1)
    others = captions[1:] + captions[:1]
    for function in (cider, cider_plain):
        best, other = function(captions, references), function(others, references)
        assert np.all(best.per_example >= other.per_example - 1e-9)


@given(st.lists(word, max_size=9), st.lists(word, max_size=9))
def test_the_longest_common_subsequence_agrees_with_the_textbook_table(one, other):
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    for row, ours in enumerate(one):
        for column, theirs in enumerate(other):
            longer = table[row, column] + 1
            table[row + 1, column + 1] = (
                longer if ours == theirs else max(table[row, column + 1], table[row + 1, column])
            )
    assert longest_common_subsequence(one, other) == table[-1, -1]


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize(
    ("predictions", "references", "reason"),
    [
        ([], [], "no predictions"),
        (["a"], [], "1 predictions were given for 0"),
        (["a"], [[]], "example 0 has no reference"),
        (["a"], ["a"], "example 0 are one string"),
        ("a", [["a"]], "single string"),
        ([1], [["a"]], "prediction 0 is int"),
        (["a"], [[None]], "example 0 is NoneType"),
    ],
)
def test_input_without_a_score_is_refused_with_the_reason(function, predictions, references, reason):
    with pytest.raises(DataError, match=reason):
        function(predictions, references)


def test_unknown_options_are_refused_with_the_nearest_name():
    with pytest.raises(DataError, match='did you mean "closest"'):
        bleu(["a"], [["a"]], "closets")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match='did you mean "exact"'):
        meteor(["a"], [["a"]], form="exakt")  # pyright: ignore[reportArgumentType]


def test_two_thousand_captions_are_scored_in_seconds():
    generator = np.random.default_rng(0)
    words = np.array(
        "a the red blue green circle square left right of above two three digit small large".split()
    )
    texts = [" ".join(generator.choice(words, size=8)) for _ in range(2000)]
    start = time.perf_counter()
    for function in (bleu, rouge_l, cider):
        function(texts, [[text] for text in reversed(texts)])
    assert time.perf_counter() - start < 5
