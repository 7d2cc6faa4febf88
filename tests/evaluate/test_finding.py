"""The finding of a run: never more than the intervals say, and everything that weakens it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.evaluate import statistics
from kd_core.evaluate.finding import find
from kd_core.evaluate.gate import Verdict
from kd_core.evaluate.report_data import ModelRow, ReportData
from kd_core.evaluate.statistics import Comparison, Estimate, Metric
from kd_core.summaries import RuleResult

HOLDS = Verdict(True, (RuleResult("parameter_ratio at most 1", True, "0.1"),))
FAILS = Verdict(False, (RuleResult("parameter_ratio at most 1", False, "2"),))
OTHERS = ("teacher", "baseline", "ablation_hard", "champion")


def model(name, params=700, **metrics):
    return ModelRow(name, params, None, None, {metric: Estimate(v, v - 0.02, v + 0.02, 400, 0, 5) for metric, v in metrics.items()})


def pair(other, difference, low, high, metric="pass_at_1"):
    return Comparison(metric, "student", other, difference, low, high, 400, 0, (5, 5))


def data(*comparisons, models=None, **changes):
    """A run whose student is measured by pass@1, with these paired differences."""
    found = ReportData(
        recipe_name="sums",
        description="A student learns sums.",
        suites=("held_out",),
        confidence=0.95,
        seeds=(0, 1, 2, 3, 4),
        published_seed=0,
        verdict=HOLDS,
        champion=None,
        models=models
        or (model("teacher", pass_at_1=0.988), model("student", 100, pass_at_1=0.975), model("baseline", 100, pass_at_1=0.302)),
        comparisons=comparisons,
        stages=(),
        command="kd run recipes/sums.yaml",
        recipe_yaml="",
        versions={},
    )
    return replace(found, **changes)


def test_the_whole_sentence():
    found = find(
        data(
            pair("teacher", -0.013, -0.031, 0.004),
            pair("baseline", 0.673, 0.5, 0.8),
            pair("ablation_hard", 0.017, -0.02, 0.05),
        )
    )
    assert found.text == (
        "Asked whether a student a seventh of the teacher's size can do the teacher's work on held_out: it reaches 0.975 [0.955, 0.995] "
        "of answers right; the teacher reaches 0.988, not told apart (-0.013 [-0.031, +0.004]); gold answers alone reach 0.302, and the "
        "student is better by 0.673 [0.500, 0.800]; soft labels and hard ones are not told apart (+0.017 [-0.020, +0.050]). "
        "Promoted: its one rule holds."
    )
    assert (found.title, found.claim) == ("The student is promoted", "shown")


ends = st.floats(-1, 1, allow_nan=False)


@given(other=st.sampled_from(OTHERS), numbers=st.lists(ends, min_size=3, max_size=3).map(sorted), num_seeds=st.integers(1, 5))
def test_better_and_worse_are_said_of_whole_intervals_only(other, numbers, num_seeds):
    low, difference, high = numbers
    found = find(data(pair(other, difference, low, high), seeds=tuple(range(num_seeds))))
    said = f"{found.title} {found.text}"
    if low <= 0 <= high:
        assert "not told apart" in found.found
        assert not any(word in said for word in ("better", "worse", " lost "))
        assert found.claim == "not_shown"
        return
    assert "not told apart" not in said
    assert ("student is better" in said or "labels are better" in said) == (low > 0)
    assert ("worse" in said) == (high < 0)
    assert (found.claim == "contradicted") == (high < 0 and other != "teacher")
    assert (found.claim == "shown") == (low > 0 and other != "champion" and num_seeds > 1)


def test_a_metric_of_which_less_is_better_is_turned():
    models = (model("student", 100, nll=0.9), model("ablation_hard", 100, nll=1.0))
    found = find(data(pair("ablation_hard", -0.1, -0.15, -0.05, metric="nll"), models=models))
    assert "soft labels are better than hard ones by 0.100 [0.050, 0.150]" in found.found
    assert "NLL 0.900 [0.880, 0.920]" in found.found


def test_where_nothing_is_graded_every_distance_is_said():
    models = tuple(model(name, 100, agreement=0.6, nll=0.9, kl=0.2) for name in ("teacher", "student", "baseline", "ablation_hard"))
    pairs = [pair("ablation_hard", 0.008, -0.01, 0.02, "agreement"), pair("ablation_hard", -0.02, -0.08, 0.05, "nll")]
    others = [
        pair("baseline", 0.1, 0.05, 0.2, "agreement"),
        pair("baseline", 0.0, -0.1, 0.1, "nll"),
        pair("teacher", 0.1, 0.05, 0.2, "nll"),
    ]
    found = find(data(*pairs, pair("ablation_hard", -0.19, -0.23, -0.15, "kl"), *others, models=models))
    assert "the teacher reaches NLL 0.900, and the student is worse by 0.100 [0.050, 0.200]; " in found.found
    assert "gold answers alone reach 0.600, and the student is better by 0.100 [0.050, 0.200]; " in found.found
    assert (
        "soft labels against hard ones: agreement not told apart (+0.008 [-0.010, +0.020]), NLL not told apart (+0.020 [-0.050, +0.080]), "
        "KL to teacher better by 0.190 [0.150, 0.230]"
    ) in found.found
    assert found.claim == "shown"


@pytest.mark.parametrize(
    ("comparisons", "verdict", "seeds", "title", "claim"),
    [
        ([pair("ablation_hard", -0.1, -0.2, -0.05)], HOLDS, 5, "Promoted by its rules, but soft labels lost to hard ones", "contradicted"),
        ([pair("baseline", -0.1, -0.2, -0.05)], FAILS, 5, "Not promoted, and gold answers alone did better", "contradicted"),
        (
            [pair("baseline", 0.5, 0.4, 0.6), pair("ablation_hard", -0.1, -0.2, -0.05)],
            HOLDS,
            1,
            "Promoted by its rules, but soft labels lost to hard ones in this one seed",
            "contradicted",
        ),
        ([pair("champion", -0.1, -0.2, -0.05)], HOLDS, 5, "Promoted by its rules, but the champion did better", "contradicted"),
        ([pair("baseline", 0.5, 0.4, 0.6)], HOLDS, 1, "Promoted by its rules; one seed shows nothing of the recipe", "not_shown"),
        ([], HOLDS, 5, "Promoted by its rules; it was compared with no other model", "not_shown"),
        ([pair("baseline", 0.1, -0.1, 0.3)], HOLDS, 5, "Promoted by its rules; no gain over the other models is shown", "not_shown"),
        ([pair("baseline", 0.5, 0.4, 0.6)], FAILS, 5, "The student is not promoted", "not_shown"),
        ([pair("teacher", -0.1, -0.2, -0.05), pair("baseline", 0.5, 0.4, 0.6)], HOLDS, 5, "The student is promoted", "shown"),
    ],
)
def test_what_a_promotion_is_worth_stands_in_the_title(comparisons, verdict, seeds, title, claim):
    found = find(data(*comparisons, verdict=verdict, seeds=tuple(range(seeds))))
    assert (found.title, found.claim) == (title, claim)
    assert ("One seed" in found.found) == (seeds == 1)
    assert ("compared with no other model" in found.found) == (not comparisons)


def test_a_loss_on_a_further_suite_is_said():
    found = find(
        data(pair("ablation_hard", 0.1, 0.05, 0.2), pair("ablation_hard", -0.1, -0.2, -0.05, "long/pass_at_1"), suites=("a", "long"))
    )
    assert "on long soft labels are worse than hard ones by 0.100 [0.050, 0.200]" in found.found
    assert found.claim == "contradicted"


def test_a_question_in_the_description_is_what_was_asked():
    found = find(data(description="Sums of digits.\nCan a student of 0.1M parameters add? It learns from 400 answers."))
    assert found.asked == "Asked: Can a student of 0.1M parameters add?"
    assert found.found.startswith("It reaches 0.975")


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (None, "a student can do"),
        (80, "a student larger than the teacher can do"),
        (100, "a student of the teacher's size can do"),
        (125, "a student of 80% of the teacher's size can do"),
        (200, "a student half the teacher's size can do"),
        (1000, "a student a tenth of the teacher's size can do"),
        (2480, "a student 1/25 of the teacher's size can do"),
    ],
)
def test_sizes_in_words(teacher, words):
    found = find(data(models=(model("teacher", teacher, pass_at_1=0.9), model("student", 100, pass_at_1=0.8))))
    assert words in found.asked


def test_a_class_that_no_row_showed_is_a_claim_of_its_own(monkeypatch):
    shares = {name: Metric(name, name, "share", True, name, "") for name in ("accuracy", "unseen_recall")}
    monkeypatch.setattr(statistics, "METRICS", {**statistics.METRICS, **shares})
    models = (model("student", 100, accuracy=0.9, unseen_recall=0.78), model("ablation_hard", 100, accuracy=0.89, unseen_recall=0.02))
    pairs = (pair("ablation_hard", 0.01, -0.02, 0.04, "accuracy"), pair("ablation_hard", 0.76, 0.7, 0.8, "unseen_recall"))
    found = find(data(*pairs, models=models))
    assert found.found == (
        "it reaches 0.900 [0.880, 0.920] of answers right; soft labels and hard ones are not told apart (+0.010 [-0.020, +0.040]); of the "
        "class that no row showed it recognises 0.780 [0.760, 0.800], with hard labels 0.020 [0.000, 0.040] "
        "(better by 0.760 [0.700, 0.800])."
    )
    assert (found.title, found.claim) == ("The student is promoted", "shown")
    nothing_gained = (pairs[0], pair("ablation_hard", 0.01, -0.02, 0.04, "unseen_recall"))
    assert find(data(*nothing_gained, models=models)).claim == "not_shown"


def test_a_student_that_was_not_measured():
    assert "nothing was measured of the student" in find(data(models=(model("student", 100),))).found
