"""The promotion decision: each rule at and around its limit, missing measurements, and monotony."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_core.errors import KDError, RecipeError
from kd_core.evaluate.gate import Evidence, decide
from kd_core.evaluate.statistics import SCORE_SCHEMA, estimate
from kd_core.recipe import BetterThan, Ceiling, Floor, Gate, NotWorseThanChampion

RIGHT_OR_WRONG = st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6)
SHARES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6)


def table(passes, nll=None, truncated=None, seeds=(0,), suite="test"):
    """Scores of one model; every seed answers alike, but for ``passes`` by seed in a dictionary."""
    by_seed = passes if isinstance(passes, dict) else dict.fromkeys(seeds, passes)
    rows = [
        {
            "suite": suite,
            "item_id": f"i{i}",
            "seed": seed,
            "pass_at_1": passed,
            "nll_sum": nll[i] if nll else None,
            "tokens": 1,
            "truncated": truncated[i] if truncated else None,
        }
        for seed, answers in by_seed.items()
        for i, passed in enumerate(answers)
    ]
    return pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)


def costs(parameters):
    return {"parameters": parameters, "bytes": 4 * parameters, "tokens_per_second": None}


def evidence(champion=None, efficiency=None, suites=("test",), published_seed=0, **scores):
    sizes = {"student": costs(100), "teacher": costs(1000)} if efficiency is None else efficiency
    return Evidence(scores=scores, efficiency=sizes, suites=suites, confidence=0.95, published_seed=published_seed, champion=champion)


def judge(rule, found):
    verdict = decide(found, Gate(rules=(rule,)))
    assert verdict.promote == all(reason.holds for reason in verdict.reasons)
    return verdict.reasons[0]


GOOD, POOR = [1.0] * 45 + [0.0] * 5, [1.0] * 10 + [0.0] * 40
SEEDS = (0, 1, 2)
BETTER = BetterThan(kind="better_than", metric="pass_at_1", than="baseline")
FLOOR = Floor(kind="floor", metric="pass_at_1", minimum=0.5)
SMALL = Ceiling(kind="ceiling", metric="parameter_ratio", maximum=1.0)


def test_better_than_needs_the_whole_interval_above():
    good, poor = table(GOOD, seeds=SEEDS), table(POOR, seeds=SEEDS)
    found = judge(BETTER, evidence(student=good, baseline=poor))
    assert found.holds
    assert found.rule == "pass_at_1 on test better than baseline"
    assert found.detail.startswith("improvement +0.7000 [+0.")
    assert found.detail.endswith("on 50 items, about these recipes (3 and 3 seeds), on new items and seeds; required: low end above +0")
    assert not judge(BETTER, evidence(student=good, baseline=good)).holds
    assert not judge(BETTER.model_copy(update={"by": 0.69}), evidence(student=good, baseline=poor)).holds
    a_little = table([1.0] * 11 + [0.0] * 39, seeds=SEEDS)
    assert not judge(BETTER, evidence(student=a_little, baseline=poor)).holds  # better, but by one item of fifty


def test_better_than_turns_around_where_lower_is_better():
    rule = BetterThan(kind="better_than", metric="nll", than="baseline")
    low, high = table(GOOD, nll=[1.0, 1.1] * 25, seeds=SEEDS), table(GOOD, nll=[2.0, 2.2] * 25, seeds=SEEDS)
    assert judge(rule, evidence(student=low, baseline=high)).holds
    assert not judge(rule, evidence(student=high, baseline=low)).holds


def test_recipes_are_not_compared_by_one_seed():
    found = judge(BETTER, evidence(student=table(GOOD), baseline=table(POOR)))
    assert (found.holds, found.detail) == (
        False,
        "refused: one seed says nothing of the recipes of student and baseline; give at least 2 seeds",
    )


def test_the_teacher_is_one_model_and_one_student_can_be_compared_with_it():
    found = judge(BETTER.model_copy(update={"than": "teacher"}), evidence(student=table(GOOD), teacher=table(POOR)))
    assert found.holds
    assert "about these checkpoints, on new items" in found.detail


def test_seeds_that_differ_widen_what_is_said_of_a_recipe():
    lucky = {0: GOOD, 1: [0.0] * 25 + [1.0] * 25, 2: [1.0] * 12 + [0.0] * 38}
    assert not judge(BETTER, evidence(student=table(lucky), baseline=table(POOR, seeds=SEEDS))).holds


def test_floors_and_champion_judge_the_published_seed_alone():
    student = table({0: GOOD, 1: POOR})
    champion = NotWorseThanChampion(kind="not_worse_than_champion", metric="pass_at_1", margin=0.2)
    for seed, holds in ((0, True), (1, False)):
        found = evidence(student=student, old=table(GOOD), champion="old", published_seed=seed)
        reasons = [judge(rule, found) for rule in (FLOOR, champion)]
        assert [reason.holds for reason in reasons] == [holds, holds]
        assert all(f"on 50 items, seed {seed} (published), about th" in reason.detail for reason in reasons)
    alone = estimate(table(GOOD), "pass_at_1", suite="test", confidence=0.95)
    assert judge(FLOOR, evidence(student=student)).detail.startswith(f"0.9000 [{alone.low:.4f}, {alone.high:.4f}]")


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
    assert failed.detail.startswith(f"0.9000 [{low:.4f}, 0.9")
    assert failed.detail.endswith("about this checkpoint, on new items; required: low end at least 0.9")
    with pytest.raises(RecipeError, match="floor on nll"):
        judge(Floor(kind="floor", metric="nll", minimum=0.5), evidence(student=student))


def test_every_suite_is_judged_and_named():
    """A second suite that falls from all right to all wrong is no promotion."""
    scores = pa.concat_tables([table(GOOD), table([0.0] * 50, suite="second")])
    before = pa.concat_tables([table(GOOD), table([1.0] * 50, suite="second")])
    rules = (FLOOR, NotWorseThanChampion(kind="not_worse_than_champion", metric="pass_at_1", margin=0.2), SMALL)
    found = evidence(student=scores, old=before, champion="old", suites=("test", "second"))
    verdict = decide(found, Gate(rules=rules))
    assert not verdict.promote
    assert [(reason.rule, reason.holds) for reason in verdict.reasons] == [
        ("pass_at_1 on test at least 0.5", True),
        ("pass_at_1 on second at least 0.5", False),
        ("pass_at_1 on test not worse than the champion by more than 0.2", True),
        ("pass_at_1 on second not worse than the champion by more than 0.2", False),
        ("parameter_ratio at most 1", True),
    ]
    only_first = decide(found, Gate(rules=tuple(rule if rule is SMALL else rule.model_copy(update={"suite": "test"}) for rule in rules)))
    assert only_first.promote
    assert len(only_first.reasons) == 3


@pytest.mark.parametrize("passes", [[None] * 40, [1.0], [1.0] + [None] * 39, [1.0] * 35 + [None] * 5])
def test_a_suite_that_says_too_little_is_never_promoted(passes):
    """Also where no rule asks for it: a ceiling on the size holds of any model."""
    verdict = decide(evidence(student=table(passes)), Gate(rules=(SMALL,)))
    assert [reason.holds for reason in verdict.reasons] == [True, False]
    right = sum(passed is not None for passed in passes)
    assert f"pass@1 on {right} of {len(passes)} items" in verdict.reasons[1].detail
    assert verdict.headline == "Not promoted: 1 of 2 rules failed (test is measured)."


@pytest.mark.parametrize(("left_out", "holds"), [(5, True), (6, False)])
def test_a_tenth_of_the_items_may_be_left_out(left_out, holds):
    student = table(GOOD[: 50 - left_out] + [None] * left_out, nll=[1.0] * 50)
    for rule, other in ((FLOOR, {}), (BETTER.model_copy(update={"than": "teacher"}), {"teacher": table(POOR)})):
        found = judge(rule, evidence(student=student, **other))
        assert found.holds is holds
        assert f"on {50 - left_out} of 50 items" in found.detail


@pytest.mark.parametrize(
    ("metric", "limit", "shown"),
    [
        ("parameter_ratio", 0.1, "0.1000 (100 of 1,000)"),
        ("parameters", 100, "100"),
        ("bytes", 400, "400"),
        ("truncated", 0.1, "0.1000 [0.0"),
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
    rules = (BETTER, FLOOR, Ceiling(kind="ceiling", metric="parameters", maximum=99))
    found = evidence(student=table(GOOD, seeds=SEEDS), baseline=table(POOR, seeds=SEEDS))
    verdict = decide(found, Gate(rules=rules))
    assert [reason.holds for reason in verdict.reasons] == [True, True, False]
    assert verdict.headline == "Not promoted: 1 of 3 rules failed (parameters at most 99)."
    assert decide(found, Gate(rules=rules[:2])).headline == "Promoted: all 2 rules hold."
    assert decide(found, Gate(rules=rules[:1])).headline == "Promoted: its one rule holds."


RULES = (
    BetterThan(kind="better_than", metric="pass_at_1", than="teacher", by=-0.3),
    NotWorseThanChampion(kind="not_worse_than_champion", metric="pass_at_1", margin=0.4),
    Floor(kind="floor", metric="pass_at_1", minimum=0.2),
    Ceiling(kind="ceiling", metric="truncated", maximum=0.5),
    Ceiling(kind="ceiling", metric="parameter_ratio", maximum=0.5),
)


@settings(max_examples=60, deadline=None)
@given(
    passes=RIGHT_OR_WRONG,
    cut=SHARES,
    other=RIGHT_OR_WRONG,
    better=st.lists(st.booleans(), min_size=6, max_size=6),
    size=st.integers(1, 1000),
)
def test_improving_the_student_never_turns_pass_into_fail(passes, cut, other, better, size):
    """Where answers are right or wrong and there is one seed, as ``decide`` says."""

    def verdict(passes, cut, size):
        models = {"student": table(passes, None, cut), "teacher": table(other), "old": table(other[::-1])}
        sizes = {"student": costs(size), "teacher": costs(1000)}
        return decide(evidence(champion="old", efficiency=sizes, **models), Gate(rules=RULES))

    before = verdict(passes, cut, size)
    after = verdict(
        [1.0 if up else p for p, up in zip(passes, better, strict=True)],
        [0.0 if up else t for t, up in zip(cut, better, strict=True)],
        max(1, size // 2),
    )
    for old, new in zip(before.reasons, after.reasons, strict=True):
        assert new.holds or not old.holds, f"{old} -> {new}"
    assert after.promote or not before.promote


ANY_RULE = st.one_of(
    st.builds(
        BetterThan,
        kind=st.just("better_than"),
        metric=st.just("pass_at_1"),
        than=st.sampled_from(["teacher", "baseline"]),
        by=st.floats(-1.0, 1.0),
    ),
    st.builds(Floor, kind=st.just("floor"), metric=st.just("pass_at_1"), minimum=st.floats(0.0, 1.0)),
    st.builds(NotWorseThanChampion, kind=st.just("not_worse_than_champion"), metric=st.just("pass_at_1"), margin=st.floats(0.0, 1.0)),
    st.builds(Ceiling, kind=st.just("ceiling"), metric=st.sampled_from(["parameter_ratio", "truncated"]), maximum=st.floats(0.0, 1.0)),
)


@settings(max_examples=60, deadline=None)
@given(rules=st.lists(ANY_RULE, min_size=1, max_size=3), more=ANY_RULE, passes=SHARES, other=SHARES, seeds=st.sampled_from([(0,), (0, 1)]))
def test_a_rule_more_never_promotes(rules, more, passes, other, seeds):
    models = {
        "student": table(passes, None, other, seeds),
        "baseline": table(other, seeds=seeds),
        "teacher": table(other),
        "old": table(other),
    }
    found = evidence(champion="old", **models)
    fewer, all_of_them = (decide(found, Gate(rules=tuple(chosen))) for chosen in (rules, [*rules, more]))
    assert fewer.promote or not all_of_them.promote
    assert all_of_them.reasons[: len(rules)] == fewer.reasons[: len(rules)]


@settings(max_examples=20, deadline=None)
@given(passes=SHARES, other=SHARES, order=st.permutations(range(12)))
def test_the_verdict_does_not_depend_on_the_order_of_rows(passes, other, order):
    gate = Gate(rules=(BETTER.model_copy(update={"by": -0.2}), FLOOR))
    student, baseline = table(passes, seeds=(0, 1)), table(other, seeds=(0, 1))
    assert decide(evidence(student=student, baseline=baseline), gate) == decide(
        evidence(student=student.take(order), baseline=baseline), gate
    )
