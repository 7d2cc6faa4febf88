"""The stage in which the teacher gives soft labels to the curated rows."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from kd_core.fingerprint import fingerprint
from kd_core.rows.keys import about_soft_labels
from kd_core.rows.schemas import CODEC_MODEL, SOFT_LABEL_SCHEMA
from kd_core.rows.table import RowCache, Shard
from kd_core.rows.work import Packed
from kd_core.softlabels.capture import ScoredRow
from kd_core.softlabels.codec import encode_rows
from kd_core.stages.job import Job
from kd_core.stages.scoring import Capture, CuratedRow
from kd_core.summaries import ScoringSummary
from kd_core.task_kinds import TaskModel, kind_of

__all__ = ["pack_soft_labels", "soft_labels_stage"]


def soft_labels_stage(job: Job) -> ScoringSummary:
    """Files: keys.parquet, a row each for the curated rows that have soft labels."""
    policy, run = job.recipe.soft_labels, job.recipe.run
    assert policy is not None, "a recipe without soft labels has no such node"
    about = about_soft_labels(policy, job.inputs["teacher"])
    cache = RowCache(job.store, "soft_labels", fingerprint(about))
    cache.describe(about)
    capture, kind = Capture(job, cache), kind_of(job.recipe)

    def compute(teacher: TaskModel, shard: list[tuple[str, CuratedRow]]) -> list[tuple[CuratedRow, ScoredRow]]:
        rows = [(key, row.tokens) for key, row in shard]
        found = kind.score(teacher, rows, policy, micro_batch_tokens=run.micro_batch_tokens)
        capture.refused.update(found.refused)
        of = dict(shard)
        return [(of[scored.key], scored) for scored in found.scored]

    models = list[bytes]()  # the last one: a shard goes on with it while it serves

    def pack(found: Sequence[tuple[CuratedRow, ScoredRow]]) -> Packed:
        if not found:  # the teacher failed on every row of the shard
            return Packed(SOFT_LABEL_SCHEMA.empty_table(), 0)
        packed = pack_soft_labels(found, models[-1] if models else _model_before(cache, capture.keys, found[0][1].key))
        models[:] = [packed.metadata[CODEC_MODEL]]
        return packed

    snapshot, computed = capture.run(compute, pack)
    return capture.finish(snapshot, computed, allowed=policy.max_refused_rows)


def _model_before(cache: RowCache, keys: Sequence[str], key: str) -> bytes:
    """The codec's model of the shard before: of the last row before this one that is held. So a killed run goes on to the same bytes.

    Returns:
        The model; b"" if no row before is held.

    Raises:
        StoreError: that shard is gone; QuarantinedError if it is damaged, as its rows are then to be computed again first.
    """
    snapshot, read = cache.snapshot(), cache.store.get_range
    held = next(
        (snapshot.place(snapshot.lines[earlier]).commit for earlier in reversed(keys[: keys.index(key)]) if earlier in snapshot.lines), None
    )
    if held is None:
        return b""
    return Shard.open(cache, held, lambda key, part: part.verified(read(key, part.start, part.length))).metadata[CODEC_MODEL]


def pack_soft_labels(found: Sequence[tuple[CuratedRow, ScoredRow]], known: bytes) -> Packed:
    """Make a shard of scored rows; ``known`` is the codec's model of the shard before, or nothing."""
    labels = [np.array(row.tokens.ids[row.tokens.first_supervised :], np.int64) for row, _ in found]
    model, blobs = encode_rows([scored.targets for _, scored in found], labels, known)
    rows = []
    for (row, scored), blob in zip(found, blobs, strict=True):
        gold, entropy = scored.targets.common.gold_logprob_N, scored.targets.common.entropy_N
        means = {"mean_entropy": float(entropy.mean()), "mean_gold_logprob": float(gold.mean()), "min_gold_logprob": float(gold.min())}
        rows.append({**row.columns, **means, "targets": blob})
    tokens = sum(row.tokens.num_supervised for row, _ in found)
    return Packed(pa.Table.from_pylist(rows, schema=SOFT_LABEL_SCHEMA), tokens, {CODEC_MODEL: model})
