"""The formula of intervals: ends by hand, what it must never do, and that it covers (a small simulation; the large one is a benchmark)."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kd_core.evaluate.intervals import difference_interval, linearised, mean_interval, share_interval, wilson_interval

T_2, T_1 = 4.302653, 12.706205  # Student's t at 0.975, two degrees of freedom and one: of a printed table
TINY = 1e-9

SHARES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


def grids(elements, min_items=2, max_items=8, seeds=(1, 3)):
    shapes = st.tuples(st.integers(min_items, max_items), st.integers(*seeds))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=elements))


NUMBERS = grids(st.floats(-100.0, 100.0, width=16))


def test_items_alone_by_hand():
    """Three values 1, 2, 6 of one seed: mean 3, variance 7, h = t(2) sqrt(7 / 3)."""
    low, high = mean_interval(np.array([[1.0], [2.0], [6.0]]), 0.95)
    assert (low, high) == pytest.approx((3 - T_2 * (7 / 3) ** 0.5, 3 + T_2 * (7 / 3) ** 0.5), rel=1e-6)


def test_seeds_by_hand():
    """Two items, three seeds, no interplay: seeds' means 2, 3, 7 add t(2)^2 7 / 3; items' means 3, 5 give t(1)^2 1."""
    x_IS = np.array([[-1.0], [1.0]]) + np.array([2.0, 3.0, 7.0])
    low, high = mean_interval(x_IS, 0.95)
    half = (T_1**2 * 1.0 + T_2**2 * 7 / 3) ** 0.5
    assert (low, high) == pytest.approx((4 - half, 4 + half), rel=1e-6)


def test_half_of_the_noise_within_seeds_is_taken_off():
    """Items 0 and 0, seeds 0 and 4 crossed with rests of +-1: v_S 4, v_E 4 / (1 1 2 2) = 1, v_I 0."""
    x_IS = np.array([[0.0, 4.0], [0.0, 4.0]]) + np.array([[1.0, -1.0], [-1.0, 1.0]])
    low, high = mean_interval(x_IS, 0.95)
    half = T_1 * (4.0 - 0.5) ** 0.5
    assert (low, high) == pytest.approx((2 - half, 2 + half), rel=1e-6)


def test_welch_by_hand():
    """Equal items; seeds' means 0, 2 (v_S 1, one degree) and 0, 0, 3 (v_S 1, two): nu = 2^2 / (1 / 1 + 1 / 2) = 8 / 3."""
    from scipy.stats import t

    a, b = np.tile([0.0, 2.0], (5, 1)), np.tile([0.0, 0.0, 3.0], (5, 1))
    low, high = difference_interval(a, b, 0.95, shares=False)
    half = t.ppf(0.975, 8 / 3) * 2**0.5
    assert (low, high) == pytest.approx((-half, half), rel=1e-6)
    assert difference_interval(a, np.ones((5, 1)), 0.95, shares=False) == pytest.approx((-T_1, T_1), rel=1e-6)  # a fixed model adds nothing


def test_wilson_by_hand():
    """15 of 50 at 95%: 0.191 to 0.438 (Brown, Cai and DasGupta's form, computed by hand)."""
    assert wilson_interval(0.3, 50, 0.95) == pytest.approx((0.1910, 0.4375), abs=2e-4)
    assert wilson_interval(1.0, 10, 0.95) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0.0, 10, 0.95) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_shares_of_many_items_have_nearly_wilsons_interval():
    x_IS = np.repeat([1.0, 0.0], [300, 700])[:, None]
    assert share_interval(x_IS, 0.95) == pytest.approx(wilson_interval(0.3, 1000, 0.95), abs=2e-4)


def test_equal_shares_are_no_certainty():
    for value, num_items in ((0.0, 10), (0.5, 10), (1.0, 10)):
        low, high = share_interval(np.full((num_items, 1), value), 0.95)
        assert high - low > 0.15
    assert share_interval(np.full((2, 3), 0.5), 0.95) == pytest.approx((0.0, 1.0), abs=0.05)


def test_a_ratio_is_linearised():
    """Two items, one token with sum 9 and nine tokens with sum 9: the mean is 18 / 10, and neither item stands where it would alone."""
    x_IS = linearised(np.array([[9.0], [9.0]]), np.array([[1.0], [9.0]]))
    assert x_IS.ravel() == pytest.approx([1.8 + (9 - 1.8) / 5, 1.8 + (9 - 16.2) / 5])
    assert x_IS.mean() == pytest.approx(1.8)


