"""Statistics of score tables: values with intervals, and paired differences between two models.

Owns the form of a score table and the metrics over it; the formula of every interval is in ``intervals``. It reads tables
and returns numbers; it decides nothing (``gate`` does) and draws nothing (``report`` does). Items without a value are left
out and counted. It refuses tables in which rows are missing: a mean over what happens to be there is not a measurement.

Axes: I items, S seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import KDError
from kd_core.evaluate.intervals import Array, difference_interval, linearised, mean_interval, share_interval

__all__ = ["METRICS", "SCORE_SCHEMA", "Comparison", "Estimate", "Metric", "compare", "estimate", "metric_of", "num_measured"]

SCORE_SCHEMA = pa.schema(
    [
        pa.field("suite", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        ("pass_at_1", pa.float64()),
        ("accuracy", pa.float64()),
        ("unseen_recall", pa.float64()),
        ("nll_sum", pa.float64()),
        ("kl_sum", pa.float64()),
        ("agreement_sum", pa.float64()),
        ("tokens", pa.int64()),
        ("truncated", pa.float64()),
        ("text", pa.string()),
    ]
)
"""One row per (suite, item_id, seed) of one model. Sums run over the supervised tokens of the item's gold answer, of
which there are ``tokens``; they are null for items without one (kl and agreement also without a teacher that scores).
``accuracy`` is 1 where the class is right, ``unseen_recall`` the same on items of classes that the student never saw, and null
on others. ``pass_at_1`` is the share of right answers among the samples, ``truncated`` the share that met the token limit, ``text``
the first sample; null where nothing was generated."""

Form = Literal["share", "per_token", "token_share"]


@dataclass(frozen=True)
class Metric:
    """Rule by which a column becomes a number, and how to read that.

    Attributes:
        name: key in ``METRICS``.
        column: column of the score table.
        form: share: mean over items of a number in [0, 1]. per_token: sum of the column over sum of ``tokens``.
            token_share: the same, and in [0, 1].
        higher_is_better: direction of improvement.
        label: name for people.
        meaning: one line for a newcomer.
        of_some: whether it is about some items by what they are: others are not missing.
    """

    name: str
    column: str
    form: Form
    higher_is_better: bool
    label: str
    meaning: str
    of_some: bool = False


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("pass_at_1", "pass_at_1", "share", True, "pass@1", "Share of answers that are right; higher is better."),
            Metric("accuracy", "accuracy", "share", True, "Accuracy", "Share of items whose class is right; higher is better."),
            Metric(
                "unseen_recall",
                "unseen_recall",
                "share",
                True,
                "Recall of the unseen",
                "Share right among items of classes that were never in the student's rows; higher is better.",
                of_some=True,
            ),
            Metric("nll", "nll_sum", "per_token", False, "NLL", "Surprise at the gold answer, nats a token; lower is better."),
            Metric(
                "kl",
                "kl_sum",
                "per_token",
                False,
                "KL to teacher",
                "Distance from the teacher's distribution, nats a token; 0 is the teacher.",
            ),
            Metric(
                "agreement",
                "agreement_sum",
                "token_share",
                True,
                "Agreement",
                "Share of tokens where the first choice is the teacher's; higher is better.",
            ),
            Metric("truncated", "truncated", "share", False, "Truncated", "Share of answers cut at the token limit; lower is better."),
        )
    }
)


def metric_of(name: str) -> Metric:
    """The metric behind a name, which a further suite may precede: 'pass_at_1' or 'gsm8k/pass_at_1'.

    Raises:
        KDError: there is no such metric.

    >>> metric_of("gsm8k/nll").higher_is_better
    False
    """
    metric = METRICS.get(name.rsplit("/", 1)[-1])
    if metric is None:
        raise KDError(f"metric {name!r} does not exist; known are {', '.join(METRICS)}")
    return metric


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval.

    Attributes:
        value: over all items and seeds that were measured.
        low: lower end.
        high: upper end.
        n: items that were measured.
        left_out: items of the suite without a value.
        num_seeds: one: the interval is about this checkpoint on new items. More: about the recipe, on new items and seeds.
    """

    value: float
    low: float
    high: float
    n: int
    left_out: int
    num_seeds: int

    @property
    def scope(self) -> str:
        """Say in words what the interval is about."""
        return "this checkpoint, on new items" if self.num_seeds == 1 else f"the recipe ({self.num_seeds} seeds), on new items and seeds"


