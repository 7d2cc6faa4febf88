"""Events of a row of soft labels, written in the order of ``events.py``, compiled.

Axes: N positions of a row, K ids of a top-k position, E ids over all of them (position n owns offsets[n]:offsets[n+1]), X events.
"""

from typing import NamedTuple

import numpy as np

from kd_core.softlabels.codec.events import (
    ENTROPY,
    ENTROPY_2,
    ESCAPE,
    FIRST_LEVEL,
    FLAG,
    GOLD_COUNT,
    IDS,
    RESIDUAL_BIAS,
    WHOLE,
    Draws,
    TopKRow,
    count_context,
    drop_context,
    gap_context,
    gold_context,
)
from kd_core.softlabels.codec.rans import bucket, compiled, inlined

__all__ = ["SampledRow", "escape_unknown", "sampled_events", "topk_events"]


@inlined
def _put(events: np.ndarray, at: int, context: int, value: int) -> int:
    symbol, bits = bucket(value)
    events[at, 0] = context
    events[at, 1] = symbol
    events[at, 2] = bits
    events[at, 3] = value & ((1 << bits) - 1)
    return at + 1


@inlined
def _put_residual(events: np.ndarray, at: int, context: int, residual: int, low_bits: int) -> int:
    symbol = (residual >> low_bits) + RESIDUAL_BIAS
    events[at, 0] = context
    events[at, 1] = symbol
    events[at, 2] = low_bits
    events[at, 3] = residual & ((1 << low_bits) - 1)
    if not 0 <= symbol < ESCAPE:
        _escape(events, at, residual)
    return at + 1


@inlined
def _escape(events: np.ndarray, at: int, residual: int) -> None:
    wide = residual + (1 << 31)
    events[at, 1] = ESCAPE
    events[at, 2] = 32
    events[at, 3] = (wide & 0xFFFF) << 16 | wide >> 16  # read in halves, the high one first


@compiled
def escape_unknown(events_X4: np.ndarray, frequency_CA: np.ndarray) -> None:
    """Say in full the residuals for which a model has no symbol: what it was made from did not have them."""
    for x in range(len(events_X4)):
        context, symbol = events_X4[x, 0], events_X4[x, 1]
        if frequency_CA[context, symbol] == 0 and symbol != ESCAPE:
            _escape(events_X4, x, ((symbol - RESIDUAL_BIAS) << events_X4[x, 2]) + events_X4[x, 3])


class SampledRow(NamedTuple):
    """Sampled targets in whole numbers; ``gold_N`` is the rank of the token that stands there."""

    offsets_N1: np.ndarray
    ranks_E: np.ndarray
    counts_E: np.ndarray
    gold_N: np.ndarray
    offset_q_N: np.ndarray
    entropy_q_N: np.ndarray
    gold_q_N: np.ndarray


@compiled
def sampled_events(draws: Draws, row: SampledRow, events: np.ndarray) -> int:
    """Write a row's events; returns their number. A position's ids go by falling count, then by rank.

    Room: 6 + 2 x ids events a position.
    """
    at = 0
    for n in range(len(row.gold_N)):
        low, high = row.offsets_N1[n], row.offsets_N1[n + 1]
        num = high - low
        at = _put(events, at, IDS, num - 1)
        gold_count = 0
        draws_entropy = draws.count_entropy[draws.num_draws]
        for e in range(low, high):
            draws_entropy -= draws.count_entropy[row.counts_E[e]]
            if row.ranks_E[e] == row.gold_N[n]:
                gold_count = row.counts_E[e]
        draws_entropy //= draws.num_draws * 16
        at = _put(events, at, FLAG + min(num, 16) - 1, 1 if gold_count else 0)
        todo, todo_draws = num, draws.num_draws
        if gold_count:
            if num > 1:
                at = _put(events, at, GOLD_COUNT + min(num, 16) - 1, gold_count - 1)
            todo, todo_draws = num - 1, draws.num_draws - gold_count
        for e in range(low, high):
            if todo_draws == todo or todo == 1:
                break
            if row.ranks_E[e] != row.gold_N[n]:
                count = row.counts_E[e]
                at = _put(events, at, count_context(todo_draws - todo, todo), count - (todo_draws + todo - 1) // todo)
                todo_draws -= count
                todo -= 1
        at = _put_groups(events, at, row.ranks_E, row.counts_E, low, high, row.gold_N[n])
        at = _put_residual(events, at, ENTROPY + min(bucket(draws_entropy)[0], 23), row.offset_q_N[n] - draws_entropy, 2)
        if not draws.own_temperature:
            at = _put_residual(events, at, ENTROPY_2 + min(bucket(row.offset_q_N[n])[0], 23), row.entropy_q_N[n] - row.offset_q_N[n], 2)
        context = gold_context(gold_count, draws.num_draws, row.entropy_q_N[n])
        at = _put_residual(events, at, context, row.gold_q_N[n] - draws.count_gold[gold_count], 0)
    return at


@compiled
def _put_groups(events: np.ndarray, at: int, ranks: np.ndarray, levels: np.ndarray, low: int, high: int, gold: int) -> int:
    """Each level's ranks but the gold one as gaps; entries low:high are sorted by level and rank."""
    first = low
    while first < high:
        end, left = first, 0
        while end < high and levels[end] == levels[first]:
            left += ranks[end] != gold
            end += 1
        last = -1
        for e in range(first, end):
            if ranks[e] != gold:
                at = _put(events, at, gap_context(last, left), ranks[e] - last - 1)
                last = ranks[e]
                left -= 1
        first = end
    return at


@compiled
def topk_events(row: TopKRow, events: np.ndarray) -> int:
    """Write a row's events; returns their number. A position's ids go by falling level, then by rank.

    Room: 3 + 2k events a position.
    """
    at = 0
    num, k = row.ranks_NK.shape
    ranks, levels = row.ranks_NK.reshape(-1), row.levels_NK.reshape(-1)
    for n in range(num):
        last = levels[n * k]
        at = _put(events, at, FIRST_LEVEL, last)
        for i in range(1, k):
            if last == 0:
                break
            level = levels[n * k + i]
            at = _put(events, at, drop_context(last, i), last - level)
            last = level
        at = _put_groups(events, at, ranks, levels, n * k, n * k + k, -1)
        at = _put(events, at, WHOLE, row.entropy_q_N[n])
        at = _put(events, at, WHOLE + 1, row.gold_q_N[n])
    return at
