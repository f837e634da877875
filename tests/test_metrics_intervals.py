"""Intervals: worked examples, properties, and how often they hold the truth, by simulation."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2.caption_scores import caption_scores
from mplug2.errors import DataError
from mplug2.metrics import bootstrap, interval, jackknife, wilson


def found(values, groups=None, **options):
    bounds = interval(values, groups, **options)
    assert bounds is not None
    return bounds


# --- worked examples


def test_wilsons_interval_is_that_of_the_textbook():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson(1.0, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(0.0, 1) == pytest.approx((0.0, 0.7934507), abs=1e-6)


def test_all_right_is_not_certain():
    low, high = found(np.ones(114))
    assert low == pytest.approx(0.9674, abs=1e-4) and high == 1.0
    assert found(np.zeros(114)) == pytest.approx((1 - high, 1 - low))


def test_one_answer_says_little():
    assert found([1.0]) == pytest.approx((0.2065, 1.0), abs=1e-4)


def test_questions_about_one_video_count_as_fewer_than_about_many():
    right = np.repeat([1.0, 0.0], 50)  # each video's five answers are all right or all wrong
    alone, together = found(right), found(right, np.repeat(np.arange(20), 5))
    assert together.high - together.low > 2 * (alone.high - alone.low)
    expected = wilson(0.5, 19 * (1.959964 / 2.093024) ** 2)  # 20 videos, of which the variance costs one
    assert together == pytest.approx(expected, abs=1e-6)
    shuffled = np.random.default_rng(0).permutation(100)
    np.testing.assert_allclose(found(right[shuffled], np.repeat(np.arange(20), 5)[shuffled]), together)


def test_all_right_about_one_video_is_one_draw():
    assert found(np.ones(50), ["a video"] * 50) == found([1.0])


def test_what_no_other_sample_bounds_has_no_interval():
    assert interval([0.3]) is None and interval([0.4, 0.5], ["a video"] * 2) is None
    assert interval([0.5, 0.5, 0.5]) is None
    assert jackknife(lambda indices: 0.5, 1) is None


def test_a_score_from_0_to_10_is_bounded_by_10():
    low, high = found(np.full(20, 10.0), most=10.0)
    assert (low, high) == pytest.approx((10 * found(np.ones(20)).low, 10.0))


@pytest.mark.parametrize("rounded", [10 + 2e-15, 10 - 2e-15])
def test_a_perfect_score_that_rounding_moved_is_no_more_certain(rounded):
    low, high = found([10.0, rounded, 10.0], most=10.0)
    assert (low, high) == pytest.approx((10 * found(np.ones(3)).low, 10.0))
    assert interval([0.3, 0.1 + 0.2]) is None


@pytest.mark.parametrize("half", [0.9, 0.5])
def test_one_answer_less_than_perfect_among_many_leaves_as_much_open(half):
    low, high = found([*np.ones(999), half])
    assert high > 0.9999 and low < found(np.ones(1000)).low


@pytest.mark.parametrize("short", [1e-10, 1e-5])
def test_a_corpus_score_that_is_never_quite_perfect_nor_nothing_is_not_certain(short):
    # BLEU adds 1e-9 to its counts: of 4 to 9 captions, all perfect or all without a common word
    for score, end in ((lambda some: 1 - short / len(some), 1.0), (lambda some: short / len(some), 0.0)):
        bounds = jackknife(score, 20)
        assert bounds == pytest.approx(found(np.full(20, end)), abs=1e-4)


def test_perfect_captions_have_intervals_that_tell_how_few_they_are():
    words = "a red cat sits on the mat and two dogs run in a big field today as it rains".split()
    captions = [" ".join(words[start : start + 5 + start % 3]) for start in range(12)]
    for name, score in caption_scores(captions, [[one] for one in captions], [], meteor=True).items():
        most = 10 if name == "/cider" else 1
        assert score.value == pytest.approx(most) and score.low is not None
        assert 0.6 * most < score.low < 0.9 * most, name


def test_groups_that_are_no_names_and_values_without_bounds_are_refused_in_a_sentence():
    unnamed: Any = ([[1], [2]], np.zeros((2, 2)))
    for groups in unnamed:
        with pytest.raises(DataError, match="no name"):
            interval([0.0, 1.0], groups)
    with pytest.raises(DataError, match="infinity"):
        interval([np.inf, 0.0])
    assert jackknife(lambda indices: 0.5, 0) is None


def test_a_jackknife_of_few_parts_is_as_wide_as_students_t():
    values = np.random.default_rng(1).uniform(0.3, 0.7, 10)
    bounds = jackknife(lambda indices: float(values[indices].mean()), 10)
    assert bounds is not None
    half = 2.262157 * values.std(ddof=1) / 10**0.5  # of ten parts: nine degrees of freedom
    assert (bounds.high - bounds.low) / 2 == pytest.approx(half, rel=0.02)


def test_a_jackknife_leaves_out_videos_whole():
    videos, left_out = np.repeat(np.arange(30), 3), []
    jackknife(lambda indices: left_out.append(set(indices)) or 0.5, 90, videos.tolist())
    for indices in left_out[1:]:
        gone = sorted(set(range(90)) - indices)
        assert len(gone) == 9 and all((videos[gone] == video).sum() == 3 for video in set(videos[gone]))


def test_the_interval_is_that_of_the_normal_approximation_for_many_examples():
    values = np.random.default_rng(3).exponential(1.0, 1000)
    half = 1.96 * values.std() / 1000**0.5
    assert bootstrap(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


def test_the_interval_depends_on_the_seed_only():
    values = np.random.default_rng(1).random(50)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3) != bootstrap(values, seed=4)


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=20))
@settings(deadline=None, max_examples=50)
def test_an_interval_holds_the_score_lies_in_its_range_and_widens_with_coverage(drawn):
    values, groups = [one for one, _ in drawn], [group for _, group in drawn]
    for sample in (values, np.round(values)):
        bounds, wide = interval(sample, groups), interval(sample, groups, coverage=0.99)
        if bounds is not None and wide is not None:
            assert -1e-9 <= wide.low <= bounds.low + 1e-9 and bounds.high <= wide.high + 1e-9 <= 1 + 2e-9
            if set(sample) <= {0.0, 1.0}:
                assert bounds.low <= np.mean(sample) <= bounds.high


def test_a_sample_without_a_mean_is_refused():
    for values, reason in (([], "non-empty"), ([1.0, float("nan")], "NaN"), (np.ones((2, 2)), "shape")):
        with pytest.raises(DataError, match=reason):
            interval(values)
    with pytest.raises(DataError, match="coverage is 2"):
        interval([1.0], coverage=2)
    with pytest.raises(DataError, match="groups are given for 1 examples; there are 2 values"):
        interval([1.0, 0.0], ["a"])


# --- how often they hold the truth


@pytest.mark.parametrize(
    "truth, videos, questions",
    [(0.5, 100, 1), (0.95, 40, 1), (0.99, 114, 1), (0.7, 30, 5), (0.95, 60, 4), (0.5, 8, 5)],
)
def test_nineteen_of_twenty_intervals_of_a_share_hold_the_truth(truth, videos, questions):
    """Videos differ: the answers about one are right with a probability of its own, in the mean `truth`."""
    rng, groups, held, trials = np.random.default_rng(0), np.repeat(np.arange(videos), questions), 0, 2000
    for _ in range(trials):
        chances = (
            truth if questions == 1 else np.repeat(rng.beta(2 * truth, 2 * (1 - truth), videos), questions)
        )
        low, high = found((rng.random(len(groups)) < chances).astype(float), groups.tolist())
        held += low <= truth <= high
    assert held / trials >= 0.93, held / trials


@pytest.mark.parametrize("count, questions", [(8, 1), (30, 1), (20, 3)])
def test_nineteen_of_twenty_intervals_of_a_mean_hold_the_truth(count, questions):
    rng, held, trials = np.random.default_rng(0), 0, 400
    groups = np.repeat(np.arange(count), questions).tolist()
    for _ in range(trials):
        videos = np.repeat(rng.uniform(0.2, 0.6, count), questions)
        low, high = found(videos + rng.uniform(-0.2, 0.2, len(videos)), groups)
        held += low <= 0.4 <= high
    assert held / trials >= 0.92, held / trials


def test_nineteen_of_twenty_jackknifes_hold_the_truth():
    rng, held, trials = np.random.default_rng(0), 0, 500
    for _ in range(trials):
        values = rng.uniform(0, 1, 50)
        bounds = jackknife(lambda indices, values=values: float(values[indices].mean()), 50)
        assert bounds is not None
        held += bounds.low <= 0.5 <= bounds.high
    assert held / trials >= 0.93, held / trials
