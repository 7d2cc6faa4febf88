"""The finding of a run in a sentence or two: what was asked, what was found, what was decided.

A pure function of the report's data. It calls a model better or worse where the whole interval of the paired difference is on one
side of 0, and says "not told apart" elsewhere; it says when nothing was compared, and that one seed says nothing of a recipe.
A promotion is a matter of the gate's rules; whether the run shows what distillation claims, a student better than without the
teacher's work, is told apart from it here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kd_core.evaluate.certainty import SURE
from kd_core.evaluate.report_data import ReportData, ratio
from kd_core.evaluate.statistics import Comparison, Estimate, metric_of

__all__ = ["Claim", "Finding", "certainty_words", "find"]

Claim = Literal["shown", "not_shown", "contradicted"]

_GRADED = ("pass_at_1", "accuracy")
_VALUES = {"pass_at_1": "{} of answers right", "accuracy": "{} of answers right", "agreement": "{} agreement with the teacher"}
_SIDES = {
    "teacher": ("the student", "the teacher", "is"),
    "baseline": ("the student", "gold answers alone", "is"),
    "ablation_hard": ("soft labels", "hard ones", "are"),
    "champion": ("the student", "the champion", "is"),
}
"""Other model -> what stands for the student against it, what for the other, and the verb."""
_LOSSES = {
    "baseline": "gold answers alone did better",
    "ablation_hard": "soft labels lost to hard ones",
    "champion": "the champion did better",
}
_FRACTIONS = ("a third", "a quarter", "a fifth", "a sixth", "a seventh", "an eighth", "a ninth", "a tenth")
_MOSTLY_SURE = 0.9


@dataclass(frozen=True)
class Finding:
    """A run in a few words.

    Attributes:
        asked: the question.
        found: the answer, with figures and intervals.
        decided: the gate's verdict in one line.
        title: the decision, and what stands against it, in a few words.
        claim: shown: promoted, and better than a model that did without the teacher's soft labels or its work, from two seeds or
            more. contradicted: worse than such a model, or than the champion. not_shown: neither.
    """

    asked: str
    found: str
    decided: str
    title: str
    claim: Claim

    @property
    def text(self) -> str:
        """All three in one line."""
        return f"{self.asked} {self.found} {self.decided}"


def find(data: ReportData) -> Finding:
    """Draw the finding from a report's data."""
    question = _question(data.description)
    asked = f"Asked: {question}" if question else f"Asked whether a student{_size(data)} can do the teacher's work on {data.suites[0]}:"
    found = "; ".join(_clauses(data)) + "."
    if len(data.seeds) == 1:
        found += " One seed: this is about these checkpoints, and says nothing of the recipe with another seed."
    claim = _claim(data)
    return Finding(asked, found[0].upper() + found[1:] if question else found, data.verdict.headline, _title(data, claim), claim)


def certainty_words(data: ReportData) -> str | None:
    """Say how sure the teacher was, and what that means for its soft labels; None where it gave none."""
    own = data.certainty
    if own is None:
        return None
    figures = (
        f"At the {own.positions:,} positions that it labelled, the teacher's mean entropy is {own.mean_entropy:.3f} nats; "
        f"at {own.sure_share:.1%} of {own.positions_read:,} of them its likeliest token has a probability above {SURE:g}."
    )
    if own.sure_share >= _MOSTLY_SURE:
        return f"{figures} A teacher that is always sure has nothing more to say than its words: soft and hard labels then tie."
    return f"{figures} Where a teacher hesitates, its probabilities say what its words cannot."


# ---------------------------------------------------------------------------------------------- what was asked


def _question(description: str) -> str | None:
    """The first sentence of a description that ends in a question mark."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(description.split()))
    return next((sentence for sentence in sentences if sentence.endswith("?")), None)


def _size(data: ReportData) -> str:
    times = ratio(data.model("teacher"), data.model("student"), "params")
    if times is None:
        return ""
    if times < 0.95:
        return " larger than the teacher"
    if times <= 1.05:
        return " of the teacher's size"
    if times < 1.5:
        return f" of {1 / times:.0%} of the teacher's size"
    whole = round(times)
    return " half the teacher's size" if whole == 2 else f" {_fraction(whole)} of the teacher's size"


def _fraction(times: int) -> str:
    return _FRACTIONS[times - 3] if times - 3 < len(_FRACTIONS) else f"1/{times}"


# ---------------------------------------------------------------------------------------------- what was found


def _clauses(data: ReportData) -> Iterator[str]:
    """The finding's parts: the student's own figure, each comparison on the first suite, and losses on the others."""
    student, metric = data.model("student"), data.headline_metric
    if student is None or metric not in student.metrics:
        yield "nothing was measured of the student"
    else:
        yield f"it reaches {_value(metric, student.metrics[metric])}"
    if not data.comparisons:
        yield "it was compared with no other model"
    for other in _SIDES:
        if pairs := _said_pairs(data, other):
            yield _compared(data, other, pairs)
    if student is not None and "unseen_recall" in student.metrics:
        yield _unseen(data, student.metrics["unseen_recall"])
    for suite in data.suites[1:]:
        for pair in _losses(data, suite):
            yield f"on {suite} {_told(data, pair)}"


def _value(metric: str, found: Estimate) -> str:
    shown = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return _VALUES.get(metric, f"{_name(metric)} {{}}").format(shown)


def _name(metric: str) -> str:
    """A metric's name inside a sentence."""
    label = metric_of(metric).label
    return label.lower() if label.istitle() else label


