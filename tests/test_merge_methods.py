"""Merging methods on arrays small enough to merge by hand, and the laws that hold of any arrays."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mplug2.errors import CardError
from mplug2.hub import merge_methods as methods
from mplug2.hub.merge_methods import METHODS, Breadcrumbs, Dare, Graft, Tensor, Ties, method

BASE = np.zeros(4, np.float32)


def rows(count: int):
    """float32 [count, 6], of magnitudes that weights have."""
    size = st.floats(2.0**-10, 2.0**10, width=32)
    return arrays(np.float32, (count, 6), elements=st.just(0.0) | size | size.map(lambda x: -x))


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# --- by hand


def test_a_soup_is_the_mean_and_a_weighted_one_the_weighted_mean():
    parents = [array(1, 2), array(3, 6)]
    np.testing.assert_array_equal(methods.soup(parents, (1, 1)), [2, 4])
    np.testing.assert_array_equal(methods.soup(parents, (3, 1)), [1.5, 3])


def test_slerp_goes_along_the_arc_and_a_soup_along_the_chord():
    one, other = array(1, 0), array(0, 1)
    np.testing.assert_allclose(methods.slerp(one, other, 0.5), [math.sqrt(0.5)] * 2, rtol=1e-15)
    np.testing.assert_allclose(
        methods.slerp(one, other, 1 / 3), [math.cos(math.pi / 6), math.sin(math.pi / 6)]
    )
    # Lengths are not interpolated: 2 and 4 give 3.16, not 3.
    np.testing.assert_allclose(methods.slerp(array(2, 0), array(0, 4), 0.5), [math.sqrt(2), 2 * math.sqrt(2)])


def test_slerp_without_a_single_arc_is_linear():
    for one, other in (([0, 0], [2, 4]), ([1, 2], [3, 6]), ([1, 0], [-1, 0]), ([0, 0], [0, 0])):
        found = methods.slerp(array(*one), array(*other), 0.25)
        np.testing.assert_allclose(found, 0.75 * array(*one) + 0.25 * array(*other))


def test_task_arithmetic_adds_deltas_and_negates_them():
    base, parents = array(1, 1), [array(2, 1), array(1, 5)]
    np.testing.assert_array_equal(methods.task_arithmetic(base, parents, (1, 1)), [2, 5])
    np.testing.assert_array_equal(methods.task_arithmetic(base, parents, (-1, 0.5)), [0, 3])


def test_ties_trims_elects_a_sign_and_averages_those_that_have_it():
    # Half of each delta stays: (4, -3, _, _), (-2, _, 5, _), (6, _, _, 1); signs +, -, +, +.
    parents = [array(4, -3, 1, 0.5), array(-2, 0, 5, 0.1), array(6, 0.2, 0, 1)]
    found = methods.ties(BASE, parents, (1, 1, 1), density=0.5)
    np.testing.assert_array_equal(found, [5, -3, 5, 1])
    np.testing.assert_array_equal(methods.ties(BASE, parents, (1, 1, 1), density=0.5, scale=2), 2 * found)
    # (4 + 3 x 6) / 4 where the third counts three times
    np.testing.assert_array_equal(methods.ties(BASE, parents, (1, 1, 3), density=0.5), [5.5, -3, 5, 1])


def test_ties_elects_nothing_where_masses_are_equal():
    found = methods.ties(array(7, 7), [array(9, 8), array(5, 8)], (1, 1), density=1)
    np.testing.assert_array_equal(found, [7, 8])


def test_breadcrumbs_masks_both_tails():
    parent = array(-8, 1, 2, 0.5)  # the largest of 4 is an outlier, two of the rest remain
    found = methods.breadcrumbs(BASE, [parent], (1,), density=0.5, outliers=0.25)
    np.testing.assert_array_equal(found, [0, 1, 2, 0])


def test_a_graft_takes_what_differs_most():
    base, donor = array(1, 1, 1, 1), array(1, 3, 0.5, 1.1)
    np.testing.assert_array_equal(methods.graft(base, donor, 1, density=0.5), array(1, 3, 0.5, 1))
    np.testing.assert_array_equal(methods.graft(base, donor, 0.5, density=0.25), [1, 2, 1, 1])


def test_a_graft_takes_only_the_arrays_it_names():
    tensor = Tensor(name="vision.a.kernel", parents=(array(3),), coefficients=(1.0,), base=array(1))
    assert Graft(take=("vision.a.*",))(tensor) == 3 and Graft()(tensor) == 3
    assert Graft(take=("vision.b.*", "text.*"))(tensor) == 1


def test_dare_drops_by_the_key_and_keeps_the_expectation():
    delta = np.ones(100_000, np.float32)
    found = methods.dare(np.zeros_like(delta), [delta], (2.0,), density=0.25, keys=[(3, 4)])
    assert set(np.unique(found)) == {0, 8}
    assert abs(found.mean() - 2) < 0.06  # six standard deviations
    again = methods.dare(np.zeros_like(delta), [delta], (2.0,), density=0.25, keys=[(3, 4)])
    other = methods.dare(np.zeros_like(delta), [delta], (2.0,), density=0.25, keys=[(3, 5)])
    np.testing.assert_array_equal(found, again)
    assert (found != other).any()


def test_draws_are_those_of_every_version():
    np.testing.assert_array_equal(
        methods.drawn((1, 2), (3,)),
        [0.44841514333227195, 0.4308819875443376, 0.4199991293921922],
    )


def test_equal_magnitudes_share_their_fate_and_something_always_stays():
    np.testing.assert_array_equal(methods.kept(array(1, -1, 1, 0), 0.25), [1, -1, 1, 0])
    np.testing.assert_array_equal(methods.kept(array(1, 2, 3, 4), 0.01), [0, 0, 0, 4])
    np.testing.assert_array_equal(methods.kept(array(1, 2), 0.1, 0.9), [1, 0])
    assert methods.kept(np.empty((0, 3)), 0.5).shape == (0, 3)


# --- laws


@settings(deadline=None)  # a busy machine is slow
@given(rows(1), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_soup_of_equal_parents_is_the_parent(parent, shares):
    found = methods.soup([parent] * len(shares), shares).astype(np.float32)
    np.testing.assert_array_equal(found, parent)


@settings(deadline=None)  # a busy machine is slow
@given(rows(4), st.permutations(range(4)))
def test_a_uniform_soup_knows_no_order(parents, order):
    one, other = (methods.soup(list(rows), (1,) * 4) for rows in (parents, parents[order]))
    np.testing.assert_array_equal(one, other)


@settings(deadline=None)  # a busy machine is slow
@given(rows(2), st.floats(0, 1))
def test_slerp_begins_at_one_parent_and_ends_at_the_other(parents, share):
    one, other = parents
    np.testing.assert_allclose(methods.slerp(one, other, 0), one, rtol=1e-12)
    np.testing.assert_allclose(methods.slerp(one, other, 1), other, rtol=1e-12)
    np.testing.assert_allclose(
        methods.slerp(one, other, share), methods.slerp(other, one, 1 - share), rtol=1e-6, atol=1e-6
    )


@settings(deadline=None)  # a busy machine is slow
@given(rows(2), st.floats(0.01, 0.99))
def test_slerp_of_unit_vectors_is_a_unit_vector(parents, share):
    one, other = parents.astype(np.float64)
    if one.any() and other.any():
        one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
        if abs(one @ other) < 0.999:
            assert abs(np.linalg.norm(methods.slerp(one, other, share)) - 1) < 1e-9


@settings(deadline=None)  # a busy machine is slow
@given(rows(3))
def test_one_parent_with_coefficient_1_is_the_parent_by_every_method_that_masks_nothing(drawn):
    base, parent, other = drawn
    np.testing.assert_array_equal(methods.task_arithmetic(base, [parent, other], (1, 0)), parent)
    np.testing.assert_array_equal(methods.graft(base, parent, 1), parent)
    for found in (
        methods.ties(base, [parent], (1,), density=1),
        methods.dare(base, [parent, other], (1, 0), density=1, keys=[(1,), (2,)]),
        methods.breadcrumbs(base, [parent, other], (1, 0), density=1, outliers=0),
    ):
        np.testing.assert_array_equal(found.astype(np.float32), parent)


@settings(deadline=None)  # a busy machine is slow
@given(rows(3))
def test_coefficients_of_0_give_the_base(drawn):
    base, *parents = drawn
    none = (0.0, 0.0)
    np.testing.assert_array_equal(methods.task_arithmetic(base, parents, none), base)
    np.testing.assert_array_equal(methods.dare(base, parents, none, density=0.3, keys=[(1,), (2,)]), base)
    np.testing.assert_array_equal(methods.breadcrumbs(base, parents, none, density=0.5, outliers=0.1), base)


@settings(deadline=None)  # a busy machine is slow
@given(rows(3), st.floats(-2, 2), st.floats(-2, 2))
def test_dare_and_breadcrumbs_that_keep_everything_are_task_arithmetic(drawn, one, other):
    base, *parents = drawn
    expected = methods.task_arithmetic(base, parents, (one, other))
    found = methods.dare(base, parents, (one, other), density=1, keys=[(1,), (2,)])
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    found = methods.breadcrumbs(base, parents, (one, other), density=1, outliers=0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None)  # a busy machine is slow
@given(rows(3))
def test_ties_of_deltas_of_one_sign_is_their_soup(drawn):
    base, *parents = drawn
    parents = [base + np.abs(parent) + 1 for parent in parents]
    found = methods.ties(base, parents, (1, 1), density=1)
    np.testing.assert_allclose(found, methods.soup(parents, (1, 1)), rtol=1e-6)


@settings(deadline=None)  # a busy machine is slow
@given(rows(3), st.floats(0.05, 1))
def test_ties_and_breadcrumbs_stay_between_the_base_and_the_parents(drawn, density):
    base, *parents = drawn
    stack = np.stack([base, *parents]).astype(np.float64)
    low, high = stack.min(0) - 1e-9, stack.max(0) + 1e-9
    found = methods.ties(base, parents, (1, 2), density=density)
    assert ((low <= found) & (found <= high)).all()
    found = methods.breadcrumbs(base, parents, (0.5, 0.5), density=density, outliers=0)
    assert ((low <= found) & (found <= high)).all()


# --- methods as values


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_found_by_its_name_with_its_defaults(name):
    assert method(name, {"density": None}).name == name


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("tise", {}, 'no method "tise".*did you mean "ties"'),
        ("soup", {"density": 0.5}, "soup has no density, its settings are none"),
        ("ties", {"seed": 1}, "ties has no seed, its settings are density, scale"),
        ("ties", {"density": 0.0}, "density is 0.0, expected a share"),
        ("ties", {"scale": math.inf}, "scale is inf"),
        ("dare", {"density": math.nan}, "density is nan"),
        ("dare", {"seed": -1}, "seed is -1"),
        ("breadcrumbs", {"density": 0.9, "outliers": 0.2}, "density 0.9 and outliers 0.2 .* at most 1"),
        ("breadcrumbs", {"outliers": math.nan}, "outliers nan"),
        ("graft", {"density": 1.5}, "density is 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name, settings, said):
    with pytest.raises(CardError, match=said):
        method(name, settings)


def test_methods_with_the_same_settings_are_equal():
    assert (Ties(), Dare(seed=1), Breadcrumbs()) == (Ties(density=0.2), Dare(seed=1), Breadcrumbs())
