"""Training rows from storage: row groups fetched ahead, verified, held up to a limit, decoded straight into arrays.

The same for shards of soft labels and of hidden states in a store (local or S3) and for a Parquet file on this disk. What is in
memory is a few bytes a row (where it is, how long) and the row groups of the shuffle buffer, whatever the number of rows.
"""

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_core.errors import SoftLabelError
from kd_core.rows.range_cache import RangeCache, request_windows
from kd_core.rows.schemas import CODEC_MODEL
from kd_core.rows.table import RowCache, Shard, Snapshot
from kd_core.softlabels.codec import decode_mixed_rows, parse_model
from kd_core.softlabels.hidden import RowStates, decode_states
from kd_core.softlabels.targets import Targets
from kd_core.tokens.batches import TokenRow
from kd_core.train.row_order import BLOCK_ROWS, BUFFER_BLOCKS

__all__ = ["FileGroups", "Group", "Groups", "ShardGroups", "StoredRows", "file_rows"]

_HELD_ROWS = 5 * BUFFER_BLOCKS * BLOCK_ROWS // 2
"""Rows in memory: the shuffle buffer's, the next one's, and some for buffers that do not begin with a row group."""
_COLUMNS = ("ids", "first_supervised", "targets", "states")
_OPEN_SHARDS = 16
"""Footers in memory, 10 to 100 kB each: groups are asked for in their order, so one is read about once a buffer."""
_FETCHERS = 4
_DECODERS = 2


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of one row group.

    Attributes:
        ids: token ids of all of them, one after the other, int32.
        offsets: where each row's ids begin, and the end of the last.
        first_supervised: index of each row's first answer token.
        targets: packed soft labels of each row; None where there are none.
        model: what decodes them.
        states: packed hidden states of each row; None where there are none.
    """

    ids: np.ndarray
    offsets: list[int]
    first_supervised: list[int]
    targets: list[bytes] | None
    model: Any
    states: list[bytes] | None = None

    @classmethod
    def of(cls, table: pa.Table, model: Any) -> "Group":
        """Make a group from columns ids, first_supervised and perhaps targets or states."""
        lists = _whole(table["ids"])
        offsets = lists.offsets.to_numpy()
        targets, states = (_blobs(_whole(table[name])) if name in table.column_names else None for name in ("targets", "states"))
        ids = lists.values.to_numpy()[offsets[0] : offsets[-1]]
        return cls(ids, (offsets - offsets[0]).tolist(), table["first_supervised"].to_pylist(), targets, model, states)

    def tokens(self, row: int) -> TokenRow:
        """One row."""
        ids: Any = self.ids[self.offsets[row] : self.offsets[row + 1]]
        return TokenRow(ids, self.first_supervised[row])

    def labels(self, row: int) -> np.ndarray:
        """The supervised tokens of a row, int32."""
        return self.ids[self.offsets[row] + self.first_supervised[row] : self.offsets[row + 1]]


def _whole(column: pa.ChunkedArray) -> Any:
    """A column in one piece, in place where it is one: a row group is."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _blobs(array: pa.Array) -> list[bytes]:
    """The values of a binary array, in place."""
    _, offsets, data = array.buffers()
    ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1].tolist()
    whole: Any = memoryview(data)
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


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
        return Group.of(pq.ParquetFile(self._path).read_row_group(number, columns=_COLUMNS), None)


class ShardGroups:
    """Row groups of the shards that hold some rows, one shard after the other.

    Nothing of the snapshot is kept: a row costs some numbers here, a shard its checksums. A group has the asked rows alone, so
    what a buffer of rows takes does not depend on how few of a shard's rows they are.

    Attributes:
        group: group of each row, int64.
        row: number of each row in its group, int64.
    """

    def __init__(self, cache: RowCache, snapshot: Snapshot, copies: RangeCache, keys: Sequence[str]) -> None:
        """Find rows by key.

        Raises:
            ArtifactError: a row is in no shard.
        """
        self._cache, self._copies = cache, copies
        self._lock = threading.Lock()
        self._models: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()  # while a group needs it
        self._commits = [replace(commit, keys=()) for commit in snapshot.commits]
        sizes = [[part.num_rows for part in commit.ranges[:-1]] for commit in snapshot.commits]
        self._first_group = np.cumsum([0, *map(len, sizes)])  # of each shard, and their number
        first_line = np.cumsum([0, *(size for part in sizes for size in part)])  # of each group
        line = np.array(cache.lines(snapshot, keys), np.int64)
        asked = np.unique(line)
        self._line_in_group = asked - first_line[np.searchsorted(first_line, asked, side="right") - 1]
        self._first_asked = np.searchsorted(asked, first_line)  # of each group, in the lines above
        self.group = np.searchsorted(first_line, line, side="right") - 1
        self.row = np.searchsorted(asked, line) - self._first_asked[self.group]
        self._wanted = set(np.unique(self.group).tolist()) if copies.keeps(snapshot.size_bytes()) else set()
        self._shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def load(self, number: int) -> Group:
        """The asked rows of a row group, verified."""
        i = int(np.searchsorted(self._first_group, number, side="right")) - 1
        shard = self._shard(i)
        table = shard.group(number - int(self._first_group[i]), _COLUMNS)
        packed = shard.metadata.get(CODEC_MODEL)
        if packed is None:  # hidden states need none
            return Group.of(self._asked(number, table), None)
        with self._lock:  # one for all threads: rows of one model are decoded together
            model = self._models.get(packed)
            if model is None:
                self._models[packed] = model = parse_model(packed)
        return Group.of(self._asked(number, table), model)

    def _asked(self, number: int, table: pa.Table) -> pa.Table:
        lines = self._line_in_group[self._first_asked[number] : self._first_asked[number + 1]]
        return table if len(lines) == table.num_rows else table.take(lines)

    def _open(self, number: int) -> Shard:
        """A shard whose neighbouring groups come in one request where all of them will be read and kept."""
        commit, first = self._commits[number], int(self._first_group[number])
        wanted = [first + i in self._wanted for i in range(len(commit.ranges) - 1)]
        window_of = {part: window for window in request_windows(commit.ranges, [*wanted, any(wanted)]) for part in window}
        return Shard.open(self._cache, commit, lambda key, part: self._copies.read(key, part, window_of.get(part, ())))