@dataclass(frozen=True)
class Comparison:
    """The paired difference ``a - b`` of one metric between two models, with its interval.

    ``improvement`` and its ends are the same numbers turned so that above zero means that a is better than b.

    Attributes:
        metric: a name that ``metric_of`` knows.
        a: name of the first model.
        b: name of the second.
        difference: a - b.
        low: lower end.
        high: upper end.
        n: items measured for both.
        left_out: items of the suite without a value for either.
        num_seeds: of a and b; a model with one stands for that checkpoint alone.
    """

    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float
    n: int
    left_out: int
    num_seeds: tuple[int, int]

    @property
    def scope(self) -> str:
        """Say in words what the interval is about."""
        of_a, of_b = self.num_seeds
        if of_a == of_b == 1:
            return "these checkpoints, on new items"
        if of_a > 1 and of_b > 1:
            return f"these recipes ({of_a} and {of_b} seeds), on new items and seeds"
        recipe, seeds, checkpoint = (self.a, of_a, self.b) if of_a > 1 else (self.b, of_b, self.a)
        return f"the recipe of {recipe} ({seeds} seeds) and this {checkpoint}, on new items and seeds"

    @property
    def improvement(self) -> float:
        """Improvement of a on b; negative where a is worse."""
        return self.difference if metric_of(self.metric).higher_is_better else -self.difference

    @property
    def improvement_low(self) -> float:
        """The end of the interval that is worse for a."""
        return self.low if metric_of(self.metric).higher_is_better else -self.high

    @property
    def improvement_high(self) -> float:
        """The end of the interval that is better for a."""
        return self.high if metric_of(self.metric).higher_is_better else -self.low


def estimate(scores: pa.Table, metric: str, *, suite: str, confidence: float) -> Estimate | None:
    """A metric of one model with its interval over new items and, where there are several seeds, new seeds.

    Args:
        scores: a table of ``SCORE_SCHEMA`` for one model.
        metric: a key of ``METRICS``.
        suite: rows of this suite are used.
        confidence: coverage, for example 0.95.

    Returns:
        The estimate; None if fewer than two items were measured, as one says nothing of others.

    Raises:
        KDError: (item, seed) pairs are missing or there twice, or a value is not finite or out of its range.
    """
    grid = _grid(scores, metric, suite)
    if grid is None:
        return None
    kept = grid.measured
    if kept.sum() < 2:
        return None
    x_IS = grid.values(kept)
    if grid.form == "per_token":
        low, high = mean_interval(x_IS, confidence)
        low = np.maximum(low, min(0.0, float(x_IS.mean())))  # neither a loss nor a divergence can be negative
    else:
        low, high = share_interval(x_IS, confidence, answers=max(1.0, float(grid.denominator[kept].mean())))
    return Estimate(float(x_IS.mean()), float(low), float(high), len(x_IS), int((~kept).sum()), x_IS.shape[1])


def compare(
    a: pa.Table, b: pa.Table, metric: str, *, suite: str, confidence: float, names: tuple[str, str] = ("a", "b")
) -> Comparison | None:
    """The difference a - b of a metric with its interval, paired by item, over the items that both have a value for.

    Args:
        a: score table of the first model.
        b: score table of the second.
        metric: a key of ``METRICS``.
        suite: rows of this suite are used.
        confidence: coverage, for example 0.95.
        names: names of both models, for the result.

    Returns:
        The difference; None if fewer than two items were measured for both.

    Raises:
        KDError: the tables hold different items (with their number), or as ``estimate``.
    """
    grid_a, grid_b = _grid(a, metric, suite), _grid(b, metric, suite)
    if grid_a is None or grid_b is None:
        return None
    _expect_same_items(grid_a, grid_b, f"{metric} on suite {suite}: {names[0]} and {names[1]}")
    kept = grid_a.measured & grid_b.measured
    if kept.sum() < 2:
        return None
    a_IS, b_IS = grid_a.values(kept), grid_b.values(kept)
    low, high = difference_interval(a_IS, b_IS, confidence, shares=metric_of(metric).form == "share")
    difference, seeds = float(a_IS.mean() - b_IS.mean()), (a_IS.shape[1], b_IS.shape[1])
    return Comparison(metric, *names, difference, float(low), float(high), len(a_IS), int((~kept).sum()), seeds)


