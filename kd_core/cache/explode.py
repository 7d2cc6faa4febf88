"""Soft labels as plain rows, one a (position, token): for eyes and for other tools.

Goes through the codec, shard by shard, a few rows at a time, so memory does not grow with the cache.
Axes: N supervised positions, V vocabulary columns, E entries (a kept id at a position).
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from kd_core.cache.catalog import read_shard
from kd_core.errors import ArtifactError, SoftLabelError
from kd_core.rows.schemas import CODEC_MODEL
from kd_core.rows.table import RowCache, Snapshot
from kd_core.softlabels.codec import decode_rows, parse_model
from kd_core.softlabels.targets import DenseTargets, SampledTargets, Targets, TopKTargets

__all__ = ["EXPLODED_SCHEMA", "Entries", "decode_rows_of", "entries", "explode", "gold_labels"]

EXPLODED_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("logprob", pa.float32()),
        pa.field("gold_token", pa.int32(), nullable=False),
        pa.field("gold_logprob", pa.float32(), nullable=False),
        pa.field("entropy", pa.float32(), nullable=False),
    ]
)
"""position: index in the row's token ids of the token that is predicted. probability: at T = 1; of sampled labels the share
of draws at their temperature, whose logarithm is no unbiased log-probability and so is null. entropy and gold: at T = 1, nats."""

_ROWS = 16
"""Rows decoded together."""


@dataclass(frozen=True)
class Entries:
    """Entries of soft labels, flat.

    Attributes:
        position_E: index of the supervised position, int64, rising.
        id_E: token id, int64.
        probability_E: float32; share of draws for sampled labels.
        logprob_E: at T = 1, float32; None for sampled labels.
    """

    position_E: Tensor
    id_E: Tensor
    probability_E: Tensor
    logprob_E: Tensor | None


def entries(targets: Targets) -> Entries:
    """List all kept (position, id) pairs of any policy."""
    num = len(targets.common.gold_logprob_N)
    match targets:
        case SampledTargets():
            position_E = torch.repeat_interleave(torch.arange(num), targets.offsets_N1.diff())
            return Entries(position_E, targets.ids_E, targets.counts_E.float() / targets.num_draws, None)
        case TopKTargets():
            ids_NK, logprobs_NK = targets.ids_NK, targets.logprobs_NK
        case DenseTargets():
            ids_NK, logprobs_NK = torch.arange(targets.common.num_columns).expand(num, -1), targets.logprobs_NV
    logprob_E = logprobs_NK.reshape(-1)
    position_E = torch.repeat_interleave(torch.arange(num), ids_NK.shape[1])
    return Entries(position_E, ids_NK.reshape(-1), logprob_E.exp(), logprob_E)


def decode_rows_of(rows: pa.Table) -> Targets:
    """Decode the targets of rows of one shard, their positions one after the other.

    Args:
        rows: from the shard, with its schema metadata (the codec's model is there).

    Raises:
        SoftLabelError: a blob is damaged.
    """
    model = parse_model((rows.schema.metadata or {}).get(CODEC_MODEL, b""))
    return decode_rows(model, rows["targets"].to_pylist(), gold_labels(rows))


def gold_labels(rows: pa.Table) -> list[np.ndarray[Any, Any]]:
    """Token ids at each row's supervised positions, int64."""
    firsts = rows["first_supervised"].to_pylist()
    return [np.asarray(ids[first:], np.int64) for ids, first in zip(rows["ids"].to_pylist(), firsts, strict=True)]


def explode(cache: RowCache, snapshot: Snapshot, *, keys: Collection[str] | None = None, limit: int | None = None) -> Iterator[pa.Table]:
    """Read rows of a soft-label table as EXPLODED_SCHEMA, in small tables, each row once.

    Args:
        cache: a soft-label table.
        snapshot: its commits.
        keys: rows wanted; None is all.
        limit: at most so many rows of the cache.

    Raises:
        ArtifactError: a key is in no commit.
        SoftLabelError: a row cannot be decoded.
        IntegrityError: a shard is damaged.
    """
    missing = sorted(set(keys or ()) - snapshot.lines.keys())
    if missing:
        raise ArtifactError(
            f'{cache.store.uri}/{cache.prefix} has no row {missing[0]}; kd cache sql "SELECT key FROM soft_labels" lists them'
        )
    left = len(snapshot.lines) if limit is None else limit
    for commit in (snapshot if keys is None else snapshot.of(keys)).commits:
        if left <= 0:
            return
        wanted = [
            row
            for row, key in enumerate(commit.keys)
            if snapshot.place(snapshot.lines[key]).commit is commit and (keys is None or key in keys)
        ][:left]
        left -= len(wanted)
        shard = read_shard(cache, commit)
        for start in range(0, len(wanted), _ROWS):
            rows = shard.take(pa.array(wanted[start : start + _ROWS]))
            try:
                yield _exploded(rows)
            except SoftLabelError as error:
                raise SoftLabelError(f"{cache.store.uri}/{cache.shard_key(commit)}, rows from {rows['key'][0]} on: {error}") from error


def _exploded(rows: pa.Table) -> pa.Table:
    targets, labels = decode_rows_of(rows), gold_labels(rows)
    found = entries(targets)
    at = pa.array(found.position_E.numpy())
    counts = [len(ids) for ids in labels]
    keys = np.repeat(np.asarray(rows["key"].to_pylist(), object), counts)
    positions = np.concatenate([first + np.arange(n) for first, n in zip(rows["first_supervised"].to_pylist(), counts, strict=True)])
    by_position = {
        "key": pa.array(keys, pa.string()),
        "position": pa.array(positions),
        "gold_token": pa.array(np.concatenate(labels)),
        "gold_logprob": pa.array(targets.common.gold_logprob_N.numpy()),
        "entropy": pa.array(targets.common.entropy_N.numpy()),
    }
    columns = {name: pc.take(values, at) for name, values in by_position.items()}
    columns |= {"token_id": pa.array(found.id_E.numpy()), "probability": pa.array(found.probability_E.numpy())}
    columns["logprob"] = pa.nulls(len(at), pa.float32()) if found.logprob_E is None else pa.array(found.logprob_E.numpy())
    return pa.table({name: columns[name] for name in EXPLODED_SCHEMA.names}).cast(EXPLODED_SCHEMA)
