"""What a row of soft labels says, as events of the entropy coder, in the order in which the decoder can use it.

Axes: N positions of a row, E ids over all of them (position n owns offsets[n]:offsets[n+1]), X events.

Ids come here as *ranks* (``ranking.py``): small numbers are frequent ids, so sorted ranks have small gaps. Sampled counts and
quantised log-probabilities are both *levels*: a falling sequence, then for each level its ids as sorted gaps. Contexts are
coarse (an octave of the previous rank, of the ids still to come): a table must pay for the bytes it takes in the model.

A position, sampled: number of ids; is the gold id among them, and its count; the other counts, falling; their ids; entropy
as a residual on the draws' own entropy; gold log-probability as a residual on the gold count.
A position, topk: levels, falling; ids; entropy; gold log-probability.
"""

from typing import NamedTuple

import numpy as np

from kd_core.softlabels.codec.rans import (
    Cursor,
    Stream,
    Tables,
    bucket,
    closes,
    compiled,
    inlined,
    octave,
    open_row,
    overran,
    place,
    pop_raw,
    pop_symbol,
    pop_value,
)

__all__ = [
    "ESCAPE",
    "FAMILIES",
    "RESIDUALS",
    "DecodedRows",
    "Draws",
    "SampledRow",
    "TopKRow",
    "decode_sampled",
    "decode_topk",
    "escape_unknown",
    "sampled_events",
    "topk_events",
]

_IDS = 0  # number of ids
_FLAG = 1  # is the gold id drawn: by number of ids
_GOLD_COUNT = 17  # by number of ids
_FIRST_LEVEL = 33
_LEVEL = 34  # counts: by draws left over x ids to come; topk drops: by last level x index
_GAP = 226  # by octave of the previous rank x ids to come
_ENTROPY = 394  # by the entropy of the draws
_ENTROPY_2 = 418  # at T = 1, by the one at T0
_GOLD = 442  # by gold count, or by entropy where every draw fell on gold
_WHOLE = 474  # entropy and gold log-probability of topk
FAMILIES = (_IDS, _FLAG, _GOLD_COUNT, _FIRST_LEVEL, _LEVEL, _GAP, _ENTROPY, _ENTROPY_2, _GOLD, _WHOLE, _WHOLE + 1, _WHOLE + 2)

RESIDUALS = range(_ENTROPY, _WHOLE)
"""Contexts of residuals: any value can be said in them."""
ESCAPE = 95  # the residual symbol that says: 32 raw bits follow
_RESIDUAL_BIAS = 24


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
    symbol = (residual >> low_bits) + _RESIDUAL_BIAS
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
            _escape(events_X4, x, ((symbol - _RESIDUAL_BIAS) << events_X4[x, 2]) + events_X4[x, 3])


@inlined
def _gap_context(last: int, left: int) -> int:
    return _GAP + 8 * octave(last + 1) + min(octave(left - 1), 7)


@inlined
def _count_context(excess: int, left: int) -> int:
    return _LEVEL + 6 * min(bucket(excess)[0], 31) + (left - 2 if left < 6 else 4 if left < 10 else 5)


@inlined
def _drop_context(last: int, index: int) -> int:
    return _LEVEL + 8 * min(octave(last), 23) + min(octave(index), 7)


@inlined
def _gold_context(count: int, num_draws: int, entropy: int) -> int:
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


class SampledRow(NamedTuple):
    """Sampled targets in whole numbers; ``gold_N`` is the rank of the token that stands there."""

    offsets_N1: np.ndarray
    ranks_E: np.ndarray
    counts_E: np.ndarray
    gold_N: np.ndarray
    offset_q_N: np.ndarray
    entropy_q_N: np.ndarray
    gold_q_N: np.ndarray


class DecodedRows(NamedTuple):
    """Sampled targets of some rows as a student reads them; ``gold_N`` are the tokens that stand there, which the decoder knows.

    Whole numbers are int64, the others float32.
    """

    gold_N: np.ndarray
    offsets_N1: np.ndarray
    ids_E: np.ndarray
    counts_E: np.ndarray
    cross_entropy_offset_N: np.ndarray
    entropy_N: np.ndarray
    gold_logprob_N: np.ndarray


