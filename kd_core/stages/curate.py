"""The stage that chooses the rows from which the student learns."""

import pyarrow as pa

from kd_core.errors import TrainingError
from kd_core.progress import Tick
from kd_core.rows.schemas import CURATED_SCHEMA
from kd_core.stages.answers import read_answers
from kd_core.stages.job import Job
from kd_core.summaries import CurateSummary
from kd_core.task_kinds import kind_of

__all__ = ["curate_stage"]


def curate_stage(job: Job) -> CurateSummary:
    """Files: rows.parquet (what is learnt), rejected.parquet (with reasons), validation.parquet."""
    found = kind_of(job.recipe).curate(job, read_answers(job) if "answers" in job.inputs else None)
    if found.rejected is not None:
        job.write_table("rejected.parquet", found.rejected)
    rows = found.rows
    if not rows:
        raise TrainingError(f"curate: no row is left to learn from: {found.counts}; allow gold rows, or look into why rows were rejected")
    job.write_table("rows.parquet", pa.Table.from_pylist(rows, schema=CURATED_SCHEMA))
    job.write_table("validation.parquet", pa.Table.from_pylist(found.validation, schema=CURATED_SCHEMA))
    tokens = sum(len(row["ids"]) - row["first_supervised"] for row in rows)
    job.tick(Tick(len(rows), len(rows), "rows"))
    return CurateSummary(len(rows), tokens, sum(len(row["ids"]) for row in rows), found.counts)
