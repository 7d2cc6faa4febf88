"""The promotion decision: a pure function of evidence and the recipe's rules.

It reads no store, moves no alias and keeps no state; whoever has the same evidence comes to the same verdict. Every rule
is answered with its numbers on every suite that it is about, also where it fails; a missing measurement never passes.

What is published is one seed, so floors, truncation and the champion are matters of that checkpoint alone. What is claimed
of a recipe, that it is better than another, needs all seeds, and two of them at least.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import RecipeError
from kd_core.evaluate.statistics import METRICS, Comparison, Estimate, compare, estimate, metric_of, num_measured
from kd_core.recipe import BetterThan, Ceiling, Floor, Gate, NotWorseThanChampion, Rule
from kd_core.summaries import RuleResult

__all__ = ["LEAST_MEASURED", "Efficiency", "Evidence", "Verdict", "decide"]

LEAST_MEASURED = 0.9
"""Share of a suite's items that a metric must have been measured on. Items are left out for what they are (too long, not
to be verified), not by chance, and each could be right or wrong: a tenth can move a share by as much as the whole
interval over 400 items is wide. With more left out, the number is that of another suite."""


class Efficiency(TypedDict):
    """Costs of a model: parameters, bytes of its weights, generated tokens a second (None: not measured)."""

    parameters: int
    bytes: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Evidence:
    """Evidence that a decision may rest on, and nothing else.

    Attributes:
        scores: tables of ``SCORE_SCHEMA`` by model name; 'student' is the one to decide on.
        efficiency: costs by model name.
        suites: names of the suites, all of them.
        confidence: coverage of the intervals.
        published_seed: seed of the student that would be published.
        champion: name under which the current champion stands in ``scores``; None if there is no champion yet.
    """

    scores: Mapping[str, pa.Table]
    efficiency: Mapping[str, Efficiency]
    suites: tuple[str, ...]
    confidence: float
    published_seed: int
    champion: str | None


@dataclass(frozen=True)
class Verdict:
    """Promote or not, with one reason a rule and suite, in the recipe's order; then the suites that say too little."""

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
    """Decide whether the student becomes the champion: yes if every rule holds, and every suite was measured.

    A rule more never promotes. A better measurement turns no rule that holds into one that fails, where answers are right
    or wrong and there is one seed; elsewhere it may, as one value far from the others also says that values vary more.

    Args:
        evidence: scores and costs.
        gate: the rules.

    Returns:
        The verdict with its reasons.

    Raises:
        RecipeError: a floor on a metric of which less is better.
        KDError: score tables are incomplete, or two models were measured on different items.
    """
    reasons = [reason for rule in gate.rules for reason in _judge(evidence, rule)]
    reasons += _suites_that_say_too_little(evidence)
    return Verdict(all(reason.holds for reason in reasons), tuple(reasons))


def _judge(evidence: Evidence, rule: Rule) -> Iterator[RuleResult]:
    if isinstance(rule, Ceiling) and rule.metric != "truncated":
        yield _cost(evidence, rule)
        return
    for suite in evidence.suites if rule.suite is None else (rule.suite,):
        match rule:
            case BetterThan():
                yield _better_than(evidence, rule, suite)
            case NotWorseThanChampion():
                yield _not_worse_than_champion(evidence, rule, suite)
            case Floor():
                yield _floor(evidence, rule, suite)
            case Ceiling():
                yield _truncated(evidence, rule, suite)


def _suites_that_say_too_little(evidence: Evidence) -> Iterator[RuleResult]:
    """One reason for each suite on which no metric of the student was measured on enough items, whatever the rules ask for."""
    student = _student(evidence, published=True)
    for suite in evidence.suites:
        names = [name for name in METRICS if name != "truncated"]
        counts = [(0, 0) if student is None else num_measured(student, name, suite=suite) for name in names]
        if not any(measured >= 2 and measured >= LEAST_MEASURED * total for measured, total in counts):
            found = ", ".join(f"{metric_of(name).label} on {m} of {total} items" for name, (m, total) in zip(names, counts, strict=True))
            yield RuleResult(f"{suite} is measured", False, f"student has {found}; required of one of them: {_REQUIRED_ITEMS}")


# ---------------------------------------------------------------------------------------------- recipes, over all seeds


def _better_than(evidence: Evidence, rule: BetterThan, suite: str) -> RuleResult:
    margin = f" by more than {rule.by:g}" if rule.by else ""
    text = f"{rule.metric} on {suite} better than {rule.than}{margin}"
    return _improvement_above(evidence, rule.metric, suite, rule.than, least=rule.by, published=False, text=text)


def _not_worse_than_champion(evidence: Evidence, rule: NotWorseThanChampion, suite: str) -> RuleResult:
    text = f"{rule.metric} on {suite} not worse than the champion by more than {rule.margin:g}"
    if evidence.champion is None:
        return RuleResult(text, True, "there is no champion yet")
    return _improvement_above(evidence, rule.metric, suite, evidence.champion, least=-rule.margin, published=True, text=text)