class TopKRow(NamedTuple):
    """Top-k targets in whole numbers."""

    ranks_NK: np.ndarray
    levels_NK: np.ndarray
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
        at = _put(events, at, _IDS, num - 1)
        gold_count = 0
        draws_entropy = draws.count_entropy[draws.num_draws]
        for e in range(low, high):
            draws_entropy -= draws.count_entropy[row.counts_E[e]]
            if row.ranks_E[e] == row.gold_N[n]:
                gold_count = row.counts_E[e]
        draws_entropy //= draws.num_draws * 16
        at = _put(events, at, _FLAG + min(num, 16) - 1, 1 if gold_count else 0)
        todo, todo_draws = num, draws.num_draws
        if gold_count:
            if num > 1:
                at = _put(events, at, _GOLD_COUNT + min(num, 16) - 1, gold_count - 1)
            todo, todo_draws = num - 1, draws.num_draws - gold_count
        for e in range(low, high):
            if todo_draws == todo or todo == 1:
                break
            if row.ranks_E[e] != row.gold_N[n]:
                count = row.counts_E[e]
                at = _put(events, at, _count_context(todo_draws - todo, todo), count - (todo_draws + todo - 1) // todo)
                todo_draws -= count
                todo -= 1
        at = _put_groups(events, at, row.ranks_E, row.counts_E, low, high, row.gold_N[n])
        at = _put_residual(events, at, _ENTROPY + min(bucket(draws_entropy)[0], 23), row.offset_q_N[n] - draws_entropy, 2)
        if not draws.own_temperature:
            at = _put_residual(events, at, _ENTROPY_2 + min(bucket(row.offset_q_N[n])[0], 23), row.entropy_q_N[n] - row.offset_q_N[n], 2)
        context = _gold_context(gold_count, draws.num_draws, row.entropy_q_N[n])
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
                at = _put(events, at, _gap_context(last, left), ranks[e] - last - 1)
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
        at = _put(events, at, _FIRST_LEVEL, last)
        for i in range(1, k):
            if last == 0:
                break
            level = levels[n * k + i]
            at = _put(events, at, _drop_context(last, i), last - level)
            last = level
        at = _put_groups(events, at, ranks, levels, n * k, n * k + k, -1)
        at = _put(events, at, _WHOLE, row.entropy_q_N[n])
        at = _put(events, at, _WHOLE + 1, row.gold_q_N[n])
    return at


@inlined
def _pop_residual(stream: Stream, tables: Tables, context: int, low_bits: int, cursor: Cursor) -> tuple[int, Cursor]:
    symbol, cursor = pop_symbol(stream, tables, context, cursor)
    if symbol == ESCAPE:
        high, cursor = pop_raw(stream, 16, cursor)
        low, cursor = pop_raw(stream, 16, cursor)
        return (high << 16) + low - (1 << 31), cursor
    raw, cursor = pop_raw(stream, low_bits, cursor)
    return ((symbol - _RESIDUAL_BIAS) << low_bits) + raw, cursor


@inlined
def _pop_counts(
    stream: Stream, tables: Tables, draws: Draws, counts: np.ndarray, first: int, end: int, todo_draws: int, cursor: Cursor
) -> tuple[int, Cursor]:
    """Counts of entries first:end, falling: (their part of the draws' entropy, or -1 where they do not add up; cursor)."""
    entropy, todo = 0, end - first
    while todo > 1 and todo_draws > todo:
        count, cursor = pop_value(stream, tables, _count_context(todo_draws - todo, todo), cursor)
        count += (todo_draws + todo - 1) // todo
        if count > draws.num_draws:
            return -1, cursor
        counts[place(end - todo)] = count
        entropy += draws.count_entropy[place(count)]
        todo_draws -= count
        todo -= 1
    rest = todo_draws if todo == 1 else 1
    if rest < 1 or rest * todo != todo_draws:
        return -1, cursor
    for e in range(end - todo, end):
        counts[place(e)] = rest
    return entropy + todo * draws.count_entropy[place(rest)], cursor


@inlined
def _pop_groups(
    stream: Stream,
    tables: Tables,
    id_of_rank_V: np.ndarray,
    levels: np.ndarray,
    ids: np.ndarray,
    first: int,
    end: int,
    cursor: Cursor,
) -> tuple[bool, Cursor]:
    """Ids of entries first:end, whose levels are known: what ``_put_groups`` put; (whether they are in the vocabulary, cursor).

    One loop over all levels: where one level ends could not be foreseen, and a loop for each would wait for it.
    """
    left, level = 0, -1
    for e in range(end - 1, first - 1, -1):
        left = (left if levels[place(e)] == level else 0) + 1
        level = levels[place(e)]
        ids[place(e)] = left  # of this level, from here on
    last, left = -1, 0
    for e in range(first, end):
        last = -1 if left == 0 else last
        left = ids[place(e)] if left == 0 else left
        gap, cursor = pop_value(stream, tables, _gap_context(last, left), cursor)
        last += gap + 1
        if last >= len(id_of_rank_V):
            return False, cursor
        ids[place(e)] = id_of_rank_V[place(last)]
        left -= 1
    return True, cursor


@compiled
def decode_sampled(stream: Stream, rows: np.ndarray, tables: Tables, draws: Draws, id_of_rank_V: np.ndarray, out: DecodedRows) -> int:
    """Fill ``out`` from some rows of a stream; a position's ids come as they were coded, gold last.

    Args:
        stream: of all rows that ``out`` has room for.
        rows: those with these tables, int64.
        tables: of the shard's model.
        draws: the same for all.
        id_of_rank_V: of the shard's model.
        out: filled where these rows are.

    Returns:
        -1, or the first row whose stream does not say what its header says.
    """
    for which in range(len(rows)):
        row = int(rows[which])
        cursor = open_row(stream, row)
        low, last = stream.ids_R1[row], stream.ids_R1[row + 1]
        for n in range(stream.positions_R1[row], stream.positions_R1[row + 1]):
            num, cursor = pop_value(stream, tables, _IDS, cursor)
            num += 1
            high = low + num
            if high > last or num > draws.num_draws or overran(cursor):
                return row
            flag, cursor = pop_symbol(stream, tables, _FLAG + min(num, 16) - 1, cursor)
            end, gold_count = high, 0
            if flag:
                gold_count = draws.num_draws
                if num > 1:
                    gold_count, cursor = pop_value(stream, tables, _GOLD_COUNT + min(num, 16) - 1, cursor)
                    gold_count += 1
                end -= 1
                out.ids_E[place(end)] = out.gold_N[n]
                out.counts_E[place(end)] = gold_count
            todo_draws = draws.num_draws - gold_count
            if todo_draws < 0:
                return row
            found, cursor = _pop_counts(stream, tables, draws, out.counts_E, low, end, todo_draws, cursor)
            if found < 0:
                return row
            known, cursor = _pop_groups(stream, tables, id_of_rank_V, out.counts_E, out.ids_E, low, end, cursor)
            if not known:
                return row
            entropy = draws.count_entropy[draws.num_draws] - draws.count_entropy[place(gold_count)] - found
            entropy //= draws.num_draws * 16
            residual, cursor = _pop_residual(stream, tables, _ENTROPY + min(bucket(entropy)[0], 23), 2, cursor)
            entropy += residual
            out.cross_entropy_offset_N[n] = entropy / draws.entropy_steps
            if not draws.own_temperature:
                residual, cursor = _pop_residual(stream, tables, _ENTROPY_2 + min(bucket(entropy)[0], 23), 2, cursor)
                entropy += residual
            out.entropy_N[n] = entropy / draws.entropy_steps
            residual, cursor = _pop_residual(stream, tables, _gold_context(gold_count, draws.num_draws, entropy), 0, cursor)
            gold = draws.count_gold[place(gold_count)] + residual
            out.gold_logprob_N[n] = draws.logprob_of_gold[min(max(gold, 0), len(draws.logprob_of_gold) - 1)]
            out.offsets_N1[n + 1] = high
            low = high
        if low != last or not closes(cursor):
            return row
    return -1


@compiled
def decode_topk(stream: Stream, rows: np.ndarray, tables: Tables, id_of_rank_V: np.ndarray, out: TopKRow) -> int:
    """Fill ``out`` (ids, not ranks, in ``ranks_NK``, by falling level) from some rows of a stream: see ``decode_sampled``."""
    k, ids, levels = out.ranks_NK.shape[1], out.ranks_NK.reshape(-1), out.levels_NK.reshape(-1)
    for which in range(len(rows)):
        row = int(rows[which])
        cursor = open_row(stream, row)
        for n in range(stream.positions_R1[row], stream.positions_R1[row + 1]):
            level, cursor = pop_value(stream, tables, _FIRST_LEVEL, cursor)
            levels[n * k] = level
            for i in range(1, k):
                if level > 0:
                    drop, cursor = pop_value(stream, tables, _drop_context(level, i), cursor)
                    level -= drop
                    if level < 0 or overran(cursor):
                        return row
                levels[n * k + i] = level
            known, cursor = _pop_groups(stream, tables, id_of_rank_V, levels, ids, n * k, n * k + k, cursor)
            if not known:
                return row
            out.entropy_q_N[n], cursor = pop_value(stream, tables, _WHOLE, cursor)
            out.gold_q_N[n], cursor = pop_value(stream, tables, _WHOLE + 1, cursor)
            if overran(cursor):
                return row
        if not closes(cursor):
            return row
    return -1
