"""Intervals of a mean over items and training seeds: one formula, over arrays.

Two sources of chance: which items a suite holds, and which seeds a model was trained with. Each has a variance of its own
and a quantile of Student's t for how few there were. It knows no tables, metrics or models (``statistics`` does), and
computes over any leading axes, so that a simulation of its coverage runs this code and no copy of it.

Axes: ... separate data sets, I items (two or more), S seeds. Returned ends have the shape of the leading axes.

With x[I, S] a metric, m its mean, t(n) the quantile of Student's t with n degrees of freedom at 0.5 + confidence / 2:

    v_I = variance over items of the items' means, divisor I - 1, over I
    v_S = variance over seeds of the seeds' means, divisor S - 1, over S                        (0 for one seed)
    v_E = sum (x - item's mean - seed's mean + m)^2 / ((I - 1) (S - 1) I S)                      (0 for one seed)
    h^2 = t(I - 1)^2 v_I + t(S - 1)^2 max(0, v_S - v_E / 2)

v_S also holds noise of the items within a seed, whose size is v_E and which v_I counts too. Half of it is taken off:
with all of it intervals over three seeds cover too little, with none too much (``python -m benchmarks.coverage``).
One seed has no second term: the interval is then about that one checkpoint on new items.
"""

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "difference_interval", "linearised", "mean_interval", "share_interval", "wilson_interval"]

Array = npt.NDArray[np.float64]


def linearised(numerator: Array, denominator: Array) -> Array:
    """A ratio of sums as a mean: x[..., I, S] whose mean is R = sum(numerator) / sum(denominator).

    x = R + (numerator - R denominator) / mean(denominator), so that the spread of x is that of R to first order.
    Source: Cochran, "Sampling Techniques", 6.4.
    """
    total: Array = denominator.sum((-1, -2), keepdims=True)
    ratio: Array = numerator.sum((-1, -2), keepdims=True) / total
    x: Array = ratio + (numerator - ratio * denominator) / (total / (denominator.shape[-1] * denominator.shape[-2]))
    return x


def mean_interval(x: Array, confidence: float) -> tuple[Array, Array]:
    """Low and high end of the mean of x[..., I, S]: m -+ h."""
    mean, half = x.mean((-1, -2)), np.sqrt(_half_squared(x, confidence))
    return mean - half, mean + half


def share_interval(x: Array, confidence: float, *, answers: float = 1.0) -> tuple[Array, Array]:
    """Low and high end of a share, the mean m of x[..., I, S] in [0, 1]: Wilson's interval with as many items as h is worth.

    n = z^2 m (1 - m) / h^2; where m is 0 or 1, n = (I - 1) z^2 / t(I - 1)^2.

    Args:
        x: shares; or, linearised, what has a share as its mean.
        confidence: coverage, for example 0.95.
        answers: mean number of right or wrong answers in an item (tokens), at least 1; 1 also where it is not known. v_I is
            taken as m (1 - m) / (answers I^2) at least, that of one item that answers by chance: items which all happen to
            have the same share, such as one of two samples right, are no proof that every item has.

    Source: Wilson (1927); the number of items that h is worth after Korn and Graubard (1998).
    """
    num_items = x.shape[-2]
    mean: Array = x.mean((-1, -2))
    chance: Array = mean * (1.0 - mean)
    z2, t2 = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2, _t(num_items - 1, confidence) ** 2
    half_squared = _half_squared(x, confidence, least_item_variance=chance / (answers * num_items**2))
    sure = chance <= 0.0
    worth: Array = np.where(sure, (num_items - 1) * z2 / t2, z2 * chance / np.where(sure, 1.0, half_squared))
    return wilson_interval(mean, worth, confidence)