_Asked = list[tuple[Future[Group], int]]
"""The group of each row, and the row's number in it."""


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
        self._held_rows = 0
        self._rows_of_group = np.bincount(group)
        self._two_fit = min(2 * self._rows_of_buffer(), len(group)) <= _HELD_ROWS
        self._ahead: dict[tuple[int, ...], Future[Targets]] = {}
        self._lock = threading.Lock()
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch-rows")
        self._decoders = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode-rows")

    def prefetch(self, numbers: Sequence[int], *, soft: bool) -> None:
        """Start to fetch the groups of a batch and, with ``soft``, to decode its soft labels, for one call of ``targets``."""
        asked, wanted = self._ask(numbers), tuple(numbers)
        if soft and wanted not in self._ahead:
            self._ahead[wanted] = self._decoders.submit(_decode, asked)

    def expect(self, numbers: Sequence[int]) -> None:
        """Start to fetch the groups of rows of the next shuffle buffer, where those of two buffers can be held."""
        if self._two_fit:
            self._ask(numbers)

    def _rows_of_buffer(self) -> float:
        """Rows of the groups that a shuffle buffer's blocks lie in: more than its own where blocks do not begin with groups."""
        begins = np.diff(self._group, prepend=-1) != 0
        begins[::BLOCK_ROWS] = True
        return float(self._rows_of_group[self._group[begins]].sum()) * BUFFER_BLOCKS * BLOCK_ROWS / max(1, len(self._group))

    def _ask(self, numbers: Sequence[int]) -> _Asked:
        """Find where each row is, or will be: groups that are not at hand are fetched side by side."""
        index = list(numbers)
        groups = self._group[index].tolist()
        wanted = sorted(set(groups))
        apart = -(-len(wanted) // _FETCHERS)  # neighbours may come in one request: fetchers begin far from each other
        with self._lock:
            for group in (group for first in range(apart) for group in wanted[first::apart]):
                if group not in self._held:
                    self._held[group] = self._fetchers.submit(self._groups.load, group)
                    self._held_rows += int(self._rows_of_group[group])
                self._held.move_to_end(group)
            asked = [self._held[group] for group in groups]
            while self._held_rows > _HELD_ROWS and len(self._held) > 1:
                dropped, _ = self._held.popitem(last=False)
                self._held_rows -= int(self._rows_of_group[dropped])
        return list(zip(asked, self._row[index].tolist(), strict=True))

    def read(self, numbers: Sequence[int]) -> list[TokenRow]:
        """Rows, in the order asked for; soft labels that were decoded for them and not taken are let go: their weight is 0 by now."""
        self._ahead.pop(tuple(numbers), None)
        return [asked.result().tokens(row) for asked, row in self._ask(numbers)]

    def targets(self, numbers: Sequence[int]) -> Targets:
        """Soft labels of rows, in the order asked for; those of a batch that was decoded ahead are there already."""
        ahead = self._ahead.pop(tuple(numbers), None)
        return _decode(self._ask(numbers)) if ahead is None else ahead.result()

    def states(self, numbers: Sequence[int]) -> list[RowStates]:
        """Hidden states of rows, in the order asked for.

        Raises:
            SoftLabelError: these rows have none.
        """
        found = [(asked.result(), row) for asked, row in self._ask(numbers)]
        blobs = [group.states[row] for group, row in found if group.states is not None]
        if len(blobs) < len(numbers):
            raise SoftLabelError("the objective has features and these rows have no hidden states")
        return [decode_states(blob) for blob in blobs]


def _decode(asked: _Asked) -> Targets:
    """Soft labels of rows; compiled, it runs beside Python."""
    found = [(group.result(), row) for group, row in asked]
    blobs = [group.targets[row] for group, row in found if group.targets is not None]
    if len(blobs) < len(found):
        raise SoftLabelError("the objective has a soft part and these rows have no soft labels")
    models = {id(group.model): group.model for group, _ in found}
    index = {name: i for i, name in enumerate(models)}
    model_R = np.array([index[id(group.model)] for group, _ in found])
    return decode_mixed_rows(list(models.values()), model_R, blobs, [group.labels(row) for group, row in found])


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
