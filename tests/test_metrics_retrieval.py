"""Recall@k: golden matrices, worked examples, properties."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2.errors import DataError
from mplug2.metrics import recall_at_k

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics" / "retrieval.json").read_text())


@pytest.mark.parametrize("matrix", GOLDEN, ids=lambda matrix: matrix["name"])
@pytest.mark.parametrize("ties", ["lower_index_first", "optimistic", "pessimistic"])
def test_ranks_and_recalls_equal_the_oracle(matrix, ties):
    scores, image_of = np.array(matrix["scores"]), matrix["text_to_image_index"]
    texts_of = [[text for text, image in enumerate(image_of) if image == one] for one in range(len(scores))]
    for name, result in (
        ("image_to_text", recall_at_k(scores, texts_of, ties=ties)),
        ("text_to_image", recall_at_k(scores.T, image_of, ties=ties)),
    ):
        expected = matrix["results"][ties][name]
        assert result.ranks.tolist() == expected["ranks"]
        assert result.at == {k: pytest.approx(expected[f"R@{k}"]) for k in (1, 5, 10)}
        assert (result.median_rank, result.mean_rank) == pytest.approx(
            (expected["median_rank"], expected["mean_rank"])
        )


def test_the_three_tie_rules_of_a_constant_score():
    same = np.ones((2, 4))
    assert recall_at_k(same, [2, 0]).ranks.tolist() == [3, 1]
    assert recall_at_k(same, [2, 0], ties="optimistic").ranks.tolist() == [1, 1]
    assert recall_at_k(same, [2, 0], ties="pessimistic").ranks.tolist() == [4, 4]


def test_positives_may_be_indices_lists_or_a_mask():
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    mask = np.array([[False, True, False], [False, False, True]])
    for positives in ([1, 2], [[1], [2]], np.array([1, 2]), mask):
        result = recall_at_k(scores, positives, ks=(1, 2, 100))
        assert (result.ranks.tolist(), result.gallery) == ([1, 3], 3)
        assert result.at == {1: 0.5, 2: 0.5, 100: 1.0}
    assert recall_at_k(scores, [1, 2]).hits(1).tolist() == [1, 0]


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 6))
def test_recall_grows_with_k_and_the_bounds_enclose_the_default(seed, queries, candidates):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, size=(queries, candidates))
    positives = generator.integers(0, candidates, size=queries)
    low, default, high = (
        recall_at_k(scores, positives, ks=(1, 2, 3), ties=ties)
        for ties in ("pessimistic", "lower_index_first", "optimistic")
    )
    assert np.all((high.ranks <= default.ranks) & (default.ranks <= low.ranks))
    assert default.at[1] <= default.at[2] <= default.at[3] <= 1


@pytest.mark.parametrize(
    ("similarity", "positives", "ks", "reason"),
    [
        (np.zeros((0, 3)), [], (1,), "shape"),
        (np.zeros((2, 3)), [0], (1,), "given for 1 queries"),
        (np.zeros((2, 3)), [0, 3], (1,), "query 1 has positives"),
        (np.zeros((2, 3)), [[0], []], (1,), "query 1 has no right candidate"),
        (np.full((1, 2), np.nan), [0], (1,), "NaN"),
        (np.zeros((1, 2)), [0], (0,), "each 1 or more"),
        (np.zeros((1, 2)), np.ones((1, 3), dtype=bool), (1,), "positives have shape"),
    ],
)
def test_input_without_a_rank_is_refused_with_the_reason(similarity, positives, ks, reason):
    with pytest.raises(DataError, match=reason):
        recall_at_k(similarity, positives, ks)


def test_an_unknown_tie_rule_is_refused_with_the_nearest_name():
    with pytest.raises(DataError, match='did you mean "optimistic"'):
        recall_at_k(np.zeros((1, 2)), [0], ties="optimist")  # pyright: ignore[reportArgumentType]
