"""What a score table says: values with intervals, and paired differences between two models.

Owns the form of a score table, the metrics over it, and the one bootstrap that every interval comes from. It reads
tables and returns numbers; it decides nothing (``gate`` does) and draws nothing (``report`` does). It refuses tables in
which items or seeds are missing: a mean over what happens to be there is not a measurement.

Axes: I items, S seeds, R bootstrap replicates.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import KDError

__all__ = ["METRICS", "SCORE_SCHEMA", "Comparison", "Estimate", "Metric", "compare", "estimate", "metric_of", "wilson_interval"]

SCORE_SCHEMA = pa.schema(
    [
        pa.field("suite", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        ("pass_at_1", pa.float64()),
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
``pass_at_1`` is the share of right answers among the samples, ``truncated`` the share that met the token limit, ``text``
the first sample; null where nothing was generated."""

NUM_REPLICATES = 4_000
_BOOTSTRAP_SEED = 20_240_607
_WEIGHTS_IN_MEMORY = 2_000_000

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """How a column becomes a number, and how to read it.

    Attributes:
        name: key in ``METRICS``.
        column: column of the score table.
        form: share: mean over items of a number in [0, 1]. per_token: sum of the column over sum of ``tokens``.
        higher_is_better: direction of improvement.
        label: name for people.
        meaning: one line for a newcomer.
    """

    name: str
    column: str
    form: Literal["share", "per_token"]
    higher_is_better: bool
    label: str
    meaning: str


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("pass_at_1", "pass_at_1", "share", True, "pass@1", "Share of answers that are right; higher is better."),
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
                "per_token",
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
    """A measured value with its interval, over n items."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """The paired difference ``a - b`` of one metric between two models, with its interval.

    ``improvement`` and its ends are the same numbers turned so that above zero means that a is better than b.
    """

    metric: str
    a: str
    b: str
    difference: float
    low: float
    high: float

    @property
    def improvement(self) -> float:
        """By how much a is better than b; negative where it is worse."""
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
    """A metric of one model with its interval, from a hierarchical bootstrap over items and seeds.

    Each of 4,000 replicates draws items and, independently, seeds, both with replacement, and one fewer than there are
    (Rao and Wu, 1988): for the few seeds of a recipe that matters, because drawing S of S understates their variance by
    the factor (S - 1) / S. The interval holds the central ``confidence`` of the replicates. Fixed random seed: the same
    table gives the same interval, in any order of its rows.

    Shares (pass_at_1, truncated) have one correction, because a bootstrap of all-equal values has no width: the low end
    never exceeds the Wilson interval of n right out of n, the high end is never below that of 0 out of n. So a table of
    only 1s (or only 0s) gets exactly the Wilson interval over its n items, and elsewhere the bootstrap decides.

    What three seeds can say: that a result is not the luck of one seed, and roughly how large that luck is. What they
    cannot: a 95% statement about seeds not run. Where training noise outweighs the noise of the items, the interval is
    about the range of the three results, and covers the true mean in about 75% of cases, not 95%. With one seed the
    interval speaks of that one model and of new items only.

    Args:
        scores: a table of ``SCORE_SCHEMA`` for one model.
        metric: a key of ``METRICS``.
        suite: rows of this suite are used.
        confidence: coverage, for example 0.95.

    Returns:
        Value (over the data, not the replicates), ends, and the number of items; None if no item was measured.

    Raises:
        KDError: (item, seed) pairs are missing or doubled, a value is not finite, or one item is all there is.

    Source: ours, after Davison and Hinkley, "Bootstrap Methods and their Application", 3.8; Wilson (1927).
    """
    form = metric_of(metric).form
    grid = _grid(scores, metric, suite)
    if grid is None:
        return None
    num_items = len(grid.items)
    replicates = np.concatenate(
        [_ratio(grid, w_RI, _draw_counts(rng, len(w_RI), len(grid.seeds))) for rng, w_RI in _item_weights(num_items, form)]
    )
    low, high = _ends(replicates, confidence)
    if form == "share":
        low = min(low, wilson_interval(num_items, num_items, confidence)[0])
        high = max(high, wilson_interval(0, num_items, confidence)[1])
    return Estimate(_value(grid), low, high, num_items)


def compare(
    a: pa.Table, b: pa.Table, metric: str, *, suite: str, confidence: float, names: tuple[str, str] = ("a", "b")
) -> Comparison | None:
    """The difference a - b of a metric with its interval, paired by item and, where both have the same seeds, by seed.

    As ``estimate``, with the same items drawn for both models in each replicate: what makes an item hard for both
    cancels. Seeds are drawn together if both tables have the same ones, else independently; a model with one seed (the
    teacher) stands for itself in every replicate. The limits of few seeds told in ``estimate`` hold here too.

    For shares the interval (not the difference) includes two pseudo-items, one that only a gets right and one that only
    b does: it keeps a width where all items are equal, and costs next to nothing elsewhere.

    Args:
        a: score table of the first model.
        b: score table of the second.
        metric: a key of ``METRICS``.
        suite: rows of this suite are used.
        confidence: coverage, for example 0.95.
        names: names of both models, for the result.

    Returns:
        The difference; None if the metric was measured on no item for one of the two.

    Raises:
        KDError: the two were measured on different items (with their number), or a table is not complete.

    Source: pseudo-items after Bonett and Price (2012), "Adjusted Wald confidence interval for a difference of binomial
        proportions based on paired data".
    """
    form = metric_of(metric).form
    grid_a, grid_b = _grid(a, metric, suite), _grid(b, metric, suite)
    if grid_a is None or grid_b is None:
        return None
    _expect_same_items(grid_a, grid_b, f"{metric} on suite {suite}: {names[0]} and {names[1]}")
    difference = _value(grid_a) - _value(grid_b)
    num_items = len(grid_a.items)
    if form == "share":
        grid_a, grid_b = grid_a.with_pseudo_items((1.0, 0.0)), grid_b.with_pseudo_items((0.0, 1.0))
        num_items += 2
    replicates = []
    for rng, w_RI in _item_weights(num_items, form):
        v_RS = _draw_counts(rng, len(w_RI), len(grid_a.seeds))
        u_RS = v_RS if grid_a.seeds == grid_b.seeds else _draw_counts(rng, len(w_RI), len(grid_b.seeds))
        replicates.append(_ratio(grid_a, w_RI, v_RS) - _ratio(grid_b, w_RI, u_RS))
    low, high = _ends(np.concatenate(replicates), confidence)
    return Comparison(metric, names[0], names[1], difference, low, high)


def wilson_interval(num_right: float, num_items: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval for a share of ``num_right`` in ``num_items`` (at least one).

    >>> [round(end, 4) for end in wilson_interval(10, 10, 0.95)]
    [0.7225, 1.0]
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = num_right / num_items
    centre = (p + z**2 / (2 * num_items)) / (1 + z**2 / num_items)
    half = z / (1 + z**2 / num_items) * (p * (1 - p) / num_items + z**2 / (4 * num_items**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


# ---------------------------------------------------------------------------------------------- the grid of one metric


@dataclass(frozen=True)
class _Grid:
    """Numerators and denominators of a metric, float64 [I, S], items and seeds sorted."""

    items: tuple[str, ...]
    seeds: tuple[int, ...]
    numerator: Array
    denominator: Array

    def with_pseudo_items(self, values: tuple[float, float]) -> "_Grid":
        """The grid of a share with two more items, equal over all seeds."""
        more_2S = np.repeat(np.array(values)[:, None], len(self.seeds), axis=1)
        return _Grid(self.items, self.seeds, np.vstack([self.numerator, more_2S]), np.vstack([self.denominator, np.ones_like(more_2S)]))


def _grid(scores: pa.Table, metric: str, suite: str) -> _Grid | None:
    chosen = metric_of(metric)
    rows = scores.filter(pc.equal(scores["suite"], suite))
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
            f"and {(times > 1).sum()} are doubled; evaluate this model again"
        )
    place = (item_of_row, seed_of_row)
    measured = np.zeros(shape, dtype=bool)
    measured[place] = pc.is_valid(rows[chosen.column]).to_numpy()
    if (measured.any(axis=1) != measured.all(axis=1)).any():
        partly = int((measured.any(axis=1) & ~measured.all(axis=1)).sum())
        raise KDError(f"{where}: {partly} of {shape[0]} items have {metric} for some seeds and not for others; evaluate this model again")
    num_IS, den_IS = np.zeros(shape), np.ones(shape)
    num_IS[place] = rows[chosen.column].to_numpy()
    if chosen.form == "per_token":
        den_IS[place] = pc.fill_null(rows["tokens"], 0).to_numpy()
    kept = measured.all(axis=1)
    num_IS, den_IS = num_IS[kept], den_IS[kept]
    _expect_numbers(num_IS, den_IS, f"{where}: {metric}", chosen.form)
    return _Grid(tuple(items[kept]), tuple(int(s) for s in seeds), num_IS, den_IS) if kept.any() else None


def _expect_numbers(num_IS: Array, den_IS: Array, where: str, form: str) -> None:
    if not np.isfinite(num_IS).all():
        raise KDError(f"{where} is not finite on {int((~np.isfinite(num_IS)).any(axis=1).sum())} items; the model's output is broken")
    if form == "share" and ((num_IS < 0.0) | (num_IS > 1.0)).any():
        raise KDError(f"{where} is a share and must lie in [0, 1]; found {num_IS.min():g} to {num_IS.max():g}")
    if (den_IS <= 0.0).any():
        raise KDError(f"{where} has {int((den_IS <= 0).any(axis=1).sum())} items with a sum over no tokens; it must be null there")
    if form == "per_token" and len(num_IS) == 1:
        raise KDError(f"{where} was measured on 1 item; an interval needs 2 or more: use a larger suite")


def _expect_same_items(a: _Grid, b: _Grid, what: str) -> None:
    only_a, only_b = set(a.items) - set(b.items), set(b.items) - set(a.items)
    if only_a or only_b:
        example = min(only_a or only_b)
        raise KDError(
            f"{what} were measured on different items: {len(only_b)} are missing from the first and {len(only_a)} from the second "
            f"(for example {example!r}); evaluate both on the same items"
        )


# ---------------------------------------------------------------------------------------------- the bootstrap


def _item_weights(num_items: int, form: str) -> Iterator[tuple[np.random.Generator, Array]]:
    """Counts of drawn items, [R, I], in blocks of bounded memory; the generator goes on to draw the block's seeds."""
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    block = max(1, _WEIGHTS_IN_MEMORY // num_items)
    for start in range(0, NUM_REPLICATES, block):
        yield rng, _draw_counts(rng, min(block, NUM_REPLICATES - start), num_items)


def _draw_counts(rng: np.random.Generator, num_replicates: int, size: int) -> Array:
    """How often each of ``size`` things is drawn when size - 1 (at least 1) are drawn with replacement, [R, size]."""
    drawn = rng.integers(size, size=(num_replicates, max(1, size - 1)))
    drawn += np.arange(num_replicates)[:, None] * size
    return np.bincount(drawn.ravel(), minlength=num_replicates * size).reshape(num_replicates, size).astype(np.float64)


def _ratio(grid: _Grid, w_RI: Array, v_RS: Array) -> Array:
    """The metric in every replicate, [R]."""
    num_R: Array = ((w_RI @ grid.numerator) * v_RS).sum(axis=1)
    den_R: Array = ((w_RI @ grid.denominator) * v_RS).sum(axis=1)
    return num_R / den_R


def _value(grid: _Grid) -> float:
    return float(grid.numerator.sum() / grid.denominator.sum())


def _ends(replicates_R: Array, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(replicates_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
