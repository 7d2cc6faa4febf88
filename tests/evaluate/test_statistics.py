"""Intervals: values by hand, coverage by simulation, pairing, degenerate tables, and tables that are refused."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_core.errors import KDError
from kd_core.evaluate import statistics
from kd_core.evaluate.statistics import METRICS, SCORE_SCHEMA, Comparison, compare, estimate, metric_of, wilson_interval


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
    assert (found.low, found.high) == (pytest.approx(1.0), pytest.approx(9.0))  # draws of one item of two: either of them


def test_ends_match_the_normal_interval_where_items_are_many():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 0.2, size=2_000)
    found = estimate(table(nll_sum=column(values)), "nll", suite="test", confidence=0.95)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_items_without_gold_are_left_out_and_order_of_rows_is_not():
    scores = table(nll_sum=column([1.0, None, 3.0, 2.0]))
    found = estimate(scores, "nll", suite="test", confidence=0.9)
    assert (found.value, found.n) == (2.0, 3)
    assert estimate(scores.take([3, 1, 0, 2]), "nll", suite="test", confidence=0.9) == found


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("metric", ["pass_at_1", "truncated"])
def test_all_equal_shares_get_the_wilson_interval(value, metric):
    found = estimate(table(seeds=(0, 1, 2), **{metric: [[value] * 3] * 10}), metric, suite="test", confidence=0.95)
    assert (found.value, found.low, found.high) == pytest.approx((value, *wilson_interval(10 * value, 10, 0.95)))


def test_wilson_by_hand():
    """15 of 50 at 95%: 0.191 to 0.438 (Brown, Cai and DasGupta's form, computed by hand)."""
    assert wilson_interval(15, 50, 0.95) == pytest.approx((0.1910, 0.4375), abs=2e-4)
    assert wilson_interval(10, 10, 0.95) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10, 0.95) == pytest.approx((0.0, 0.2775), abs=1e-4)


def coverage(simulate, truth, num_tables):
    found = [estimate(simulate(np.random.default_rng(i)), "nll", suite="test", confidence=0.95) for i in range(num_tables)]
    return np.mean([f.low <= truth <= f.high for f in found])


def test_interval_covers_where_items_vary():
    def simulate(rng):
        return table(nll_sum=column(rng.gamma(2.0, 0.5, size=60)))

    assert 0.90 <= coverage(simulate, truth=1.0, num_tables=200) <= 0.985


def test_interval_covers_where_items_and_many_seeds_vary():
    seeds = tuple(range(12))

    def simulate(rng):
        return table(seeds, nll_sum=1.0 + 0.3 * rng.normal(size=(30, 1)) + 0.05 * rng.normal(size=12) + 0.2 * rng.normal(size=(30, 12)))

    assert 0.90 <= coverage(simulate, truth=1.0, num_tables=100) <= 0.985


def test_three_seeds_cannot_give_a_95_percent_statement_about_seeds():
    """The number that the docstring of ``estimate`` states: about 75%, where seeds are all that varies."""

    def simulate(rng):
        return table((0, 1, 2), nll_sum=np.ones((8, 1)) + 0.1 * rng.normal(size=3))

    assert 0.67 <= coverage(simulate, truth=1.0, num_tables=200) <= 0.83


def test_seed_variance_is_not_understated():
    """Drawing one seed fewer: the bootstrap's variance over three seeds is s^2 / 3, not two thirds of it."""
    effects = np.array([0.0, 1.0, 5.0])
    rng = np.random.default_rng(0)
    v_RS = statistics._draw_counts(rng, 200_000, 3)
    assert (v_RS @ effects / 2).var() == pytest.approx(effects.var(ddof=1) / 3, rel=0.02)


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


