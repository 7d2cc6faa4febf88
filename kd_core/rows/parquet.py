"""The bytes of one shard: Parquet in row groups that can be fetched, verified and read one by one.

A column of targets or states holds packed binary and is stored as it is; plain columns beside it are compressed, so that a query
engine reads them in place. Token ids go by byte (their high bytes are alike), which zstd makes a third of their size. Every
byte belongs to exactly one range with its own sha256: a row group, or the footer.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.fingerprint import sha256_bytes

__all__ = ["GROUP_ROWS", "ByteRange", "parse_shard", "read_footer", "read_group", "write_shard"]

GROUP_ROWS = 64
"""Rows a row group: what one range read brings. 0.1 to 3 MB of soft labels."""
_PACKED = ("targets", "states")


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, start + length) of a shard, their sha256 (64 hex), and the rows they hold; the footer holds none."""

    start: int
    length: int
    sha256: str
    num_rows: int

    def verified(self, data: bytes) -> bytes | None:
        """Give the bytes back if they are this range's, else None."""
        return data if sha256_bytes(data) == self.sha256 else None


def write_shard(rows: pa.Table, metadata: Mapping[bytes, bytes]) -> tuple[bytes, tuple[ByteRange, ...]]:
    """Make rows into Parquet, and the ranges that cover it. The same rows give the same bytes.

    Args:
        rows: any table.
        metadata: key-value pairs for the footer.
    """
    buffer = io.BytesIO()
    ids = [f"{field.name}.list.element" for field in rows.schema if field.type == pa.list_(pa.int32())]
    plain = [name for name in rows.column_names if name not in (*_PACKED, "key")]  # statistics of the others say nothing
    options = {
        "compression": {**{name: "none" if name in _PACKED else "zstd" for name in rows.column_names}, **dict.fromkeys(ids, "zstd")},
        "column_encoding": dict.fromkeys(ids, "BYTE_STREAM_SPLIT"),
        "use_dictionary": plain,
        "write_statistics": plain,
        "store_schema": False,
    }
    with pq.ParquetWriter(buffer, rows.schema, **options) as writer:
        writer.write_table(rows, row_group_size=GROUP_ROWS)
        if metadata:
            writer.add_key_value_metadata(dict(metadata))
    data = buffer.getvalue()
    footer = pq.read_metadata(io.BytesIO(data))
    starts = [0, *(_group_end(footer.row_group(i)) for i in range(footer.num_row_groups)), len(data)]
    counts = [*(footer.row_group(i).num_rows for i in range(footer.num_row_groups)), 0]
    ranges = (
        ByteRange(start, end - start, sha256_bytes(data[start:end]), count)
        for start, end, count in zip(starts, starts[1:], counts, strict=False)
    )
    return data, tuple(ranges)


def _group_end(group: Any) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    return max(_column_start(column) + int(column.total_compressed_size) for column in columns)


def _column_start(column: Any) -> int:
    return int(column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset)


def parse_shard(data: bytes) -> pa.Table:
    """Read all rows of a whole shard."""
    return pq.read_table(io.BytesIO(data))


def read_footer(data: bytes) -> Any:
    """Read Parquet metadata from the bytes of the footer's range."""
    return pq.read_metadata(io.BytesIO(data))


def read_group(footer: Any, index: int, part: ByteRange, data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the rows of one row group from its own bytes alone; those of ``columns`` that there are, None for all."""
    file = pq.ParquetFile(_Window(part.start, data), metadata=footer, pre_buffer=False)  # it is at hand: no thread need read it ahead
    return file.read_row_group(index, columns=columns, use_threads=False)


class _Window(io.RawIOBase):
    """A file of which only one range is at hand; Parquet asks for nothing else."""

    def __init__(self, start: int, data: bytes) -> None:
        self._start, self._data, self._at = start, memoryview(data), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        ends = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._start + len(self._data)}
        self._at = ends[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> Any:
        """Give a view: Parquet copies what it needs."""
        begin = self._at - self._start
        assert 0 <= begin <= begin + size <= len(self._data), f"{size} bytes at {self._at} are outside the range"
        self._at += size
        return self._data[begin : begin + size]