def _said_pairs(data: ReportData, other: str) -> list[Comparison]:
    """Differences on the first suite by which the student is set against another model.

    Where nothing is graded there are three distances: against hard labels all are said, against others the headline's and those that
    are told apart.
    """
    metric = data.headline_metric
    if metric in _GRADED:
        names: tuple[str, ...] = (metric,)
    else:
        names = ("nll",) if other == "teacher" else ("agreement", "nll", "kl")
    pairs = [pair for name in names if (pair := data.comparison(name, other)) is not None]
    return [pair for pair in pairs if other in ("teacher", "ablation_hard") or pair.metric == metric or not _is_open(pair)]


def _compared(data: ReportData, other: str, pairs: list[Comparison]) -> str:
    row, pair = data.model(other), pairs[0]
    if len(pairs) > 1:
        us, them, _ = _SIDES[other]
        return f"{us} against {them}: {', '.join(f'{_name(pair.metric)} {_outcome(pair)}' for pair in pairs)}"
    if row is None or pair.metric not in row.metrics or other == "ablation_hard":
        return _told(data, pair)
    _, them, _ = _SIDES[other]
    what = "" if pair.metric == data.headline_metric else f"{_name(pair.metric)} "
    reached = f"{them} {'reach' if other == 'baseline' else 'reaches'} {what}{row.metrics[pair.metric].value:.3f}"
    return f"{reached}, {'' if _is_open(pair) else 'and the student is '}{_outcome(pair)}"


def _told(data: ReportData, pair: Comparison) -> str:
    """Say how the student stands against the other model of a pair, in whole words."""
    us, them, verb = _SIDES[pair.b]
    where = "" if metric_of(pair.metric).name == data.headline_metric else f"in {_name(pair.metric)} "
    if _is_open(pair):
        return f"{where}{us} and {them} are {_outcome(pair)}"
    word, rest = _outcome(pair).split(" ", 1)
    return f"{where}{us} {verb} {word} than {them} {rest}"


def _outcome(pair: Comparison) -> str:
    """Name the outcome of a paired difference, with its figures turned so that above 0 is better for the student."""
    if _is_open(pair):
        return f"not told apart ({pair.improvement:+.3f} [{pair.improvement_low:+.3f}, {pair.improvement_high:+.3f}])"
    if pair.improvement_low > 0:
        return f"better by {pair.improvement:.3f} [{pair.improvement_low:.3f}, {pair.improvement_high:.3f}]"
    return f"worse by {-pair.improvement:.3f} [{-pair.improvement_high:.3f}, {-pair.improvement_low:.3f}]"


def _is_open(pair: Comparison) -> bool:
    """Tell whether the interval holds 0."""
    return pair.improvement_low <= 0 <= pair.improvement_high


def _unseen(data: ReportData, own: Estimate) -> str:
    said = f"of the class that no row showed it recognises {own.value:.3f} [{own.low:.3f}, {own.high:.3f}]"
    row, pair = data.model("ablation_hard"), data.comparison("unseen_recall", "ablation_hard")
    if row is None or "unseen_recall" not in row.metrics or pair is None:
        return said
    hard = row.metrics["unseen_recall"]
    return f"{said}, with hard labels {hard.value:.3f} [{hard.low:.3f}, {hard.high:.3f}] ({_outcome(pair)})"


# ---------------------------------------------------------------------------------------------- what it is worth


def _claim(data: ReportData) -> Claim:
    if any(True for suite in data.suites for _ in _losses(data, suite)):
        return "contradicted"
    names = [(metric, other) for other in ("teacher", "baseline", "ablation_hard") for metric in _claimed_metrics(data)]
    pairs = [pair for metric, other in names if (pair := data.comparison(metric, other)) is not None]
    gained = any(pair.improvement_low > 0 for pair in pairs)
    return "shown" if data.verdict.promote and gained and len(data.seeds) > 1 else "not_shown"


def _claimed_metrics(data: ReportData) -> tuple[str, ...]:
    return (data.headline_metric, "unseen_recall") if data.headline_metric in _GRADED else ("agreement", "nll", "kl")


def _losses(data: ReportData, suite: str) -> Iterator[Comparison]:
    """Differences on a suite by which the student is worse than a model that did with less, or than the champion."""
    prefix = "" if suite == data.suites[0] else f"{suite}/"
    for other in _LOSSES:
        for metric in _claimed_metrics(data):
            pair = data.comparison(prefix + metric, other)
            if pair is not None and pair.improvement_high < 0:
                yield pair


def _title(data: ReportData, claim: Claim) -> str:
    promoted = data.verdict.promote
    if claim == "contradicted":
        lost = dict.fromkeys(_LOSSES[pair.b] for suite in data.suites for pair in _losses(data, suite))
        seed = " in this one seed" if len(data.seeds) == 1 else ""
        return f"{'Promoted by its rules, but' if promoted else 'Not promoted, and'} {' and '.join(lost)}{seed}"
    if not promoted:
        return "The student is not promoted"
    if claim == "shown":
        return "The student is promoted"
    if not data.comparisons:
        return "Promoted by its rules; it was compared with no other model"
    if len(data.seeds) == 1:
        return "Promoted by its rules; one seed shows nothing of the recipe"
    return "Promoted by its rules; no gain over the other models is shown"
