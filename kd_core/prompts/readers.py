"""Rows of JSONL, JSON, CSV, TSV and Parquet, read within bounds, each with the place where it stands.

It refuses to guess a format: the name's ending decides, before a .gz or .zst that may follow it. What is compressed by gzip or
zstd is read, whatever its name; Parquet, which is read from its end, is first decompressed into a scratch file.
"""

import csv
import gzip
import io
import itertools
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.errors import SourceError
from kd_core.prompts.values import after_space, batch_rows, decode_json, decode_json_at
from kd_core.store.scratch import scratch

__all__ = ["READERS", "format_of", "read_rows"]

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_REFUSED = {b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip"}
_MAX_LINE_BYTES = 64 * 2**20
_MAX_JSON_BYTES = 2**30
_SMALL_BYTES = 64 * 2**20
_MAX_EXPANSION = 200
_BATCH_ROWS = 1024

_Value = TypeVar("_Value")
_Located = Iterator[tuple[str, Mapping[str, Any]]]


def format_of(name: str) -> str:
    """The ending that says a file's format.

    >>> format_of("train.jsonl"), format_of("train.csv.zst")
    ('.jsonl', '.csv')
    """
    return PurePosixPath(name.removesuffix(".gz").removesuffix(".zst")).suffix


def read_rows(stream: io.BufferedIOBase, kind: str, address: str, columns: list[str] | None) -> _Located:
    """Rows of an open file, each with file and line (or row).

    Args:
        stream: the file as it is stored.
        kind: one of READERS.
        address: the file's, for messages.
        columns: those that are needed; None: all.

    Raises:
        SourceError: it is damaged, or of another form than its name says.
    """
    plain = _decompressed(stream, address)
    if kind != ".parquet" or plain is stream:
        yield from READERS[kind](plain, address, columns)
        return
    with scratch() as folder:
        with _reading(address), (folder / "plain").open("wb") as file:
            shutil.copyfileobj(plain, file, 2**20)
        with (folder / "plain").open("rb") as file:
            yield from READERS[kind](file, address, columns)


def _decompressed(stream: io.BufferedIOBase, address: str) -> io.BufferedIOBase:
    """The content behind gzip or zstd; another compression is refused by name."""
    start = stream.read(8)
    stream.seek(0)
    for magic, name in _REFUSED.items():
        if start.startswith(magic):
            raise SourceError(f"{address}: it is compressed by {name}; decompress it, or compress it by gzip or zstd")
    if start.startswith(_GZIP):
        return cast(io.BufferedIOBase, gzip.GzipFile(fileobj=stream))
    if start.startswith(_ZSTD):
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(stream, "r"), "zstd"), 2**20)
    return stream


