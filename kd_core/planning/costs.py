"""Costs of work before it is done: bytes from laws of the codec, requests from the layout of shards, seconds from
finished records or from arithmetic.

Estimates, and documented as such. A rate that this store has measured wins over every assumption below.
"""

import os
from collections.abc import Callable, Iterable
from math import ceil
from pathlib import Path

from kd_core.artifacts import Record
from kd_core.recipe import Dense, Run, Sampled, SoftLabels, TopK
from kd_core.rows.parquet import GROUP_ROWS

__all__ = [
    "GROUP_BYTES",
    "epoch_requests",
    "forward_seconds",
    "load_seconds",
    "measured_seconds",
    "price",
    "row_groups",
    "soft_label_bytes",
    "table_bytes",
    "text_bytes",
    "training_seconds",
    "write_requests",
]

CPU_FLOPS_PER_CORE = 30e9
"""Operations a second, modest for float32 on one server core: 37e9 were measured in training 0.9 million parameters."""
CUDA_FLOPS = 20e12
"""Operations a second, modest for one data-centre GPU in float32."""
PASS_SECONDS = 0.006
"""A forward pass of a tiny model, which no arithmetic explains: Python and kernel starts. Backward and optimiser: two more."""
LOAD_BYTES_PER_SECOND = 200e6
"""Reading weights from a disk and placing them."""

SAMPLED_POSITION_BYTES, SAMPLED_ID_BYTES = 0.9, 1.08
"""Bytes of a position, and of each distinct id in it: within 6% for 6 to 200 draws of SmolLM2-135M (49k columns) on GSM8K."""
DISTINCT_EXPONENT = 0.6
"""N draws fall on N^0.6 ids. There it was N^0.52 (5.2 ids for 25 draws); on text with more choice N^0.7 (9.5 ids)."""
TOPK_POSITION_BYTES, TOPK_ID_BYTES = 12.0, 1.05
"""Bytes of a position, and of each id in it: within 1% at k 32 and 128, 20% too much at k 8, 11% at k 512."""
TEMPERATURE_BYTES = 20.0
"""Bytes of each temperature after the first: normaliser, tail, and finer levels; 186 B measured at k 128 with three of them."""
GROUP_BYTES = 2500.0
"""Bytes of a row group of a row store beside its rows: page headers, statistics, its part of the footer (1,700 to 2,600 measured)."""


def soft_label_bytes(policy: SoftLabels, *, num_columns: int | None) -> float | None:
    """Expected bytes of one position's targets: a law of the codec, not a measurement of the text at hand.

    sampled: 0.9 + 1.08 * min(num_draws^0.6, columns). topk: 12 + 1.05 * k + 20 for each temperature after the first.
    dense: 4 * columns, an upper bound (a bfloat16 teacher's log-probabilities compress to a third).

    Args:
        policy: what is kept.
        num_columns: the tokenizer's columns; None: not known yet, and taken to be many.

    Returns:
        Bytes a position; None for dense where the columns are not known.
    """
    columns = float("inf") if num_columns is None else float(num_columns)
    match policy:
        case Dense():
            return None if num_columns is None else 4.0 * num_columns
        case TopK():
            return TOPK_POSITION_BYTES + TOPK_ID_BYTES * policy.k + TEMPERATURE_BYTES * (len(policy.temperatures) - 1)
        case Sampled():
            distinct: float = policy.num_draws**DISTINCT_EXPONENT
            return SAMPLED_POSITION_BYTES + SAMPLED_ID_BYTES * min(distinct, columns)


def text_bytes(rows: float, tokens: float) -> float:
    """Bytes of stored rows' plain columns, compressed: keys, ids and text (59 a row, measured for answers of 20 tokens to prompts of 7)."""
    return 30.0 * rows + 3.0 * tokens


def table_bytes(rows: float, tokens: float, *, groups: float) -> float:
    """Bytes of rows of a row store, in so many row groups, without targets."""
    return text_bytes(rows, tokens) + GROUP_BYTES * groups


def row_groups(rows: float, *, shard_rows: int) -> float:
    """Row groups that rows come to; a fraction for a few rows, as shards are mostly full."""
    return rows / min(shard_rows, GROUP_ROWS)


def write_requests(rows: int, *, shard_rows: int) -> int:
    """Objects that rows of a row store become: a shard and its commit for every ``shard_rows`` of them."""
    return 2 * ceil(rows / shard_rows)


def epoch_requests(rows: int, *, shard_rows: int) -> int:
    """Range reads of one epoch over rows of a row store: row groups and footers. Less where a local disk holds some."""
    full, rest = divmod(rows, shard_rows)
    groups = full * ceil(shard_rows / GROUP_ROWS) + ceil(rest / GROUP_ROWS)
    return groups + ceil(rows / shard_rows)


def _flops(run: Run) -> float:
    if run.device == "cuda" or (run.device == "auto" and Path("/dev/nvidiactl").exists()):  # asking torch would mean importing it
        return CUDA_FLOPS
    return CPU_FLOPS_PER_CORE * (run.threads or os.cpu_count() or 1)


def forward_seconds(parameters: int, *, tokens: float, passes: float, run: Run) -> float:
    """Seconds of 2 * parameters * tokens operations, and the start of each pass."""
    return 2.0 * parameters * tokens / _flops(run) + passes * PASS_SECONDS


def training_seconds(parameters: int, *, tokens: float, steps: int, run: Run) -> float:
    """Seconds of 6 * parameters * tokens operations, and the start of each step."""
    return 6.0 * parameters * tokens / _flops(run) + 3.0 * steps * PASS_SECONDS


def load_seconds(parameters: int) -> float:
    """Seconds to load float32 weights."""
    return 4.0 * parameters / LOAD_BYTES_PER_SECOND


def measured_seconds(records: Iterable[Record], measure: Callable[[Record], tuple[float, float] | None]) -> float | None:
    """Seconds a unit of work, as the record with the most work measured it.

    Args:
        records: finished records of one stage.
        measure: (units, seconds) of a record that is comparable, else None.

    Returns:
        Seconds a unit, or None if nothing comparable is there.
    """
    found = [pair for record in records if (pair := measure(record)) is not None and pair[0] > 0]
    if not found:
        return None
    units, seconds = max(found)
    return seconds / units


def price(*parts: tuple[float | None, float | None, float]) -> float | None:
    """Sum of what is priced.

    Args:
        parts: (price of so many units, units, how many units that price is for); a part without a price costs nothing.

    Returns:
        None if no part has a price, or the units of one that has are not known.

    >>> price((7.2, 1800.0, 3600), (None, None, 1000))
    3.6
    """
    stated = [(each, units, per) for each, units, per in parts if each is not None]
    if not stated or any(units is None for _, units, _ in stated):
        return None
    return sum(each * units / per for each, units, per in stated if units is not None)