def test_pairing_by_seed():
    """Both models follow the luck of their seed; the difference does not, if seeds are the same."""
    luck = np.array([-1.0, 0.0, 1.0])
    items = np.linspace(1.0, 2.0, 30)[:, None]
    a = table((0, 1, 2), nll_sum=items + luck + 5.0)
    b = table((0, 1, 2), nll_sum=items + luck + 4.0)
    other_seeds = table((3, 4, 5), nll_sum=items + luck + 4.0)
    paired = compare(a, b, "nll", suite="test", confidence=0.95)
    assert (paired.low, paired.high) == (pytest.approx(1.0), pytest.approx(1.0))
    unpaired = compare(a, other_seeds, "nll", suite="test", confidence=0.95)
    assert unpaired.high - unpaired.low > 1.0


def test_a_single_seed_model_stands_for_itself():
    items = np.linspace(1.0, 2.0, 30)[:, None]
    student = table((0, 1, 2), nll_sum=items + np.array([0.1, 0.2, 0.3]))
    teacher = table((0,), nll_sum=items)
    found = compare(student, teacher, "nll", suite="test", confidence=0.95)
    assert found.difference == pytest.approx(0.2)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.3))


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
    with pytest.raises(KDError, match="5 items x 2 seeds need one row each; 1 are missing and 0 are doubled"):
        estimate(scores.slice(0, 9), "pass_at_1", suite="test", confidence=0.95)
    with pytest.raises(KDError, match="0 are missing and 1 are doubled"):
        estimate(pa.concat_tables([scores, scores.slice(0, 1)]), "pass_at_1", suite="test", confidence=0.95)
    with pytest.raises(KDError, match="1 of 2 items have pass_at_1 for some seeds"):
        estimate(table((0, 1), pass_at_1=[[1.0, None], [1.0, 1.0]]), "pass_at_1", suite="test", confidence=0.95)


@pytest.mark.parametrize(
    ("metric", "columns", "message"),
    [
        ("nll", {"nll_sum": column([1.0, float("nan")])}, "not finite on 1 items"),
        ("nll", {"nll_sum": column([1.0, 1.0]), "tokens": [1, 0]}, "1 items with a sum over no tokens"),
        ("nll", {"nll_sum": column([1.0])}, "2 or more"),
        ("pass_at_1", {"pass_at_1": column([1.0, 7.0])}, "must lie in"),
        ("bleu", {"nll_sum": column([1.0, 1.0])}, "'bleu' does not exist; known are pass_at_1"),
    ],
)
def test_broken_numbers_are_refused(metric, columns, message):
    with pytest.raises(KDError, match=message):
        estimate(table(**columns), metric, suite="test", confidence=0.95)


def test_blocks_of_bounded_memory_change_nothing_but_the_draws(monkeypatch):
    scores = table((0, 1, 2), nll_sum=np.random.default_rng(2).normal(3.0, 1.0, size=(50, 3)))
    whole = estimate(scores, "nll", suite="test", confidence=0.95)
    monkeypatch.setattr(statistics, "_WEIGHTS_IN_MEMORY", 333 * 50)
    blocks = estimate(scores, "nll", suite="test", confidence=0.95)
    assert blocks.value == whole.value
    assert (blocks.low, blocks.high) == (pytest.approx(whole.low, rel=0.01), pytest.approx(whole.high, rel=0.01))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=12), index=st.integers(0, 11))
def test_better_items_never_lower_an_end(values, index):
    better = list(values)
    better[index % len(values)] = 1.0
    other = table(pass_at_1=column(values[::-1]))
    before, after = (table(pass_at_1=column(v)) for v in (values, better))
    e0, e1 = (estimate(t, "pass_at_1", suite="test", confidence=0.95) for t in (before, after))
    c0, c1 = (compare(t, other, "pass_at_1", suite="test", confidence=0.95) for t in (before, after))
    tiny = 1e-12
    assert e1.low >= e0.low - tiny
    assert e1.high >= e0.high - tiny
    assert c1.improvement_low >= c0.improvement_low - tiny
    assert 0.0 <= e0.low <= e0.value <= e0.high <= 1.0


def test_metric_names_and_directions():
    assert [name for name, metric in METRICS.items() if metric.higher_is_better] == ["pass_at_1", "agreement"]
    assert metric_of("svamp/pass_at_1") is METRICS["pass_at_1"]
    assert Comparison("svamp/kl", "a", "b", -1.0, -2.0, -0.5).improvement_low == 0.5
