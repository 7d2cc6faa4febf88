"""Rows of soft labels read off a stream of words, in the order of ``events.py``, compiled: the hot loop of training.

Axes: N positions of all rows, E ids over all of them (position n owns offsets[n]:offsets[n+1]), K ids of a top-k position.
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
from kd_core.softlabels.codec.rans import (
    Cursor,
    Stream,
    Tables,
    bucket,
    closes,
    compiled,
    inlined,
    open_row,
    overran,
    place,
    pop_raw,
    pop_symbol,
    pop_value,
)

__all__ = ["DecodedRows", "decode_sampled", "decode_topk"]


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


@inlined
def _pop_residual(stream: Stream, tables: Tables, context: int, low_bits: int, cursor: Cursor) -> tuple[int, Cursor]:
    symbol, cursor = pop_symbol(stream, tables, context, cursor)
    if symbol == ESCAPE:
        high, cursor = pop_raw(stream, 16, cursor)
        low, cursor = pop_raw(stream, 16, cursor)
        return (high << 16) + low - (1 << 31), cursor
    raw, cursor = pop_raw(stream, low_bits, cursor)
    return ((symbol - RESIDUAL_BIAS) << low_bits) + raw, cursor


@inlined
def _pop_counts(
    stream: Stream, tables: Tables, draws: Draws, counts: np.ndarray, first: int, end: int, todo_draws: int, cursor: Cursor
) -> tuple[int, Cursor]:
    """Counts of entries first:end, falling: (their part of the draws' entropy, or -1 where they do not add up; cursor)."""
    entropy, todo = 0, end - first
    while todo > 1 and todo_draws > todo:
        count, cursor = pop_value(stream, tables, count_context(todo_draws - todo, todo), cursor)
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
    """Ids of entries first:end, whose levels are known, from their gaps: (whether they are in the vocabulary, cursor).

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
        gap, cursor = pop_value(stream, tables, gap_context(last, left), cursor)
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
            num, cursor = pop_value(stream, tables, IDS, cursor)
            num += 1
            high = low + num
            if high > last or num > draws.num_draws or overran(cursor):
                return row
            flag, cursor = pop_symbol(stream, tables, FLAG + min(num, 16) - 1, cursor)
            end, gold_count = high, 0
            if flag:
                gold_count = draws.num_draws
                if num > 1:
                    gold_count, cursor = pop_value(stream, tables, GOLD_COUNT + min(num, 16) - 1, cursor)
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
            residual, cursor = _pop_residual(stream, tables, ENTROPY + min(bucket(entropy)[0], 23), 2, cursor)
            entropy += residual
            out.cross_entropy_offset_N[n] = entropy / draws.entropy_steps
            if not draws.own_temperature:
                residual, cursor = _pop_residual(stream, tables, ENTROPY_2 + min(bucket(entropy)[0], 23), 2, cursor)
                entropy += residual
            out.entropy_N[n] = entropy / draws.entropy_steps
            residual, cursor = _pop_residual(stream, tables, gold_context(gold_count, draws.num_draws, entropy), 0, cursor)
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
            level, cursor = pop_value(stream, tables, FIRST_LEVEL, cursor)
            levels[n * k] = level
            for i in range(1, k):
                if level > 0:
                    drop, cursor = pop_value(stream, tables, drop_context(level, i), cursor)
                    level -= drop
                    if level < 0 or overran(cursor):
                        return row
                levels[n * k + i] = level
            known, cursor = _pop_groups(stream, tables, id_of_rank_V, levels, ids, n * k, n * k + k, cursor)
            if not known:
                return row
            out.entropy_q_N[n], cursor = pop_value(stream, tables, WHOLE, cursor)
            out.gold_q_N[n], cursor = pop_value(stream, tables, WHOLE + 1, cursor)
            if overran(cursor):
                return row
        if not closes(cursor):
            return row
    return -1
