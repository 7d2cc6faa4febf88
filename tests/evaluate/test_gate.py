"""The promotion decision: each rule at and around its limit, missing measurements, and monotony."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_core.errors import KDError, RecipeError
from kd_core.evaluate.gate import Evidence, decide
from kd_core.evaluate.statistics import SCORE_SCHEMA, estimate
from kd_core.recipe import BetterThan, Ceiling, Floor, Gate, NotWorseThanChampion

LIST = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6)


def table(passes, nll=None, truncated=None):
    rows = [
        {
            "suite": "test",
            "item_id": f"i{i}",
            "seed": 0,
            "pass_at_1": passed,
            "nll_sum": nll[i] if nll else None,
            "tokens": 1,
            "truncated": truncated[i] if truncated else None,
        }
        for i, passed in enumerate(passes)
    ]
    return pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)


def costs(parameters):
    return {"parameters": parameters, "bytes": 4 * parameters, "tokens_per_second": None}


def evidence(champion=None, efficiency=None, **scores):
    sizes = {"student": costs(100), "teacher": costs(1000)} if efficiency is None else efficiency
    return Evidence(scores=scores, efficiency=sizes, suite="test", confidence=0.95, champion=champion)


def judge(rule, found):
    verdict = decide(found, Gate(rules=(rule,)))
    assert verdict.promote == verdict.reasons[0].holds
    return verdict.reasons[0]


GOOD, POOR = [1.0] * 45 + [0.0] * 5, [1.0] * 10 + [0.0] * 40
BETTER = BetterThan(kind="better_than", metric="pass_at_1", than="baseline")


def test_better_than_needs_the_whole_interval_above():
    found = judge(BETTER, evidence(student=table(GOOD), baseline=table(POOR)))
    assert found.holds
    assert found.rule == "pass_at_1 better than baseline"
    assert found.detail.startswith("improvement +0.7000 [+0.")
    assert found.detail.endswith("required: low end above +0")
    assert not judge(BETTER, evidence(student=table(GOOD), baseline=table(GOOD))).holds
    assert not judge(BETTER.model_copy(update={"by": 0.69}), evidence(student=table(GOOD), baseline=table(POOR))).holds
    a_little = table([1.0] * 11 + [0.0] * 39)
    assert not judge(BETTER, evidence(student=a_little, baseline=table(POOR))).holds  # better, but by one item of fifty


def test_better_than_turns_around_where_lower_is_better():
    rule = BetterThan(kind="better_than", metric="nll", than="baseline")
    low, high = table(GOOD, nll=[1.0, 1.1] * 25), table(GOOD, nll=[2.0, 2.2] * 25)
    assert judge(rule, evidence(student=low, baseline=high)).holds
    assert not judge(rule, evidence(student=high, baseline=low)).holds


def test_champion():
    rule = NotWorseThanChampion(kind="not_worse_than_champion", metric="nll", margin=0.05)
    student = table(GOOD, nll=[1.0] * 50)
    assert judge(rule, evidence(student=student)).detail == "there is no champion yet"
    for champion_nll, holds in ((1.2, True), (1.0, True), (0.96, True), (0.94, False)):
        found = judge(rule, evidence(student=student, old=table(GOOD, nll=[champion_nll] * 50), champion="old"))
        assert found.holds is holds, found.detail
    absent = judge(rule, evidence(student=student, champion="old"))
    assert (absent.holds, absent.detail) == (False, "not measured: there are no scores of old")


def test_floor_looks_at_the_low_end():
    student = table(GOOD)
    low = estimate(student, "pass_at_1", suite="test", confidence=0.95).low
    assert low < 0.9
    assert judge(Floor(kind="floor", metric="pass_at_1", minimum=low), evidence(student=student)).holds
    failed = judge(Floor(kind="floor", metric="pass_at_1", minimum=0.9), evidence(student=student))
    assert not failed.holds
    assert failed.detail == f"0.9000 [{low:.4f}, 0.9796] on 50 items; required: low end at least 0.9"
    with pytest.raises(RecipeError, match="floor on nll"):
        judge(Floor(kind="floor", metric="nll", minimum=0.5), evidence(student=student))


@pytest.mark.parametrize(
    ("metric", "limit", "shown"),
    [
        ("parameter_ratio", 0.1, "0.1000 (100 of 1,000)"),
        ("parameters", 100, "100"),
        ("bytes", 400, "400"),
        ("truncated", 0.1, "0.1000 [0."),
    ],
)
def test_ceiling_at_its_limit(metric, limit, shown):
    found = evidence(student=table(GOOD, truncated=[1.0] * 5 + [0.0] * 45))
    held = judge(Ceiling(kind="ceiling", metric=metric, maximum=limit), found)
    assert held.holds
    assert held.detail.startswith(shown)
    assert not judge(Ceiling(kind="ceiling", metric=metric, maximum=limit * 0.99), found).holds


@pytest.mark.parametrize(
    "rule",
    [
        BETTER,
        NotWorseThanChampion(kind="not_worse_than_champion", metric="pass_at_1", margin=1.0),
        Floor(kind="floor", metric="pass_at_1", minimum=0.0),
        *(Ceiling(kind="ceiling", metric=m, maximum=1e12) for m in ("parameter_ratio", "parameters", "bytes", "truncated")),
    ],
)
def test_a_missing_measurement_never_passes(rule):
    unmeasured = table([None] * 6)
    full = {"student": unmeasured, "baseline": unmeasured, "old": unmeasured}
    for scores in ({}, full):
        found = judge(rule, evidence(champion="old", efficiency={}, **scores))
        assert not found.holds
        assert found.detail.startswith("not measured")


def test_parameter_ratio_needs_the_teacher():
    rule = Ceiling(kind="ceiling", metric="parameter_ratio", maximum=10.0)
    assert not judge(rule, evidence(efficiency={"student": costs(5)}, student=table(GOOD))).holds


def test_models_on_other_items_are_an_error_not_a_verdict():
    with pytest.raises(KDError, match="student and baseline were measured on different items"):
        judge(BETTER, evidence(student=table(GOOD), baseline=table(GOOD[:20])))


def test_all_rules_must_hold_and_the_headline_says_so():
    rules = (BETTER, Floor(kind="floor", metric="pass_at_1", minimum=0.5), Ceiling(kind="ceiling", metric="parameters", maximum=99))
    found = evidence(student=table(GOOD), baseline=table(POOR))
    verdict = decide(found, Gate(rules=rules))
    assert [reason.holds for reason in verdict.reasons] == [True, True, False]
    assert verdict.headline == "Not promoted: 1 of 3 rules failed (parameters at most 99)."
    assert decide(found, Gate(rules=rules[:2])).headline == "Promoted: all 2 rules hold."
    assert decide(found, Gate(rules=rules[:1])).headline == "Promoted: its one rule holds."


RULES = Gate(
    rules=(
        BetterThan(kind="better_than", metric="pass_at_1", than="baseline", by=-0.3),
        BetterThan(kind="better_than", metric="nll", than="baseline", by=-0.3),
        NotWorseThanChampion(kind="not_worse_than_champion", metric="pass_at_1", margin=0.4),
        NotWorseThanChampion(kind="not_worse_than_champion", metric="nll", margin=0.4),
        Floor(kind="floor", metric="pass_at_1", minimum=0.2),
        Ceiling(kind="ceiling", metric="truncated", maximum=0.5),
        Ceiling(kind="ceiling", metric="parameter_ratio", maximum=0.5),
    )
)


@settings(max_examples=40, deadline=None)
@given(passes=LIST, nll=LIST, cut=LIST, other=LIST, better=st.lists(st.booleans(), min_size=6, max_size=6), size=st.integers(1, 1000))
def test_improving_the_student_never_turns_pass_into_fail(passes, nll, cut, other, better, size):
    def verdict(passes, nll, cut, size):
        models = {"student": table(passes, nll, cut), "baseline": table(other, other), "old": table(other[::-1], other[::-1])}
        sizes = {"student": costs(size), "teacher": costs(1000)}
        return decide(evidence(champion="old", efficiency=sizes, **models), RULES)

    before = verdict(passes, nll, cut, size)
    after = verdict(
        [1.0 if up else p for p, up in zip(passes, better, strict=True)],
        [0.0 if up else x for x, up in zip(nll, better, strict=True)],
        [0.0 if up else t for t, up in zip(cut, better, strict=True)],
        max(1, size // 2),
    )
    for old, new in zip(before.reasons, after.reasons, strict=True):
        assert new.holds or not old.holds, f"{old} -> {new}"
    assert after.promote or not before.promote


@settings(max_examples=20, deadline=None)
@given(passes=LIST, other=LIST, order=st.permutations(range(6)))
def test_the_verdict_does_not_depend_on_the_order_of_rows(passes, other, order):
    gate = Gate(rules=(BETTER.model_copy(update={"by": -0.2}),))
    student, baseline = table(passes), table(other)
    assert decide(evidence(student=student, baseline=baseline), gate) == decide(
        evidence(student=student.take(order), baseline=baseline), gate
    )
