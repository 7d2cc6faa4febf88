"""One pass of the teacher over the curated rows: what the stages of soft labels and of hidden states share.

Both are kept by row. A stage streams the curated rows: it holds a key and two numbers of each, and the shard it works on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_core.errors import SoftLabelError
from kd_core.recipe import StudentFromConfig
from kd_core.rows.keys import soft_label_key
from kd_core.rows.table import RowCache, Snapshot
from kd_core.rows.work import Packed, work_in_shards
from kd_core.stages.job import Job
from kd_core.stages.sharded import Progress, sharded_rows
from kd_core.summaries import CurateSummary, ScoringSummary, TeacherSummary, UsedRows
from kd_core.task_kinds import TaskModel, kind_of
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.lengths import expect_enough, row_limit, used_rows

__all__ = ["Capture", "CuratedRow", "token_rows", "usable_rows"]

_READ_ROWS = 1024
Found = TypeVar("Found")


def token_rows(table: pa.Table) -> list[TokenRow]:
    """Curated rows as token rows, in order."""
    ids, first = table["ids"].to_pylist(), table["first_supervised"].to_pylist()
    return [TokenRow(tuple(i), f) for i, f in zip(ids, first, strict=True)]


def usable_rows(job: Job, num_tokens: np.ndarray, first_supervised: np.ndarray, *, student: int | None) -> UsedRows:
    """Find the curated rows that the student can learn from.

    Args:
        job: a stage below the teacher.
        num_tokens, first_supervised: of every row.
        student: positions of the student, where they are known.
    """
    positions = {"student": student, "teacher": job.summary("teacher", TeacherSummary).max_positions}
    return used_rows(num_tokens, num_tokens - first_supervised, row_limit(job.recipe.training, positions=positions))


def _expect_usable_rows(job: Job, path: Path) -> None:
    """Stop before the teacher reads rows of which the student could not use enough.

    Raises:
        TrainingError: so it is.
    """
    student = job.recipe.student
    batches = list(_lengths(path))
    lengths, first = (np.concatenate([batch[i] for batch in batches]) for i in range(2))
    known = student.architecture.max_positions if isinstance(student, StudentFromConfig) else None
    expect_enough(usable_rows(job, lengths, first, student=known), job.recipe.training)


def _lengths(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read (tokens, first supervised position) of curated rows, some at a time."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=_READ_ROWS, columns=["ids", "first_supervised"]):
        yield pc.list_value_length(batch["ids"]).to_numpy(), batch["first_supervised"].to_numpy()


@dataclass(frozen=True)
class CuratedRow:
    """A row to score, and the plain columns that stand beside its targets."""

    tokens: TokenRow
    columns: dict[str, Any]


@dataclass
class Capture:
    """One pass of the teacher over the curated rows, into one row store.

    Attributes:
        job: the stage.
        cache: where rows are kept.
        keys, num_tokens, first_supervised: of every curated row that was read, in order.
        refused: key -> why the teacher's output was not kept.
    """

    job: Job
    cache: RowCache
    keys: list[str] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    first_supervised: list[int] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def run(
        self,
        compute: Callable[[TaskModel, list[tuple[str, CuratedRow]]], Found],
        pack: Callable[[Found], Packed],
    ) -> tuple[Snapshot, int]:
        """Score what is missing; the teacher is loaded at the first missing row."""
        job, loaded = self.job, list[TaskModel]()

        def work(shard: list[tuple[str, CuratedRow]]) -> Found:
            if not loaded:
                loaded.append(kind_of(job.recipe).load_teacher(job))
            return compute(loaded[0], shard)

        progress = Progress(job, job.summary("curate", CurateSummary).rows, "rows")
        with job.files(job.inputs["curate"]) as files:
            path, run = files / "rows.parquet", job.recipe.run
            _expect_usable_rows(job, path)
            return work_in_shards(
                self.cache,
                lambda: self._read(path),
                work,
                pack,
                shard_rows=run.shard_rows,
                done=progress,
                worker=run.worker,
                num_workers=run.num_workers,
            )

    def _read(self, path: Path) -> Iterator[tuple[str, CuratedRow]]:
        self.keys, self.num_tokens, self.first_supervised = [], [], []
        names = ["prompt_id", "sample_index", "source", "finish_reason", "ids", "first_supervised"]
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_READ_ROWS, columns=names):
            for columns in batch.to_pylist():
                tokens = TokenRow(tuple(columns["ids"]), columns["first_supervised"])
                key = soft_label_key(self.cache.namespace, tokens.ids, tokens.first_supervised)
                self.keys.append(key)
                self.num_tokens.append(len(tokens.ids))
                self.first_supervised.append(tokens.first_supervised)
                yield key, CuratedRow(tokens, {**columns, "key": key, "num_supervised": tokens.num_supervised})

    def finish(self, snapshot: Snapshot, computed: int, *, allowed: int) -> ScoringSummary:
        """Write keys.parquet (a row each for every curated row that has targets) and sum up.

        Raises:
            SoftLabelError: more rows were refused than is allowed.
        """
        kept = [i for i, key in enumerate(self.keys) if key in snapshot.lines]
        missing = len(self.keys) - len(kept)
        if missing > allowed:
            gone = next(key for key in self.keys if key not in snapshot.lines)
            first, reason = next(iter(self.refused.items()), (gone, "its shard went away while this stage ran; run again"))
            raise SoftLabelError(
                f"{missing} of {len(self.keys)} rows have no usable teacher output, and max_refused_rows allows {allowed}; "
                f"first row {first}: {reason}. All other rows are kept. A teacher in float32 may cure it"
            )
        keys = [self.keys[i] for i in kept]
        num_tokens, first_supervised = np.array(self.num_tokens, np.int32)[kept], np.array(self.first_supervised, np.int32)[kept]
        columns = {"key": keys, "row": np.array(kept, np.int32), "num_tokens": num_tokens, "first_supervised": first_supervised}
        self.job.write_table("keys.parquet", pa.table(columns))
        tokens = int(num_tokens.sum() - first_supervised.sum())
        return ScoringSummary(sharded_rows(self.cache, snapshot, keys, computed), missing, tokens)
