"""Peak memory of capture and of reading at some rows and at ten times as many, each in a process of its own.

Capture scores rows with a random teacher and commits them shard by shard to a local store; reading goes once through a
store in training order. The claim is that neither grows with the number of rows.
"""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.measure import Check, Figure, at_most, figure, peak_memory
from benchmarks.reading import open_rows, soft_label_table, training_batches
from benchmarks.workloads import sampled_rows, synthetic_teacher, token_rows
from kd_core.recipe import Sampled
from kd_core.rows.keys import soft_label_key
from kd_core.rows.schemas import CODEC_MODEL
from kd_core.rows.table import RowCache
from kd_core.rows.work import Packed, work_in_shards
from kd_core.softlabels.capture import score_rows
from kd_core.store import LocalStore
from kd_core.tokens.batches import TokenRow

__all__ = ["run"]

_COLUMNS = 32_768
_MEAN_TOKENS = 24
_CAPTURED_SHARD_ROWS, _READ_SHARD_ROWS = 16, 512
_NAMESPACE = "benchmark"


def run(*, capture_rows: int, read_rows: int, judge: bool) -> list[Figure]:
    """Peak at ten times these rows over the peak at these rows; fewer than a shuffle buffer holds (4,096) cannot be judged."""
    cases = [(work, num_rows) for work, rows in ((_capture, capture_rows), (_read, read_rows)) for num_rows in (rows, 10 * rows)]
    with tempfile.TemporaryDirectory() as scratch:
        places = [Path(scratch) / str(i) for i in range(len(cases))]
        for (work, num_rows), place in zip(cases, places, strict=True):
            if work is _read:
                _write(num_rows, place)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process's memory does not depend on what runs beside it
            peaks = list(pool.map(lambda case, place: peak_memory(*case, place), cases, places))
    return [_growth("capture", capture_rows, *peaks[:2], judge=judge), _growth("reading", read_rows, *peaks[2:], judge=judge)]


def _growth(name: str, rows: int, peak: float, peak_10: float, *, judge: bool) -> Figure:
    text = f"{peak:,.0f} MB at {rows:,} rows, {peak_10:,.0f} MB at {10 * rows:,}: largest resident set of a process of its own"
    goal = at_most(1.1) if judge else None
    return figure(f"peak memory of {name}, 10x rows over 1x", peak_10 / peak, "x", Check(text), goal=goal)


def _keyed(num_rows: int) -> Iterator[tuple[str, TokenRow]]:
    """Rows as a stage streams them, a few at a time."""
    for start in range(0, num_rows, 16):
        for row in token_rows(min(16, num_rows - start), num_columns=_COLUMNS, mean_tokens=_MEAN_TOKENS, seed=start):
            yield soft_label_key(_NAMESPACE, row.ids, row.first_supervised), row


def _capture(num_rows: int, directory: Path) -> None:
    torch.set_num_threads(1)
    teacher = synthetic_teacher(num_layers=1, hidden_size=64, num_columns=_COLUMNS)
    policy = Sampled(kind="sampled", num_draws=25, temperature=1.0)
    models = [b""]

    def compute(shard: list[tuple[str, TokenRow]]) -> Packed:
        scored = score_rows(teacher, shard, policy=policy, micro_batch_tokens=1024).scored
        table, metadata = soft_label_table(shard, [row.targets for row in scored], models[-1])
        models[:] = [metadata[CODEC_MODEL]]
        return Packed(table, sum(row.num_supervised for _, row in shard), metadata)

    cache = RowCache(LocalStore(directory), "soft_labels", _NAMESPACE)
    work_in_shards(cache, lambda: _keyed(num_rows), compute, lambda packed: packed, shard_rows=_CAPTURED_SHARD_ROWS, done=lambda rows: None)


def _write(num_rows: int, directory: Path) -> None:
    cache = RowCache(LocalStore(directory), "soft_labels", _NAMESPACE)
    keyed, model = list(_keyed(num_rows)), b""
    for start in range(0, num_rows, _READ_SHARD_ROWS):
        part = keyed[start : start + _READ_SHARD_ROWS]
        table, metadata = soft_label_table(part, sampled_rows([row for _, row in part], num_columns=_COLUMNS), model)
        model = metadata[CODEC_MODEL]
        cache.commit(table, num_tokens=sum(row.num_supervised for _, row in part), metadata=metadata)


def _read(num_rows: int, directory: Path) -> None:
    torch.set_num_threads(1)
    places = [(key, len(row.ids), row.first_supervised) for key, row in _keyed(num_rows)]
    with tempfile.TemporaryDirectory() as copies:
        rows = open_rows(LocalStore(directory), _NAMESPACE, places, Path(copies))
        assert sum(len(batch["first"]) for batch in training_batches(rows, num_rows)) == num_rows
