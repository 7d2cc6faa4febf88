"""Training rows from storage: row groups fetched ahead, verified, held up to a limit, decoded straight into arrays.

The same for soft-label shards in a store (local or S3) and for a Parquet file on this disk. What is in memory is a few
bytes a row (where it is, how long) and the row groups of the shuffle buffer, whatever the number of rows.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from kd_core.errors import SoftLabelError
from kd_core.shards import RowCache, Shard, Snapshot
from kd_core.softlabels.codec import decode_rows, parse_model
from kd_core.softlabels.targets import Common, DenseTargets, SampledTargets, Targets, TopKTargets, concatenate
from kd_core.store.range_cache import RangeCache
from kd_core.train.data import BUFFER_BLOCKS, TokenRow

__all__ = ["FileGroups", "Group", "Groups", "ShardGroups", "StoredRows", "file_rows"]

_HELD_GROUPS = 5 * BUFFER_BLOCKS // 2
"""Row groups in memory: the shuffle buffer's, the next one's, and some for buffers that do not begin with a group."""
_FETCHERS = 4


@dataclass(frozen=True)
class Group:
    """Some neighbouring rows: their table, and what decodes its targets (None where there are none)."""

    table: pa.Table
    model: Any


class Groups(Protocol):
    """Row groups by number."""

    def load(self, number: int) -> Group:
        """Fetch and verify one row group."""
        ...


class FileGroups:
    """Row groups of a Parquet file on this disk, with columns ids and first_supervised."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self, number: int) -> Group:
        """One row group."""
        return Group(pq.ParquetFile(self._path).read_row_group(number, columns=["ids", "first_supervised"]), None)


