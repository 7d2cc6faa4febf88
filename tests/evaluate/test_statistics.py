"""Score tables: values by hand, pairing, what an interval is about, items left out, and tables that are refused."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_core.errors import KDError
from kd_core.evaluate.intervals import wilson_interval
from kd_core.evaluate.statistics import METRICS, SCORE_SCHEMA, Comparison, compare, estimate, metric_of, num_measured


def table(seeds=(0,), suite="test", tokens=None, **columns_IS):
    """A score table from columns [I, S]; a value of None stays null."""
    num_items, num_seeds = len(next(iter(columns_IS.values()))), len(seeds)
    data = {
        "suite": [suite] * (num_items * num_seeds),
        "item_id": [f"item{i:04d}" for i in range(num_items) for _ in seeds],
        "seed": list(seeds) * num_items,
        "tokens": [n for n in (tokens or [1] * num_items) for _ in seeds],
        **{name: [value for row in column for value in row] for name, column in columns_IS.items()},
    }
    return pa.table([pa.array(data.get(field.name, [None] * len(data["seed"])), field.type) for field in SCORE_SCHEMA], schema=SCORE_SCHEMA)


def column(values):
    return [[value] for value in values]


def test_values_by_hand():
    scores = table(
        seeds=(0, 1),
        tokens=[1, 3],
        pass_at_1=[[1.0, 0.5], [0.0, 0.25]],
        nll_sum=[[2.0, 4.0], [3.0, 6.0]],
        agreement_sum=[[1.0, 0.0], [2.0, 3.0]],
    )
    wanted = {"pass_at_1": 1.75 / 4, "nll": 15 / 8, "agreement": 6 / 8}
    for metric, value in wanted.items():
        found = estimate(scores, metric, suite="test", confidence=0.95)
        assert found.value == pytest.approx(value)
        assert (found.n, found.low <= value <= found.high) == (2, True)
    assert estimate(scores, "kl", suite="test", confidence=0.95) is None
    assert estimate(scores, "nll", suite="another", confidence=0.95) is None


def test_per_token_weighs_items_by_their_tokens():
    """Two items, one token with loss 9 and nine tokens with loss 1 each: 18 / 10, not (9 + 1) / 2."""
    found = estimate(table(tokens=[1, 9], nll_sum=column([9.0, 9.0])), "nll", suite="test", confidence=0.95)
    assert found.value == pytest.approx(1.8)


def test_ends_match_the_normal_interval_where_items_are_many():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 0.2, size=2_000)
    found = estimate(table(nll_sum=column(values)), "nll", suite="test", confidence=0.95)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_items_without_gold_are_left_out_and_counted_and_order_of_rows_is_nothing():
    scores = table(nll_sum=column([1.0, None, 3.0, 2.0]))
    found = estimate(scores, "nll", suite="test", confidence=0.9)
    assert (found.value, found.n, found.left_out) == (2.0, 3, 1)
    assert estimate(scores.take([3, 1, 0, 2]), "nll", suite="test", confidence=0.9) == found
    assert num_measured(scores, "nll", suite="test") == (3, 4)
    assert num_measured(scores, "kl", suite="test") == (0, 4)
    assert num_measured(scores, "nll", suite="another") == (0, 0)


def test_an_item_counts_with_a_value_for_every_seed():
    scores = table((0, 1), pass_at_1=[[1.0, None], [1.0, 0.0], [0.0, 0.0]])
    found = estimate(scores, "pass_at_1", suite="test", confidence=0.95)
    assert (found.value, found.n, found.left_out) == (0.25, 2, 1)


def test_one_item_is_no_measurement():
    scores = table(pass_at_1=column([1.0, None]))
    assert estimate(scores, "pass_at_1", suite="test", confidence=0.95) is None
    assert compare(scores, scores, "pass_at_1", suite="test", confidence=0.95) is None


def test_agreement_is_a_share_of_tokens():
    all_equal = estimate(table(tokens=[5] * 10, agreement_sum=column([5.0] * 10)), "agreement", suite="test", confidence=0.95)
    assert (all_equal.value, all_equal.high) == (1.0, 1.0)
    assert 0.6 < all_equal.low < 1.0
    mixed = estimate(table(tokens=[1, 200], agreement_sum=column([0.0, 199.0])), "agreement", suite="test", confidence=0.95)
    assert 0.0 <= mixed.low < mixed.value < mixed.high <= 1.0


def test_a_loss_is_never_negative():
    found = estimate(table((0, 1), nll_sum=[[0.1, 2.0]] * 3), "nll", suite="test", confidence=0.95)
    assert (found.value, found.low) == (1.05, 0.0)


def test_what_an_interval_is_about():
    one, three = table(pass_at_1=column([1.0, 0.0])), table((0, 1, 2), pass_at_1=[[1.0] * 3, [0.0] * 3])
    about = {n: estimate(t, "pass_at_1", suite="test", confidence=0.95).scope for n, t in ((1, one), (3, three))}
    assert about == {1: "this checkpoint, on new items", 3: "the recipe (3 seeds), on new items and seeds"}
    for a, b, scope in (
        (one, one, "these checkpoints, on new items"),
        (three, three, "these recipes (3 and 3 seeds), on new items and seeds"),
        (three, one, "the recipe of student (3 seeds) and this teacher, on new items and seeds"),
    ):
        assert compare(a, b, "pass_at_1", suite="test", confidence=0.95, names=("student", "teacher")).scope == scope


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("metric", ["pass_at_1", "truncated"])
def test_all_equal_shares_get_the_wilson_interval_of_few_items(value, metric):
    """Ten items are worth 9 z^2 / t(9)^2 = 9 (1.959964 / 2.262157)^2 = 6.756."""
    found = estimate(table(seeds=(0, 1, 2), **{metric: [[value] * 3] * 10}), metric, suite="test", confidence=0.95)
    assert (found.value, found.low, found.high) == pytest.approx((value, *wilson_interval(value, 6.756, 0.95)), abs=1e-4)


def test_pairing_narrows_the_difference_of_models_that_find_the_same_items_hard():
    rng = np.random.default_rng(1)
    hard = rng.normal(2.0, 1.0, size=200)
    a, b = (table(nll_sum=column(hard + shift + 0.1 * rng.normal(size=200))) for shift in (0.0, 0.2))
    paired = compare(a, b, "nll", suite="test", confidence=0.95, names=("student", "baseline"))
    alone = [estimate(scores, "nll", suite="test", confidence=0.95) for scores in (a, b)]
    unpaired_width = np.hypot(*(e.high - e.low for e in alone))
    assert paired.high - paired.low < 0.25 * unpaired_width
    assert (paired.metric, paired.a, paired.b) == ("nll", "student", "baseline")
    assert paired.difference == pytest.approx(alone[0].value - alone[1].value)
    assert paired.improvement_low > 0.0 > paired.high  # a's loss is lower: it is better, and so is every end of the interval
    assert (paired.improvement, paired.improvement_low, paired.improvement_high) == (-paired.difference, -paired.high, -paired.low)


def test_a_single_seed_model_stands_for_itself():
    """Items cancel; seeds 0.1, 0.2, 0.3 above: 0.2 -+ t(2) 0.1 / sqrt(3)."""
    items = np.linspace(1.0, 2.0, 30)[:, None]
    student = table((0, 1, 2), nll_sum=items + np.array([0.1, 0.2, 0.3]))
    found = compare(student, table(nll_sum=items), "nll", suite="test", confidence=0.95)
    assert found.difference == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.2 - 0.24841, 0.2 + 0.24841), abs=1e-5)
    assert found.num_seeds == (3, 1)


def test_a_difference_is_over_the_items_that_both_have():
    a, b = table(nll_sum=column([1.0, 2.0, 3.0, None])), table(nll_sum=column([None, 1.0, 1.0, 5.0]))
    found = compare(a, b, "nll", suite="test", confidence=0.95)
    assert (found.difference, found.n, found.left_out) == (1.5, 2, 2)


def test_difference_of_perfect_models_keeps_a_width():
    ones = table(pass_at_1=column([1.0] * 20))
    found = compare(ones, ones, "pass_at_1", suite="test", confidence=0.95)
    assert found.difference == 0.0
    assert found.low < 0.0 < found.high
    zeros = table(pass_at_1=column([0.0] * 20))
    assert compare(ones, zeros, "pass_at_1", suite="test", confidence=0.95).difference == 1.0


def test_comparison_refuses_other_items_and_says_how_many():
    scores = table(pass_at_1=column([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(KDError, match=r"student and baseline were measured on different items: 0 are missing from the first and 3"):
        compare(scores, scores.slice(0, 1), "pass_at_1", suite="test", confidence=0.95, names=("student", "baseline"))
    assert compare(scores, table(pass_at_1=column([None] * 4)), "pass_at_1", suite="test", confidence=0.95) is None


def test_incomplete_tables_are_refused():
    scores = table((0, 1), pass_at_1=[[1.0, 1.0]] * 5)
    with pytest.raises(KDError, match="5 items x 2 seeds need one row each; 1 are missing and 0 are there more than once"):
        estimate(scores.slice(0, 9), "pass_at_1", suite="test", confidence=0.95)
    with pytest.raises(KDError, match="0 are missing and 1 are there more than once"):
        estimate(pa.concat_tables([scores, scores.slice(0, 1)]), "pass_at_1", suite="test", confidence=0.95)


@pytest.mark.parametrize(
    ("metric", "columns", "message"),
    [
        ("nll", {"nll_sum": column([1.0, float("nan")])}, "not finite on 1 items"),
        ("nll", {"nll_sum": column([1.0, 1.0]), "tokens": [1, 0]}, "1 items with a sum over no tokens"),
        ("agreement", {"agreement_sum": column([1.0, 3.0]), "tokens": [1, 2]}, "must lie in"),
        ("pass_at_1", {"pass_at_1": column([1.0, 7.0])}, "must lie in"),
        ("bleu", {"nll_sum": column([1.0, 1.0])}, "'bleu' does not exist; known are pass_at_1"),
    ],
)
def test_broken_numbers_are_refused(metric, columns, message):
    with pytest.raises(KDError, match=message):
        estimate(table(**columns), metric, suite="test", confidence=0.95)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=12), order=st.randoms(use_true_random=False))
def test_order_of_rows_changes_nothing_and_values_lie_within(values, order):
    scores, other = table(pass_at_1=column(values)), table(pass_at_1=column(values[::-1]))
    rows = order.sample(range(len(values)), len(values))
    found = estimate(scores, "pass_at_1", suite="test", confidence=0.95)
    assert estimate(scores.take(rows), "pass_at_1", suite="test", confidence=0.95) == found
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    pair, back = (compare(*two, "pass_at_1", suite="test", confidence=0.95) for two in ((scores, other), (other, scores.take(rows))))
    assert (pair.difference, pair.low, pair.high) == pytest.approx((-back.difference, -back.high, -back.low))
    assert pair.low <= pair.difference <= pair.high


def test_metric_names_and_directions():
    assert [name for name, metric in METRICS.items() if metric.higher_is_better] == ["pass_at_1", "accuracy", "unseen_recall", "agreement"]
    assert metric_of("svamp/pass_at_1") is METRICS["pass_at_1"]
    assert Comparison("svamp/kl", "a", "b", -1.0, -2.0, -0.5, 30, 0, (3, 3)).improvement_low == 0.5