def difference_interval(a: Array, b: Array, confidence: float, *, shares: bool) -> tuple[Array, Array]:
    """Low and high end of mean(a) - mean(b), of two models on the same items: a[..., I, S] and b[..., I, S'].

    Items are paired, so that what makes an item hard for both cancels; seeds are not. A model with one seed stands for
    itself: it *is* what is compared (a teacher, a champion), and adds no term. v_I is that of the items' differences; t
    for the seeds has Welch's degrees of freedom, (sum v_S)^2 / sum(v_S^2 / (S - 1)).

    Args:
        a: metric of the first model.
        b: metric of the second.
        confidence: coverage, for example 0.95.
        shares: whether both lie in [0, 1]; then two items count besides in v_I, one that only a gets right and one that
            only b does, which keeps a width where all items are equal, and the ends stay in [-1, 1].

    Source: Welch (1947); the two items after Bonett and Price (2012), "Adjusted Wald confidence interval for a
        difference of binomial proportions based on paired data".
    """
    difference: Array = a.mean((-1, -2)) - b.mean((-1, -2))
    d_I: Array = a.mean(-1) - b.mean(-1)
    if shares:
        d_I = np.concatenate([d_I, np.broadcast_to([1.0, -1.0], (*d_I.shape[:-1], 2))], axis=-1)
    terms = [(x.shape[-1], *_seed_variances(x)) for x in (a, b) if x.shape[-1] > 1]
    half_squared: Array = _t(d_I.shape[-1] - 1, confidence) ** 2 * d_I.var(-1, ddof=1) / d_I.shape[-1]
    if terms:
        total = np.sum([v_S for _, v_S, _ in terms], axis=0)
        squares = np.sum([v_S**2 / (num_seeds - 1) for num_seeds, v_S, _ in terms], axis=0)
        freedom = np.where(squares > 0.0, total**2 / np.where(squares > 0.0, squares, 1.0), 1.0)
        half_squared = half_squared + _t(freedom, confidence) ** 2 * np.sum([added for *_, added in terms], axis=0)
    half = np.sqrt(half_squared)
    low, high = difference - half, difference + half
    return (np.maximum(low, -1.0), np.minimum(high, 1.0)) if shares else (low, high)


def wilson_interval(share: npt.ArrayLike, num_items: npt.ArrayLike, confidence: float) -> tuple[Array, Array]:
    """Wilson's score interval for a share among ``num_items``, which need not be a whole number.

    >>> [round(float(end), 4) for end in wilson_interval(1.0, 10, 0.95)]
    [0.7225, 1.0]
    """
    p, n = np.asarray(share, dtype=np.float64), np.asarray(num_items, dtype=np.float64)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.clip(centre - half, 0.0, p), np.clip(centre + half, p, 1.0)


def _half_squared(x: Array, confidence: float, *, least_item_variance: Array | float = 0.0) -> Array:
    num_items, num_seeds = x.shape[-2:]
    v_I = np.maximum(x.mean(-1).var(-1, ddof=1) / num_items, least_item_variance)
    found: Array = _t(num_items - 1, confidence) ** 2 * v_I
    return found if num_seeds == 1 else found + _t(num_seeds - 1, confidence) ** 2 * _seed_variances(x)[1]


def _seed_variances(x: Array) -> tuple[Array, Array]:
    """v_S, and what the seeds add to the items' variance: max(0, v_S - v_E / 2). Two seeds or more."""
    num_items, num_seeds = x.shape[-2:]
    items, seeds, mean = (x.mean(axis, keepdims=True) for axis in (-1, -2, (-1, -2)))
    v_S: Array = seeds.var((-1, -2), ddof=1) / num_seeds
    rest = ((x - items - seeds + mean) ** 2).sum((-1, -2))
    v_E: Array = rest / ((num_items - 1) * (num_seeds - 1) * num_items * num_seeds)
    return v_S, np.maximum(0.0, v_S - v_E / 2)


def _t(freedom: npt.ArrayLike, confidence: float) -> Array:
    from scipy.special import stdtrit  # at the first interval: it takes tenths of a second, and most commands compute none

    return np.asarray(stdtrit(freedom, 0.5 + confidence / 2), dtype=np.float64)
