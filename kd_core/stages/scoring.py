"""Stages in which the teacher reads fixed tokens: soft labels, and hidden states for feature distillation.

Both are kept by row. A stage streams the curated rows: it holds a key and two numbers of each, and the shard it works on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.errors import SoftLabelError
from kd_core.fingerprint import fingerprint
from kd_core.row_keys import about_hidden_states, about_soft_labels, soft_label_key
from kd_core.row_schemas import CODEC_MODEL, HIDDEN_STATE_SCHEMA, SOFT_LABEL_SCHEMA
from kd_core.shard_work import Packed, work_in_shards
from kd_core.shards import RowCache, Shard, Snapshot
from kd_core.softlabels.capture import ScoredRow, score_rows
from kd_core.softlabels.codec import encode_rows
from kd_core.softlabels.hidden import HiddenRow, capture_hidden, encode_states
from kd_core.stages.job import Job
from kd_core.stages.teaching import Progress, load_teacher, sharded_summary
from kd_core.teacher.models import LoadedModel
from kd_core.train.data import TokenRow

__all__ = ["hidden_states_stage", "soft_labels_stage", "token_rows"]

_READ_ROWS = 1024
Found = TypeVar("Found")


def token_rows(table: pa.Table) -> list[TokenRow]:
    """Curated rows as token rows, in order."""
    ids, first = table["ids"].to_pylist(), table["first_supervised"].to_pylist()
    return [TokenRow(tuple(i), f) for i, f in zip(ids, first, strict=True)]


@dataclass(frozen=True)
class _CuratedRow:
    """A row to score, and the plain columns that stand beside its targets."""

    tokens: TokenRow
    columns: dict[str, Any]


@dataclass
class _Capture:
    """One pass of the teacher over the curated rows, into one growing table.

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
        compute: Callable[[LoadedModel, list[tuple[str, _CuratedRow]]], Found],
        pack: Callable[[Found], Packed],
    ) -> tuple[Snapshot, int]:
        """Score what is missing; the teacher is loaded at the first missing row."""
        job, loaded = self.job, list[LoadedModel]()

        def work(shard: list[tuple[str, _CuratedRow]]) -> Found:
            if not loaded:
                loaded.append(load_teacher(job))
            return compute(loaded[0], shard)

        progress = Progress(job, job.inputs["curate"].summary["rows"], "rows")
        with job.files(job.inputs["curate"]) as files:
            path, run = files / "rows.parquet", job.recipe.run
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

    def _read(self, path: Path) -> Iterator[tuple[str, _CuratedRow]]:
        self.keys, self.num_tokens, self.first_supervised = [], [], []
        names = ["prompt_id", "sample_index", "source", "finish_reason", "ids", "first_supervised"]
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_READ_ROWS, columns=names):
            for columns in batch.to_pylist():
                tokens = TokenRow(tuple(columns["ids"]), columns["first_supervised"])
                key = soft_label_key(self.cache.namespace, tokens.ids, tokens.first_supervised)
                self.keys.append(key)
                self.num_tokens.append(len(tokens.ids))
                self.first_supervised.append(tokens.first_supervised)
                yield key, _CuratedRow(tokens, {**columns, "key": key, "num_supervised": tokens.num_supervised})

    def finish(self, snapshot: Snapshot, computed: int, *, allowed: int) -> dict[str, Any]:
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
        return {**sharded_summary(self.cache, snapshot, keys, computed), "rows_refused": missing, "supervised_tokens": tokens}