def test_leading_axes_are_separate_data_sets():
    rng = np.random.default_rng(0)
    a, b = rng.random((4, 6, 3)), rng.random((4, 6, 2))
    for whole, one in (
        (share_interval(a, 0.9), lambda i: share_interval(a[i], 0.9)),
        (mean_interval(a, 0.9), lambda i: mean_interval(a[i], 0.9)),
        (difference_interval(a, b, 0.9, shares=True), lambda i: difference_interval(a[i], b[i], 0.9, shares=True)),
    ):
        assert np.array(whole) == pytest.approx(np.array([one(i) for i in range(4)]).T)


@settings(max_examples=60, deadline=None)
@given(x=grids(SHARES), confidence=st.sampled_from([0.6, 0.95, 0.99]))
def test_a_share_stays_a_share(x, confidence):
    low, high = share_interval(x, confidence)
    assert 0.0 <= low <= x.mean() + TINY
    assert x.mean() - TINY <= high <= 1.0
    assert low < high


@settings(max_examples=60, deadline=None)
@given(x=grids(SHARES))
def test_wrong_is_the_mirror_of_right(x):
    low, high = share_interval(x, 0.95)
    assert share_interval(1.0 - x, 0.95) == pytest.approx((1.0 - high, 1.0 - low), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(x=NUMBERS, data=st.data())
def test_order_of_items_and_seeds_changes_nothing(x, data):
    items, seeds = (data.draw(st.permutations(range(n))) for n in x.shape)
    assert mean_interval(x[items][:, seeds], 0.95) == pytest.approx(mean_interval(x, 0.95), rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(a=NUMBERS, data=st.data(), shares=st.booleans())
def test_a_difference_is_symmetric(a, data, shares):
    """Shares are no exception: of the two items that are added, each side gets one."""
    b = data.draw(arrays(np.float64, (len(a), data.draw(st.integers(1, 3))), elements=st.floats(-100.0, 100.0, width=16)))
    a, b = ((a + 100.0) / 200.0, (b + 100.0) / 200.0) if shares else (a, b)
    low, high = difference_interval(a, b, 0.95, shares=shares)
    assert difference_interval(b, a, 0.95, shares=shares) == pytest.approx((-high, -low), rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(x=NUMBERS, shares=st.booleans())
def test_no_difference_contains_zero(x, shares):
    low, high = difference_interval(x / 100.0, x / 100.0, 0.95, shares=shares)
    assert low <= 0.0 <= high
    assert low < high or not shares


@settings(max_examples=60, deadline=None)
@given(x=NUMBERS)
def test_more_confidence_is_never_narrower(x):
    (low, high), (lower, higher) = (mean_interval(x, confidence) for confidence in (0.8, 0.95))
    assert lower <= low + TINY
    assert high <= higher + TINY


@settings(max_examples=60, deadline=None)
@given(x=grids(st.floats(-100.0, 100.0, width=16), seeds=(1, 1)))
def test_one_seed_is_students_t_over_items(x):
    from scipy.stats import t

    assume(np.ptp(x) > 1e-3)
    low, high = mean_interval(x, 0.95)
    assert (low, high) == pytest.approx(t.interval(0.95, len(x) - 1, x.mean(), x.std(ddof=1) / len(x) ** 0.5))


@settings(max_examples=100, deadline=None)
@given(x=grids(st.sampled_from([0.0, 1.0]), max_items=30, seeds=(1, 1)), other=st.randoms(use_true_random=False), index=st.integers(0, 29))
def test_one_answer_more_right_never_lowers_an_end_with_one_seed(x, other, index):
    better = x.copy()
    better[index % len(x)] = 1.0
    y = np.array([[float(other.random() < 0.5)] for _ in x])
    for one, two in (
        (share_interval(x, 0.95), share_interval(better, 0.95)),
        (difference_interval(x, y, 0.95, shares=True), difference_interval(better, y, 0.95, shares=True)),
    ):
        assert two[0] >= one[0] - TINY
        assert two[1] >= one[1] - TINY


@pytest.mark.parametrize(("num_seeds", "seed_sd"), [(1, 0.0), (3, 0.1), (5, 0.1)])
def test_means_cover_where_items_seeds_and_both_together_vary(num_seeds, seed_sd):
    """2,000 tables of 40 items: 95% meant, standard error 0.5%."""
    rng = np.random.default_rng(num_seeds)
    shape = (2_000, 40, num_seeds)
    x = 1.0 + 0.3 * rng.normal(size=(2_000, 40, 1)) + seed_sd * rng.normal(size=(2_000, 1, num_seeds)) + 0.2 * rng.normal(size=shape)
    low, high = mean_interval(x, 0.95)
    assert 0.93 <= np.mean((low <= 1.0) & (high >= 1.0)) <= 0.985