def _improvement_above(evidence: Evidence, metric: str, suite: str, other: str, *, least: float, published: bool, text: str) -> RuleResult:
    """Tell whether the student improves on another model by more than ``least``; the published seed alone may also equal it."""
    student = _student(evidence, published=published)
    if student is None or other not in evidence.scores:
        return RuleResult(text, False, f"not measured: there are no scores of {'student' if student is None else other}")
    pair = compare(student, evidence.scores[other], metric, suite=suite, confidence=evidence.confidence, names=("student", other))
    if pair is None or not _enough(pair.n, pair.left_out):
        return RuleResult(text, False, _not_measured(metric, f"both student and {other}", pair))
    if not published and other != "teacher" and min(pair.num_seeds) == 1:
        return RuleResult(text, False, f"refused: one seed says nothing of the recipes of student and {other}; give at least 2 seeds")
    holds = pair.improvement_low >= least if published else pair.improvement_low > least
    found = f"improvement {pair.improvement:+.4f} [{pair.improvement_low:+.4f}, {pair.improvement_high:+.4f}]"
    judged = f"{_items(pair.n, pair.left_out)}{_published(evidence) if published else ''}, about {pair.scope}"
    return RuleResult(text, holds, f"{found} {judged}; required: low end {'at least' if published else 'above'} {least:+g}")


# ---------------------------------------------------------------------------------------------- the published checkpoint


def _floor(evidence: Evidence, rule: Floor, suite: str) -> RuleResult:
    text = f"{rule.metric} on {suite} at least {rule.minimum:g}"
    if not metric_of(rule.metric).higher_is_better:
        raise RecipeError(
            f"gate: a floor on {rule.metric} makes no sense, less of it is better; use better_than or not_worse_than_champion"
        )
    found = _estimate(evidence, rule.metric, suite)
    if found is None or not _enough(found.n, found.left_out):
        return RuleResult(text, False, _not_measured(rule.metric, "student", found))
    return RuleResult(text, found.low >= rule.minimum, f"{_shown(evidence, found)}; required: low end at least {rule.minimum:g}")


def _truncated(evidence: Evidence, rule: Ceiling, suite: str) -> RuleResult:
    text = f"truncated on {suite} at most {rule.maximum:g}"
    found = _estimate(evidence, "truncated", suite)
    if found is None or not _enough(found.n, found.left_out):
        return RuleResult(text, False, _not_measured("truncated", "student", found))
    return RuleResult(text, found.value <= rule.maximum, f"{_shown(evidence, found)}; required: at most {rule.maximum:g}")


def _cost(evidence: Evidence, rule: Ceiling) -> RuleResult:
    text = f"{rule.metric} at most {rule.maximum:g}"
    student, teacher = evidence.efficiency.get("student"), evidence.efficiency.get("teacher")
    value: float | None = None
    shown = ""
    if rule.metric == "parameter_ratio":
        if student is not None and teacher is not None and teacher["parameters"] > 0:
            value = student["parameters"] / teacher["parameters"]
            shown = f"{value:.4f} ({student['parameters']:,} of {teacher['parameters']:,})"
    elif student is not None:
        value = student["bytes"] if rule.metric == "bytes" else student["parameters"]
        shown = f"{value:,}"
    if value is None:
        return RuleResult(text, False, f"not measured: {rule.metric} of student")
    return RuleResult(text, value <= rule.maximum, f"{shown}; required: at most {rule.maximum:g}")


def _estimate(evidence: Evidence, metric: str, suite: str) -> Estimate | None:
    student = _student(evidence, published=True)
    return None if student is None else estimate(student, metric, suite=suite, confidence=evidence.confidence)


def _student(evidence: Evidence, *, published: bool) -> pa.Table | None:
    """Scores of the student, of all seeds or of the published one."""
    scores = evidence.scores.get("student")
    if scores is None or not published:
        return scores
    return scores.filter(pc.equal(scores["seed"], evidence.published_seed))


# ---------------------------------------------------------------------------------------------- words


_REQUIRED_ITEMS = f"two items, and {LEAST_MEASURED:.0%} of all"


def _enough(measured: int, left_out: int) -> bool:
    return measured >= LEAST_MEASURED * (measured + left_out)


def _not_measured(metric: str, whose: str, found: Estimate | Comparison | None) -> str:
    items = "on no two items" if found is None else _items(found.n, found.left_out)
    return f"not measured: {metric} of {whose} {items}; required: {_REQUIRED_ITEMS} (a rule can name another suite)"


def _shown(evidence: Evidence, found: Estimate) -> str:
    judged = f"{_items(found.n, found.left_out)}{_published(evidence)}, about {found.scope}"
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}] {judged}"


def _items(measured: int, left_out: int) -> str:
    return f"on {measured} items" if not left_out else f"on {measured} of {measured + left_out} items"


def _published(evidence: Evidence) -> str:
    return f", seed {evidence.published_seed} (published)"


def _all_of(num_rules: int) -> str:
    return "its one rule holds" if num_rules == 1 else f"all {num_rules} rules hold"