def soft_labels_stage(job: Job) -> dict[str, Any]:
    """Files: keys.parquet, a row each for the curated rows that have soft labels. Summary: counts, bytes, shards."""
    policy, run = job.recipe.soft_labels, job.recipe.run
    assert policy is not None, "a recipe without soft labels has no such node"
    about = about_soft_labels(policy, job.inputs["teacher"])
    cache = RowCache(job.store, "soft_labels", fingerprint(about))
    cache.describe(about)
    capture = _Capture(job, cache)

    def compute(teacher: LoadedModel, shard: list[tuple[str, _CuratedRow]]) -> list[tuple[_CuratedRow, ScoredRow]]:
        rows = [(key, row.tokens) for key, row in shard]
        found = score_rows(teacher, rows, policy=policy, micro_batch_tokens=run.micro_batch_tokens)
        capture.refused.update(found.refused)
        of = dict(shard)
        return [(of[scored.key], scored) for scored in found.scored]

    models = list[bytes]()  # the last one: a shard goes on with it while it serves

    def pack(found: Sequence[tuple[_CuratedRow, ScoredRow]]) -> Packed:
        if not found:  # the teacher failed on every row of the shard
            return Packed(SOFT_LABEL_SCHEMA.empty_table(), 0)
        packed = _pack_soft_labels(found, models[-1] if models else _model_before(cache, capture.keys, found[0][1].key))
        models[:] = [packed.metadata[CODEC_MODEL]]
        return packed

    snapshot, computed = capture.run(compute, pack)
    return capture.finish(snapshot, computed, allowed=policy.max_refused_rows)


def _model_before(cache: RowCache, keys: Sequence[str], key: str) -> bytes:
    """The codec's model of the shard before: of the last row before this one that is held. So a killed run goes on to the same bytes.

    Returns:
        The model; b"" if no row before is held, or its shard has none.

    Raises:
        StoreError: that shard is gone; QuarantinedError if it is damaged, as its rows are then to be computed again first.
    """
    snapshot, read = cache.snapshot(), cache.store.get_range
    held = next(
        (snapshot.place(snapshot.lines[earlier]).commit for earlier in reversed(keys[: keys.index(key)]) if earlier in snapshot.lines), None
    )
    if held is None or not held.ranges:
        return b""
    return Shard.open(cache, held, lambda key, part: part.verified(read(key, part.start, part.length))).metadata.get(CODEC_MODEL, b"")


def _pack_soft_labels(found: Sequence[tuple[_CuratedRow, ScoredRow]], known: bytes) -> Packed:
    labels = [np.array(row.tokens.ids[row.tokens.first_supervised :], np.int64) for row, _ in found]
    model, blobs = encode_rows([scored.targets for _, scored in found], labels, known)
    rows = []
    for (row, scored), blob in zip(found, blobs, strict=True):
        gold, entropy = scored.targets.common.gold_logprob_N, scored.targets.common.entropy_N
        means = {"mean_entropy": float(entropy.mean()), "mean_gold_logprob": float(gold.mean()), "min_gold_logprob": float(gold.min())}
        rows.append({**row.columns, **means, "targets": blob})
    tokens = sum(row.tokens.num_supervised for row, _ in found)
    return Packed(pa.Table.from_pylist(rows, schema=SOFT_LABEL_SCHEMA), tokens, {CODEC_MODEL: model})


def hidden_states_stage(job: Job) -> dict[str, Any]:
    """Files: keys.parquet, a row each for the curated rows that have states. Summary: counts, bytes, shards."""
    wanted, run = job.recipe.hidden_states, job.recipe.run
    assert wanted is not None, "a recipe without hidden states has no such node"
    about = about_hidden_states(wanted, job.inputs["teacher"])
    cache = RowCache(job.store, "hidden_states", fingerprint(about))
    cache.describe(about)
    capture = _Capture(job, cache)

    def compute(teacher: LoadedModel, shard: list[tuple[str, _CuratedRow]]) -> list[tuple[_CuratedRow, HiddenRow]]:
        rows = [(key, row.tokens) for key, row in shard]
        found = capture_hidden(teacher, rows, wanted=wanted, micro_batch_tokens=run.micro_batch_tokens)
        capture.refused.update(found.refused)
        of = dict(shard)
        return [(of[captured.key], captured) for captured in found.captured]

    snapshot, computed = capture.run(compute, _pack_hidden_states)
    labels = job.recipe.soft_labels  # a row on which the teacher fails has neither
    return capture.finish(snapshot, computed, allowed=0 if labels is None else labels.max_refused_rows)


def _pack_hidden_states(found: Sequence[tuple[_CuratedRow, HiddenRow]]) -> Packed:
    rows = [{**row.columns, "states": encode_states(captured.states)} for row, captured in found]
    tokens = sum(row.tokens.num_supervised for row, _ in found)
    return Packed(pa.Table.from_pylist(rows, schema=HIDDEN_STATE_SCHEMA), tokens)