def num_measured(scores: pa.Table, metric: str, *, suite: str) -> tuple[int, int]:
    """Count one model's (items with a value for every seed, items of the suite)."""
    grid = _grid(scores, metric, suite)
    return (0, 0) if grid is None else (int(grid.measured.sum()), len(grid.items))


# ---------------------------------------------------------------------------------------------- the grid of one metric


@dataclass(frozen=True)
class _Grid:
    """Numerators and denominators of a metric, float64 [I, S], items and seeds sorted; ``measured`` [I] says where for all seeds."""

    form: Form
    items: tuple[str, ...]
    measured: npt.NDArray[np.bool_]
    numerator: Array
    denominator: Array

    def values(self, kept: npt.NDArray[np.bool_]) -> Array:
        """The metric of the kept items, [I, S]: its mean is the metric."""
        return self.numerator[kept] if self.form == "share" else linearised(self.numerator[kept], self.denominator[kept])


def _grid(scores: pa.Table, metric: str, suite: str) -> _Grid | None:
    chosen = metric_of(metric)
    rows = scores.filter(pc.equal(scores["suite"], suite))
    if chosen.of_some:
        rows = rows.filter(pc.is_valid(rows[chosen.column]))
    if rows.num_rows == 0:
        return None
    items, item_of_row = np.unique(np.array(rows["item_id"].to_pylist(), dtype=object), return_inverse=True)
    seeds, seed_of_row = np.unique(rows["seed"].to_numpy(), return_inverse=True)
    shape = (len(items), len(seeds))
    times = np.bincount(item_of_row * shape[1] + seed_of_row, minlength=shape[0] * shape[1])
    where = f"scores of suite {suite!r}"
    if (times != 1).any():
        raise KDError(
            f"{where}: {shape[0]} items x {shape[1]} seeds need one row each; {(times == 0).sum()} are missing "
            f"and {(times > 1).sum()} are there more than once; evaluate this model again"
        )
    place = (item_of_row, seed_of_row)
    measured_IS = np.zeros(shape, dtype=bool)
    measured_IS[place] = pc.is_valid(rows[chosen.column]).to_numpy()
    measured: npt.NDArray[np.bool_] = np.all(measured_IS, axis=1)
    num_IS, den_IS = np.zeros(shape), np.ones(shape)
    num_IS[place] = rows[chosen.column].to_numpy()
    if chosen.form != "share":
        den_IS[place] = pc.fill_null(rows["tokens"], 0).to_numpy()
    _expect_numbers(num_IS[measured], den_IS[measured], f"{where}: {metric}", chosen.form)
    return _Grid(chosen.form, tuple(items), measured, num_IS, den_IS)


def _expect_numbers(num_IS: Array, den_IS: Array, where: str, form: Form) -> None:
    if not np.isfinite(num_IS).all():
        raise KDError(f"{where} is not finite on {int((~np.isfinite(num_IS)).any(axis=1).sum())} items; the model's output is broken")
    if form != "per_token" and ((num_IS < 0.0) | (num_IS > den_IS * (1.0 + 1e-9))).any():
        raise KDError(f"{where} is a share and must lie in [0, 1]; found sums of {num_IS.min():g} to {num_IS.max():g}")
    if (den_IS <= 0.0).any():
        raise KDError(f"{where} has {int((den_IS <= 0).any(axis=1).sum())} items with a sum over no tokens; it must be null there")


def _expect_same_items(a: _Grid, b: _Grid, what: str) -> None:
    only_a, only_b = set(a.items) - set(b.items), set(b.items) - set(a.items)
    if only_a or only_b:
        example = min(only_a or only_b)
        raise KDError(
            f"{what} were measured on different items: {len(only_b)} are missing from the first and {len(only_a)} from the second "
            f"(for example {example!r}); evaluate both on the same items"
        )
