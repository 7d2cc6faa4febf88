"""Common parts of stages whose rows lie in a row store: their summary, the rows their record froze, and progress."""

from collections.abc import Sequence
from typing import Any

from kd_core.progress import Tick
from kd_core.rows.table import RowCache, Snapshot
from kd_core.stages.job import Job

__all__ = ["Progress", "frozen_rows", "sharded_summary"]


def sharded_summary(cache: RowCache, snapshot: Snapshot, keys: Sequence[str], computed: int) -> dict[str, Any]:
    """Summary of rows in shards, for a record; it freezes the shards that hold them."""
    own = snapshot.of(keys)
    commits = [commit.sha256 for commit in own.commits]
    return {"rows": len(keys), "rows_computed": computed, "namespace": cache.namespace, "bytes": own.size_bytes(), "commits": commits}


def frozen_rows(job: Job, role: str) -> tuple[RowCache, Snapshot]:
    """The row store behind an upstream node, and the shards that its record froze.

    Raises:
        QuarantinedError: one of them is gone.
    """
    record = job.inputs[role]
    cache = RowCache(job.store, record.stage, record.summary["namespace"])
    return cache, cache.snapshot().frozen(record.summary["commits"])


class Progress:
    """Adds up finished rows and ticks."""

    def __init__(self, job: Job, total: int, unit: str) -> None:
        self.job, self.total, self.unit, self.done = job, total, unit, 0

    def __call__(self, rows: int) -> None:
        self.done += rows
        self.job.tick(Tick(self.done, self.total, self.unit))
