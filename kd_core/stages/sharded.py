"""Common parts of stages whose rows lie in a row store: what their record says of them, the rows it froze, and progress."""

import time
from collections.abc import Sequence

from kd_core.progress import Tick
from kd_core.rows.table import RowCache, Snapshot
from kd_core.stages.job import Job
from kd_core.summaries import ShardedRows, shards_of

__all__ = ["Progress", "frozen_rows", "sharded_rows"]


def sharded_rows(cache: RowCache, snapshot: Snapshot, keys: Sequence[str], computed: int) -> ShardedRows:
    """Description of rows in shards, for a record; it freezes the shards that hold them."""
    own = snapshot.of(keys)
    commits = tuple(commit.sha256 for commit in own.commits)
    return ShardedRows(len(keys), computed, cache.namespace, own.size_bytes(), commits)


def frozen_rows(job: Job, role: str) -> tuple[RowCache, Snapshot]:
    """The row store behind an upstream node, and the shards that its record froze.

    Raises:
        QuarantinedError: one of them is gone.
    """
    record = job.inputs[role]
    shards = shards_of(record)
    assert shards is not None, f"{record.stage} keeps no rows in the row store"
    cache = RowCache(job.store, record.stage, shards.namespace)
    return cache, cache.snapshot().frozen(shards.commits)


_SECONDS_BETWEEN_TICKS = 0.5


class Progress:
    """Adds up finished rows and what is made of those on their way, and ticks."""

    def __init__(self, job: Job, total: int, unit: str) -> None:
        self.job, self.total, self.unit, self.done = job, total, unit, 0
        self._made, self._began, self._ticked, self._note = 0, 0.0, 0.0, ""

    def __call__(self, rows: int) -> None:
        """Count rows that are finished."""
        self.done += rows
        self.job.tick(Tick(self.done, self.total, self.unit, self._note))

    def made(self, amount: int, unit: str) -> None:
        """Count what was made of rows that are not finished yet, all of one unit; ticks now and then."""
        now = time.monotonic()
        self._began = self._began or now
        self._made += amount
        if now - self._ticked >= _SECONDS_BETWEEN_TICKS:
            rate = f", {self._made / (now - self._began):,.0f} {unit}/s" if now > self._began else ""
            self._ticked, self._note = now, f"{self._made:,} {unit}{rate}"
            self(0)
