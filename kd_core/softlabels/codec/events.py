"""Events of the entropy coder that say a row of soft labels: their order, which the decoder can use, and their contexts.

Axes: N positions of a row, E ids over all of them (position n owns offsets[n]:offsets[n+1]), X events.

Ids come here as *ranks* (``ranking.py``): small numbers are frequent ids, so sorted ranks have small gaps. Sampled counts and
quantised log-probabilities are both *levels*: a falling sequence, then for each level its ids as sorted gaps. Contexts are
coarse (an octave of the previous rank, of the ids still to come): a table must pay for the bytes it takes in the model.

A position, sampled: number of ids; is the gold id among them, and its count; the other counts, falling; their ids; entropy
as a residual on the draws' own entropy; gold log-probability as a residual on the gold count.
A position, topk: levels, falling; ids; entropy; gold log-probability.

Owns what writer (``writing.py``) and reader (``reading.py``) must agree on.
"""

from typing import NamedTuple

import numpy as np

from kd_core.softlabels.codec.rans import bucket, inlined, octave

__all__ = [
    "ENTROPY",
    "ENTROPY_2",
    "ESCAPE",
    "FAMILIES",
    "FIRST_LEVEL",
    "FLAG",
    "GOLD_COUNT",
    "IDS",
    "RESIDUALS",
    "RESIDUAL_BIAS",
    "WHOLE",
    "Draws",
    "TopKRow",
    "count_context",
    "drop_context",
    "gap_context",
    "gold_context",
]

IDS = 0  # number of ids
FLAG = 1  # is the gold id drawn: by number of ids
GOLD_COUNT = 17  # by number of ids
FIRST_LEVEL = 33
_LEVEL = 34  # counts: by draws left over x ids to come; topk drops: by last level x index
_GAP = 226  # by octave of the previous rank x ids to come
ENTROPY = 394  # by the entropy of the draws
ENTROPY_2 = 418  # at T = 1, by the one at T0
_GOLD = 442  # by gold count, or by entropy where every draw fell on gold
WHOLE = 474  # entropy and gold log-probability of topk
FAMILIES = (IDS, FLAG, GOLD_COUNT, FIRST_LEVEL, _LEVEL, _GAP, ENTROPY, ENTROPY_2, _GOLD, WHOLE, WHOLE + 1, WHOLE + 2)

RESIDUALS = range(ENTROPY, WHOLE)
"""Contexts of residuals: any value can be said in them."""
ESCAPE = 95  # the residual symbol that says: 32 raw bits follow
RESIDUAL_BIAS = 24


@inlined
def gap_context(last: int, left: int) -> int:
    return _GAP + 8 * octave(last + 1) + min(octave(left - 1), 7)


@inlined
def count_context(excess: int, left: int) -> int:
    return _LEVEL + 6 * min(bucket(excess)[0], 31) + (left - 2 if left < 6 else 4 if left < 10 else 5)


@inlined
def drop_context(last: int, index: int) -> int:
    return _LEVEL + 8 * min(octave(last), 23) + min(octave(index), 7)


@inlined
def gold_context(count: int, num_draws: int, entropy: int) -> int:
    return _GOLD + (24 + min(octave(entropy), 7) if count == num_draws else min(bucket(count)[0], 23))


class Draws(NamedTuple):
    """What draws predict: the same numbers for encoder and decoder.

    Attributes:
        num_draws: draws a position.
        own_temperature: drawn at T = 1, so the draws' entropy is the entropy.
        count_entropy: int64, by count c: 1024 c ln c, rounded.
        count_gold: int64, by count c: quantised gold log-probability if c / num_draws were the probability.
        entropy_steps: of a nat.
        logprob_of_gold: float32, by quantised gold log-probability.
    """

    num_draws: int
    own_temperature: bool
    count_entropy: np.ndarray
    count_gold: np.ndarray
    entropy_steps: float
    logprob_of_gold: np.ndarray


class TopKRow(NamedTuple):
    """Top-k targets in whole numbers."""

    ranks_NK: np.ndarray
    levels_NK: np.ndarray
    entropy_q_N: np.ndarray
    gold_q_N: np.ndarray
