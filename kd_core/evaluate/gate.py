"""The promotion decision: a pure function of evidence and the recipe's rules.

It reads no store, moves no alias and keeps no state; whoever has the same evidence comes to the same verdict. Every rule
is answered with its numbers, also where it fails, and a missing measurement never passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

import pyarrow as pa

from kd_core.errors import RecipeError
from kd_core.evaluate.statistics import Estimate, compare, estimate, metric_of
from kd_core.recipe import BetterThan, Ceiling, Floor, Gate, NotWorseThanChampion, Rule

__all__ = ["Efficiency", "Evidence", "RuleResult", "Verdict", "decide"]


class Efficiency(TypedDict):
    """What a model costs: parameters, bytes of its weights, generated tokens a second (None: not measured)."""

    parameters: int
    bytes: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Evidence:
    """All that a decision may rest on.

    Attributes:
        scores: tables of ``SCORE_SCHEMA`` by model name; 'student' is the one to decide on.
        efficiency: costs by model name.
        suite: the suite that rules speak of.
        confidence: coverage of the intervals.
        champion: name under which the current champion stands in ``scores``; None if there is no champion yet.
    """

    scores: Mapping[str, pa.Table]
    efficiency: Mapping[str, Efficiency]
    suite: str
    confidence: float
    champion: str | None


@dataclass(frozen=True)
class RuleResult:
    """One rule in words, whether it holds, and the numbers: found and required."""

    rule: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """Promote or not, with one reason a rule, in the recipe's order."""

    promote: bool
    reasons: tuple[RuleResult, ...]

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        failed = [reason.rule for reason in self.reasons if not reason.holds]
        if self.promote:
            return f"Promoted: {_all_of(len(self.reasons))}."
        return f"Not promoted: {len(failed)} of {len(self.reasons)} rules failed ({'; '.join(failed)})."


def decide(evidence: Evidence, gate: Gate) -> Verdict:
    """Decide whether the student becomes the champion: yes if every rule holds.

    Improving any measurement of the student, all else equal, never turns a rule that holds into one that fails.

    Args:
        evidence: scores and costs.
        gate: the rules.

    Returns:
        The verdict with one reason a rule.

    Raises:
        RecipeError: a floor on a metric of which less is better.
        KDError: score tables are incomplete, or two models were measured on different items.
    """
    reasons = tuple(_judge(evidence, rule) for rule in gate.rules)
    return Verdict(all(reason.holds for reason in reasons), reasons)


def _judge(evidence: Evidence, rule: Rule) -> RuleResult:
    match rule:
        case BetterThan():
            return _better_than(evidence, rule)
        case NotWorseThanChampion():
            return _not_worse_than_champion(evidence, rule)
        case Floor():
            return _floor(evidence, rule)
        case Ceiling():
            return _ceiling(evidence, rule)


def _better_than(evidence: Evidence, rule: BetterThan) -> RuleResult:
    margin = f" by more than {rule.by:g}" if rule.by else ""
    text = f"{rule.metric} better than {rule.than}{margin}"
    return _improvement_above(evidence, rule.metric, rule.than, least=rule.by, strictly=True, text=text)


def _not_worse_than_champion(evidence: Evidence, rule: NotWorseThanChampion) -> RuleResult:
    text = f"{rule.metric} not worse than the champion by more than {rule.margin:g}"
    if evidence.champion is None:
        return RuleResult(text, True, "there is no champion yet")
    return _improvement_above(evidence, rule.metric, evidence.champion, least=-rule.margin, strictly=False, text=text)


def _improvement_above(evidence: Evidence, metric: str, other: str, *, least: float, strictly: bool, text: str) -> RuleResult:
    for name in ("student", other):
        if name not in evidence.scores:
            return RuleResult(text, False, f"not measured: there are no scores of {name}")
    pair = compare(
        evidence.scores["student"],
        evidence.scores[other],
        metric,
        suite=evidence.suite,
        confidence=evidence.confidence,
        names=("student", other),
    )
    if pair is None:
        return RuleResult(text, False, f"not measured: {metric} on suite {evidence.suite} for both student and {other}")
    holds = pair.improvement_low > least if strictly else pair.improvement_low >= least
    found = f"improvement {pair.improvement:+.4f} [{pair.improvement_low:+.4f}, {pair.improvement_high:+.4f}]"
    return RuleResult(text, holds, f"{found}; required: low end {'above' if strictly else 'at least'} {least:+g}")


def _floor(evidence: Evidence, rule: Floor) -> RuleResult:
    text = f"{rule.metric} at least {rule.minimum:g}"
    if not metric_of(rule.metric).higher_is_better:
        raise RecipeError(
            f"gate: a floor on {rule.metric} makes no sense, less of it is better; use better_than or not_worse_than_champion"
        )
    found = _estimate(evidence, rule.metric)
    if found is None:
        return RuleResult(text, False, f"not measured: {rule.metric} of student on suite {evidence.suite}")
    return RuleResult(text, found.low >= rule.minimum, f"{_shown(found)}; required: low end at least {rule.minimum:g}")


def _ceiling(evidence: Evidence, rule: Ceiling) -> RuleResult:
    text = f"{rule.metric} at most {rule.maximum:g}"
    student, teacher = evidence.efficiency.get("student"), evidence.efficiency.get("teacher")
    value: float | None = None
    shown = ""
    if rule.metric == "truncated":
        found = _estimate(evidence, "truncated")
        value, shown = (None, "") if found is None else (found.value, _shown(found))
    elif rule.metric == "parameter_ratio":
        if student is not None and teacher is not None and teacher["parameters"] > 0:
            value = student["parameters"] / teacher["parameters"]
            shown = f"{value:.4f} ({student['parameters']:,} of {teacher['parameters']:,})"
    elif student is not None:
        value = student[rule.metric]
        shown = f"{value:,}"
    if value is None:
        return RuleResult(text, False, f"not measured: {rule.metric} of student")
    return RuleResult(text, value <= rule.maximum, f"{shown}; required: at most {rule.maximum:g}")


def _estimate(evidence: Evidence, metric: str) -> Estimate | None:
    if "student" not in evidence.scores:
        return None
    return estimate(evidence.scores["student"], metric, suite=evidence.suite, confidence=evidence.confidence)


def _shown(found: Estimate) -> str:
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}] on {found.n} items"


def _all_of(num_rules: int) -> str:
    return "its one rule holds" if num_rules == 1 else f"all {num_rules} rules hold"
