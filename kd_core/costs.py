"""What work costs before it is done: bytes from the codec's format, seconds from finished records or from arithmetic.

Estimates, and documented as such. A rate that this store has measured wins over every assumption below.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from kd_core.artifacts import Record
from kd_core.recipe import Dense, Run, Sampled, SoftLabels, TopK

__all__ = ["forward_seconds", "load_seconds", "measured_seconds", "soft_label_bytes", "training_seconds"]

CPU_FLOPS_PER_CORE = 30e9
"""Modest for float32 on one server core: 37e9 were measured in training 0.9 million parameters."""
CUDA_FLOPS = 20e12
"""Modest for one data-centre GPU in float32."""
PASS_SECONDS = 0.006
"""A forward pass of a tiny model, which no arithmetic explains: Python and kernel starts. Backward and optimiser: two more."""
LOAD_BYTES_PER_SECOND = 200e6
"""Reading weights from a disk and placing them."""

_BLOB_HEADER_BYTES = 22


def soft_label_bytes(policy: SoftLabels, *, rows: int, positions: int, num_columns: int) -> int:
    """Bytes of encoded targets, before Parquet's compression: exact for dense and topk.

    For sampled the distinct ids a position are num_draws^0.7, at most the vocabulary: 9.5 for 25 draws, as measured on real
    teachers of 49k and 262k columns.

    Args:
        policy: what is kept.
        rows: blobs, each with a header.
        positions: supervised positions of all rows together.
        num_columns: the tokenizer's columns.
    """
    common = 8  # gold log-probability and entropy
    match policy:
        case Dense():
            header, position = 0, 4.0 * num_columns
        case TopK():
            header, position = 8 * len(policy.temperatures), 8.0 * policy.k + 4.0 * len(policy.temperatures)
        case Sampled():
            header, position = 8, 6.0 + 6.0 * min(policy.num_draws**0.7, num_columns)
    return round(rows * (_BLOB_HEADER_BYTES + header) + positions * (common + position))


def _flops(run: Run) -> float:
    if run.device == "cuda" or (run.device == "auto" and Path("/dev/nvidiactl").exists()):  # asking torch would mean importing it
        return CUDA_FLOPS
    return CPU_FLOPS_PER_CORE * (run.threads or os.cpu_count() or 1)


def forward_seconds(parameters: int, *, tokens: float, passes: float, run: Run) -> float:
    """2 * parameters * tokens operations, and the start of each pass."""
    return 2.0 * parameters * tokens / _flops(run) + passes * PASS_SECONDS


def training_seconds(parameters: int, *, tokens: float, steps: int, run: Run) -> float:
    """6 * parameters * tokens operations, and the start of each step."""
    return 6.0 * parameters * tokens / _flops(run) + 3.0 * steps * PASS_SECONDS


def load_seconds(parameters: int) -> float:
    """Loading float32 weights."""
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
