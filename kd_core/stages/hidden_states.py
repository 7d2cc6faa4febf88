"""The stage that keeps hidden states of the teacher for feature distillation."""

from collections.abc import Sequence

import pyarrow as pa

from kd_core.fingerprint import fingerprint
from kd_core.rows.keys import about_hidden_states
from kd_core.rows.schemas import HIDDEN_STATE_SCHEMA
from kd_core.rows.table import RowCache
from kd_core.rows.work import Packed
from kd_core.softlabels.hidden import HiddenRow, capture_hidden, encode_states
from kd_core.stages.job import Job
from kd_core.stages.scoring import Capture, CuratedRow
from kd_core.summaries import ScoringSummary
from kd_core.task_kinds import TaskModel
from kd_core.teacher.models import LoadedModel

__all__ = ["hidden_states_stage"]


def hidden_states_stage(job: Job) -> ScoringSummary:
    """Files: keys.parquet, a row each for the curated rows that have states."""
    wanted, run = job.recipe.hidden_states, job.recipe.run
    assert wanted is not None, "a recipe without hidden states has no such node"
    about = about_hidden_states(wanted, job.inputs["teacher"])
    cache = RowCache(job.store, "hidden_states", fingerprint(about))
    cache.describe(about)
    capture = Capture(job, cache)

    def compute(teacher: TaskModel, shard: list[tuple[str, CuratedRow]]) -> list[tuple[CuratedRow, HiddenRow]]:
        rows = [(key, row.tokens) for key, row in shard]
        assert isinstance(teacher, LoadedModel), "the recipe allows hidden states of text models only"
        found = capture_hidden(teacher, rows, wanted=wanted, micro_batch_tokens=run.micro_batch_tokens)
        capture.refused.update(found.refused)
        of = dict(shard)
        return [(of[captured.key], captured) for captured in found.captured]

    snapshot, computed = capture.run(compute, _pack_hidden_states)
    labels = job.recipe.soft_labels  # a row on which the teacher fails has neither
    return capture.finish(snapshot, computed, allowed=0 if labels is None else labels.max_refused_rows)


def _pack_hidden_states(found: Sequence[tuple[CuratedRow, HiddenRow]]) -> Packed:
    rows = [{**row.columns, "states": encode_states(captured.states)} for row, captured in found]
    tokens = sum(row.tokens.num_supervised for row, _ in found)
    return Packed(pa.Table.from_pylist(rows, schema=HIDDEN_STATE_SCHEMA), tokens)
