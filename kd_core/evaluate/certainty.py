"""How sure a teacher was of the rows it gave soft labels to, from what is stored of them alone.

The mean entropy comes from a plain column of every row. How often one token had nearly all of the probability stands in the
packed targets only, so it is counted in a bounded number of rows, chosen by their place in the list of keys: the answer is the
same however the rows lie in shards, and costs the same for a thousand rows and for millions. Importable without torch.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.errors import StoreError
from kd_core.rows.parquet import GROUP_ROWS, ByteRange
from kd_core.rows.schemas import CODEC_MODEL
from kd_core.rows.table import Commit, RowCache, Shard, Snapshot
from kd_core.store.arrow import StoreFiles, arrow_file_system

if TYPE_CHECKING:
    from torch import Tensor

    from kd_core.softlabels.targets import Targets

__all__ = ["SURE", "Certainty", "certainty"]

SURE = 0.99
"""Probability of the likeliest token above which the teacher is called sure."""
_SURE_NATS = -(SURE * math.log(SURE) + (1 - SURE) * math.log(1 - SURE))
"""The least entropy of a distribution whose likeliest token has no more than SURE."""
_BLOCKS = 32
"""Blocks of GROUP_ROWS neighbouring rows that are decoded: 2,048 rows."""
_READERS = 8
_COLUMNS = ("ids", "first_supervised", "targets")


@dataclass(frozen=True)
class Certainty:
    """Sureness of a teacher at the supervised positions of its soft labels.

    Attributes:
        mean_entropy: over all positions of all rows, nats, at least 0.
        positions: all of them.
        sure_share: share of positions where the likeliest token has more than SURE, 0 to 1.
        positions_read: positions that the share is of.
    """

    mean_entropy: float
    positions: int
    sure_share: float
    positions_read: int


def certainty(cache: RowCache, snapshot: Snapshot, keys: Sequence[str], num_supervised: np.ndarray) -> Certainty:
    """Tell how sure the teacher was of some rows.

    Args:
        cache: a soft-label table.
        snapshot: its commits.
        keys: the rows, at least one.
        num_supervised: positions of each.

    Raises:
        ArtifactError: a key is in no commit of the snapshot.
        StoreError: a shard is gone or the store failed.
        IntegrityError: a shard is damaged; QuarantinedError if it has been moved aside.
    """
    assert keys, "a teacher that labelled no row was not asked"
    lines = np.array(cache.lines(snapshot, keys), np.int64)
    entropies = _mean_entropies(cache, snapshot)[lines]
    total = int(num_supervised.sum())
    begins = np.unique(np.linspace(0, max(0, len(keys) - GROUP_ROWS), _BLOCKS).astype(np.int64))
    chosen = np.unique(np.concatenate([np.arange(begin, min(len(keys), begin + GROUP_ROWS)) for begin in begins]))
    sure, read = _count_sure(cache, snapshot, np.unique(lines[chosen]))
    return Certainty(math.fsum(entropies * num_supervised) / total, total, sure / read, read)


def _mean_entropies(cache: RowCache, snapshot: Snapshot) -> np.ndarray:
    """The mean entropy of each row of a snapshot, in the order of its lines, float64; no other column is read."""
    sizes = {cache.shard_key(commit): commit.size_bytes for commit in snapshot.commits}
    file_system, files = arrow_file_system(cache.store, sizes)

    def read(commit: Commit) -> np.ndarray:
        try:
            file = pq.ParquetFile(cache.shard_key(commit), filesystem=file_system, pre_buffer=True)
            column = file.read(columns=["mean_entropy"], use_threads=False)["mean_entropy"]
        except (pa.ArrowException, OSError) as error:
            raise _cause(cache, commit, files) from error
        found = np.asarray(column.to_numpy(), np.float64)
        if len(found) != commit.num_rows or not (np.isfinite(found) & (found >= -1e-3)).all():
            raise cache.quarantine(commit, "its column mean_entropy holds something else")
        return found

    with ThreadPoolExecutor(_READERS) as pool:
        return np.concatenate(list(pool.map(read, snapshot.commits)))


def _cause(cache: RowCache, commit: Commit, files: StoreFiles) -> StoreError:
    """Choose the error of a read that failed inside Arrow: the store's, else the shard is looked at again as a whole."""
    if files.error is not None:
        return cache.unless_quarantined(commit, files.error)
    return cache.quarantine(commit, "its column mean_entropy cannot be read")


def _count_sure(cache: RowCache, snapshot: Snapshot, lines: np.ndarray) -> tuple[int, int]:
    """Count (positions where the likeliest token has more than SURE, positions) of the rows at these lines."""
    groups = [(commit, i, part.num_rows) for commit in snapshot.commits for i, part in enumerate(commit.ranges[:-1])]
    first = np.cumsum([0, *(rows for _, _, rows in groups)])
    group_of = np.searchsorted(first, lines, side="right") - 1
    sure, read, shard = 0, 0, None
    for number in np.unique(group_of):
        commit, index, _ = groups[number]
        if shard is None or shard.commit is not commit:
            shard = Shard.open(cache, commit, lambda key, part: _fetch(cache, key, part))
        rows = shard.group(index, _COLUMNS).take(pa.array(lines[group_of == number] - first[number]))
        sure_N = _sure_positions(_decoded(shard, rows))
        sure, read = sure + int(sure_N.sum()), read + len(sure_N)
    return sure, read


def _fetch(cache: RowCache, key: str, part: ByteRange) -> bytes | None:
    return part.verified(cache.store.get_range(key, part.start, part.length))


def _decoded(shard: Shard, rows: pa.Table) -> "Targets":
    from kd_core.softlabels.codec import decode_rows, parse_model

    firsts = rows["first_supervised"].to_pylist()
    labels = [np.asarray(ids[first:], np.int64) for ids, first in zip(rows["ids"].to_pylist(), firsts, strict=True)]
    return decode_rows(parse_model(shard.metadata[CODEC_MODEL]), rows["targets"].to_pylist(), labels)


def _sure_positions(targets: "Targets") -> "Tensor":
    """Where the likeliest token has more than SURE, bool, shape (N,).

    Draws do not tell the probability of a token that is not the gold one; there an entropy below that of (SURE, 1 - SURE), the
    least for a likeliest token of SURE or less, is the evidence.
    """
    from kd_core.softlabels.targets import DenseTargets, TopKTargets

    common, least = targets.common, math.log(SURE)
    if isinstance(targets, DenseTargets):
        return targets.logprobs_NV.amax(-1) > least
    if isinstance(targets, TopKTargets):
        return targets.logprobs_NK[:, 0] > least
    return (common.gold_logprob_N > least) | (common.entropy_N < _SURE_NATS)