class ShardGroups:
    """Row groups of all shards of a snapshot, one after the other."""

    def __init__(self, cache: RowCache, snapshot: Snapshot, copies: RangeCache) -> None:
        self._cache, self._places = cache, snapshot
        shards = [
            Shard(cache, commit, lambda key, part: copies.read(key, part.start, part.length, part.sha256)) for commit in snapshot.commits
        ]
        self._groups: list[tuple[Shard, int]] = []
        self._first: dict[str, tuple[int, np.ndarray]] = {}  # shard -> its first group, and where each of its groups begins
        self._models: dict[str, Any] = {}
        for shard in shards:
            sizes = [part.num_rows for part in shard.commit.ranges[:-1]] or [len(shard.commit.keys)]
            self._first[shard.commit.sha256] = (len(self._groups), np.cumsum([0, *sizes]))
            self._groups += [(shard, i) for i in range(len(sizes))]

    def locate(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Group of each row and its number there, int64.

        Raises:
            ArtifactError: a row is in no shard.
        """
        found = np.empty((len(keys), 2), np.int64)
        for i, place in enumerate(self._cache.locate(self._places, keys)):
            first, starts = self._first[place.commit.sha256]
            group = int(np.searchsorted(starts, place.row, side="right")) - 1
            found[i] = first + group, place.row - starts[group]
        return found[:, 0], found[:, 1]

    def load(self, number: int) -> Group:
        """One row group, verified."""
        shard, index = self._groups[number]
        sha256 = shard.commit.sha256
        if not shard.commit.ranges:  # written before ranges were recorded: whole, and without a model
            return Group(self._cache.read_shard(shard.commit), parse_model(b""))
        if sha256 not in self._models:
            self._models[sha256] = parse_model(shard.metadata.get(b"kd.codec_model", b""))
        return Group(shard.group(index), self._models[sha256])


class StoredRows:
    """Training rows in row groups.

    Args:
        groups: where they are.
        group: group of row i, int64.
        row: number of row i in its group, int64.
        num_tokens: of row i, int32.
        first_supervised: of row i, int32.
    """

    def __init__(self, groups: Groups, group: np.ndarray, row: np.ndarray, *, num_tokens: np.ndarray, first_supervised: np.ndarray) -> None:
        self._groups, self._group, self._row = groups, group, row
        self.num_tokens, self.first_supervised = num_tokens, first_supervised
        self._held: OrderedDict[int, Future[Group]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="rows")

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch the groups of these rows."""
        for group in np.unique(self._group[list(numbers)]):
            self._ask(int(group))

    def _ask(self, group: int) -> Future[Group]:
        if group not in self._held:
            self._held[group] = self._pool.submit(self._groups.load, group)
            while len(self._held) > _HELD_GROUPS:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        return self._held[group]

    def _by_group(self, numbers: Sequence[int]) -> list[tuple[Group, np.ndarray, list[int]]]:
        """(group, rows in it, their places among ``numbers``) of every group that is touched."""
        chosen = np.asarray(numbers, np.int64)
        self.prefetch(numbers)
        found = []
        for group in np.unique(self._group[chosen]):
            at = np.flatnonzero(self._group[chosen] == group)
            found.append((self._ask(int(group)).result(), self._row[chosen[at]], at.tolist()))
        return found

    def read(self, numbers: Sequence[int]) -> list[TokenRow]:
        """Rows, in the order asked for."""
        rows: list[TokenRow | None] = [None] * len(numbers)
        for group, picked, at in self._by_group(numbers):
            part = group.table.select(["ids", "first_supervised"]).take(pa.array(picked))
            for place, ids, first in zip(at, part["ids"].to_pylist(), part["first_supervised"].to_pylist(), strict=True):
                rows[place] = TokenRow(tuple(ids), first)
        return [row for row in rows if row is not None]

    def targets(self, numbers: Sequence[int]) -> Targets:
        """Soft labels of rows, in the order asked for."""
        parts, order = [], []
        for group, picked, at in self._by_group(numbers):
            if group.model is None:
                raise SoftLabelError("the objective has a soft part and these rows have no soft labels")
            part = group.table.select(["ids", "first_supervised", "targets"]).take(pa.array(picked)).combine_chunks()
            parts.append(decode_rows(group.model, part["targets"].to_pylist(), _labels(part)))
            order += at
        lengths = (self.num_tokens - self.first_supervised)[[numbers[i] for i in order]]
        return _reordered(concatenate(parts), lengths, np.argsort(order))


def file_rows(path: Path, numbers: np.ndarray | None) -> StoredRows:
    """Rows of a Parquet file on this disk; ``numbers`` chooses some of them, None takes all."""
    sizes, tokens, first = [], [], []
    file = pq.ParquetFile(path)
    for i in range(file.num_row_groups):
        part = file.read_row_group(i, columns=["ids", "first_supervised"])
        sizes.append(part.num_rows)
        tokens.append(pc.list_value_length(part["ids"]).to_numpy())
        first.append(part["first_supervised"].to_numpy())
    group = np.repeat(np.arange(len(sizes)), sizes)
    row = np.concatenate([np.arange(size) for size in sizes])
    chosen = np.arange(len(row)) if numbers is None else numbers
    return StoredRows(
        FileGroups(path),
        group[chosen],
        row[chosen],
        num_tokens=np.concatenate(tokens)[chosen],
        first_supervised=np.concatenate(first)[chosen],
    )


def _labels(rows: pa.Table) -> list[np.ndarray]:
    """The supervised tokens of each row, int64."""
    ids = rows["ids"].combine_chunks() if rows.num_rows else pa.array([], pa.list_(pa.int32()))
    flat, offsets = ids.flatten().to_numpy().astype(np.int64), ids.offsets.to_numpy() - ids.offsets[0].as_py()
    first = rows["first_supervised"].to_numpy()
    return [flat[offsets[i] + first[i] : offsets[i + 1]] for i in range(rows.num_rows)]


def _reordered(targets: Targets, lengths: np.ndarray, order: np.ndarray) -> Targets:
    """The same targets with their rows in another order.

    Args:
        targets: of all rows, one after the other.
        lengths: positions of each row.
        order: the row that shall stand at each place.
    """
    if np.array_equal(order, np.arange(len(order))):
        return targets
    at_N = torch.from_numpy(_ranges(np.cumsum(lengths) - lengths, lengths, order))
    common = Common(targets.common.gold_logprob_N[at_N], targets.common.entropy_N[at_N], targets.common.num_columns)
    match targets:
        case DenseTargets():
            return DenseTargets(common, targets.logprobs_NV[at_N])
        case TopKTargets():
            tensors = (targets.ids_NK, targets.logprobs_NK, targets.log_normalizer_NG, targets.log_tail_NG)
            return TopKTargets(common, targets.temperatures, *(tensor[at_N] for tensor in tensors))
        case SampledTargets():
            starts, counts = targets.offsets_N1[:-1].numpy(), targets.offsets_N1.diff().numpy()
            at_E = torch.from_numpy(_ranges(starts, counts, at_N.numpy()))
            offsets_N1 = torch.from_numpy(np.concatenate([[0], np.cumsum(counts[at_N.numpy()])]))
            return SampledTargets(
                common,
                targets.temperature,
                targets.num_draws,
                targets.cross_entropy_offset_N[at_N],
                offsets_N1,
                targets.ids_E[at_E],
                targets.counts_E[at_E],
            )


def _ranges(starts: np.ndarray, lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The numbers of ranges [start, start + length) one after the other, in an order."""
    lengths = lengths[order]
    total = np.cumsum(lengths)
    return np.repeat(starts[order] - (total - lengths), lengths) + np.arange(total[-1] if len(total) else 0)