@contextmanager
def _reading(at: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise SourceError(f"{at}: not valid UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{at}: damaged gzip: {error}; copy the file again") from error
    except OSError as error:
        raise SourceError(f"{at}: cannot be read: {error}; copy the file again") from error


def _lines(stream: io.BufferedIOBase, address: str) -> Iterator[str]:
    for number in itertools.count(1):
        with _reading(f"{address}:{number}"):
            line = stream.readline(_MAX_LINE_BYTES + 1)
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        if len(line) > _MAX_LINE_BYTES:
            raise SourceError(f"{address}:{number}: a line of more than {_MAX_LINE_BYTES:,} bytes, which is no row of prompts")
        if not line:
            return
        yield text


def _read_jsonl(stream: io.BufferedIOBase, address: str, columns: list[str] | None) -> _Located:
    for number, line in enumerate(_lines(stream, address), start=1):
        at = f"{address}:{number}"
        if line.strip():
            yield at, _object(_decoded(partial(decode_json, line), at), at)


def _read_json(stream: io.BufferedIOBase, address: str, columns: list[str] | None) -> _Located:
    text = _whole_text(stream, address)
    place = after_space(text, 0)
    if text[place : place + 1] != "[":
        found = type(_decoded(lambda: decode_json(text), address)).__name__
        raise SourceError(f"{address}: expected a JSON list of objects, found a {found}; one object a line belongs in a .jsonl file")
    number, line, counted = 0, 1, 0
    place = after_space(text, place + 1)
    more = text[place : place + 1] != "]"
    while more:
        number, line, counted = number + 1, line + text.count("\n", counted, place), place
        at = f"{address} row {number} (line {line})"
        row, place = _decoded(partial(decode_json_at, text, place), at)
        yield at, _object(row, at)
        more = text[place : place + 1] == ","
        place = after_space(text, place + 1) if more else place
    if text[place : place + 1] != "]" or after_space(text, place + 1) < len(text):
        raise SourceError(
            f"{address}: not valid JSON after row {number}: found {text[place : place + 40]!r}, expected one list and its end"
        )


def _whole_text(stream: io.BufferedIOBase, address: str) -> str:
    with _reading(address):
        data = stream.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise SourceError(f"{address}: more than {_MAX_JSON_BYTES:,} bytes of JSON in one value; write one object a line, as .jsonl")
        return data.decode("utf-8-sig")


def _read_csv(stream: io.BufferedIOBase, address: str, columns: list[str] | None, *, delimiter: str = ",") -> _Located:
    reader = csv.reader(_lines(stream, address), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        at = f"{address}:{reader.line_num + 1}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise SourceError(f"{at}: not valid CSV: {error}") from error
        if fields is None:
            return
        if names is None:
            names = fields
            if len(set(names)) < len(names):
                raise SourceError(f"{at}: a column's name stands twice in the first line: {', '.join(map(repr, names))}")
        elif fields:
            if len(fields) != len(names):
                raise SourceError(f"{at}: {len(fields)} fields, and the first line names {len(names)} columns")
            yield at, dict(zip(names, fields, strict=True))


def _read_parquet(stream: io.BufferedIOBase, address: str, columns: list[str] | None) -> _Located:
    number = 0
    batches = _parquet_batches(stream, address, columns)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{address}: not a readable Parquet file: {error}") from error
        if batch is None:
            return
        for row in batch_rows(batch):
            number += 1
            yield f"{address} row {number}", row


def _parquet_batches(stream: io.BufferedIOBase, address: str, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Batches in which a text that stands in many rows is in memory once."""
    file = pq.ParquetFile(stream)
    schema = file.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        raise SourceError(f"{address}: a column's name stands twice: {', '.join(map(repr, schema.names))}")
    wanted = schema.names  # where one is not there too, so that a message can list them
    if columns is not None and set(columns) <= set(schema.names):
        wanted = list(dict.fromkeys(columns))
    for i in range(file.num_row_groups):
        group = file.metadata.row_group(i)
        for chunk in (group.column(j) for j in range(group.num_columns)):
            size = chunk.total_uncompressed_size
            if chunk.path_in_schema.partition(".")[0] in wanted and size > max(_SMALL_BYTES, _MAX_EXPANSION * chunk.total_compressed_size):
                raise SourceError(
                    f"{address}: {chunk.total_compressed_size:,} bytes of column {chunk.path_in_schema!r} become {size:,}, which is no "
                    f"text of prompts; at most {_MAX_EXPANSION} times as many are read"
                )
    texts = [name for name in wanted if pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)]
    yield from pq.ParquetFile(stream, read_dictionary=texts).iter_batches(batch_size=_BATCH_ROWS, columns=wanted)


def _decoded(decode: Callable[[], _Value], at: str) -> _Value:
    try:
        return decode()
    except ValueError as error:
        raise SourceError(f"{at}: not valid JSON: {error}") from error


def _object(row: object, at: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{at}: expected a JSON object with columns, found {str(row)[:80]!r}")
    return row


READERS: dict[str, Callable[[io.BufferedIOBase, str, list[str] | None], _Located]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}
