"""Rows of JSONL, JSON, CSV, TSV and Parquet files: one local file, a local glob, or the same in an S3 bucket.

Owns finding the files, reading them within bounds and saying where in them something is wrong. It refuses to guess a format:
the name's ending decides, after a .gz that may follow it. Text that is compressed by gzip is read, whatever its name.
"""

import csv
import fnmatch
import glob
import gzip
import hashlib
import io
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.errors import SourceError
from kd_core.prompts.rows import RawRow
from kd_core.prompts.templates import Template, fill
from kd_core.prompts.values import after_space, batch_rows, decode_json, decode_json_at
from kd_core.recipe import S3Options

if TYPE_CHECKING:
    from kd_core.store import Store

__all__ = ["SourceFile", "file_rows", "file_sha256", "find_source_files", "local_file"]

_WILDCARDS = frozenset("*?[")
_GZIP = b"\x1f\x8b"
_COMPRESSIONS = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"PK\x03\x04": "zip"}
_MAX_LINE_BYTES = 64 * 2**20
_MAX_JSON_BYTES = 2**30
_SMALL_BYTES = 64 * 2**20
_MAX_EXPANSION = 200
_BATCH_ROWS = 1024

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Attributes:
        address: for messages.
        name: base name.
        state: changes when the content does: size and time of a local file, size, time and ETag of an object.
        open: opens it for reading.
    """

    address: str
    name: str
    state: tuple[object, ...]
    open: Callable[[], io.BufferedIOBase]


def find_source_files(path: str, *, where: str, s3: S3Options) -> list[SourceFile]:
    """The files behind a path, a glob or an s3:// address, sorted by address.

    Args:
        path: `FileSource.path`.
        where: the recipe's path to the source, for messages.
        s3: how to reach s3:// addresses.

    Raises:
        SourceError: there is none, or one is of no format that can be read.
        StoreError: the bucket cannot be reached.
    """
    files = _find_in_bucket(path, s3) if path.startswith("s3://") else _find_local(path)
    if not files:
        raise SourceError(f"{where}.path: no file at {path!r}; put one there, or name another with --set {where}.path=...")
    for file in files:
        if _format(file.name) not in _READERS:
            raise SourceError(f"{where}.path: {file.address} ends in none of {', '.join(_READERS)}, which are the formats that can be read")
    return files


def _find_local(path: str) -> list[SourceFile]:
    base = Path(path).expanduser()
    paths = [base]
    if not base.exists() and _WILDCARDS & set(path):
        paths = [Path(name) for name in sorted(glob.glob(str(base), recursive=True))]
    return [local_file(file) for file in paths if file.is_file()]


def local_file(path: Path) -> SourceFile:
    """A file on this machine."""
    return SourceFile(str(path), path.name, _state_of(path), partial(_open_path, path))


def _state_of(file: Path) -> tuple[object, ...]:
    status = file.stat()
    return str(file.absolute()), status.st_size, status.st_mtime_ns


def _find_in_bucket(address: str, s3: S3Options) -> list[SourceFile]:
    from kd_core.store import open_bucket

    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket or not key:
        return []
    store = open_bucket(bucket, s3)
    first_wildcard = min((i for i, character in enumerate(key) if character in _WILDCARDS), default=None)
    if first_wildcard is None:
        found = [] if (info := store.info(key)) is None else [info]
    else:
        listed = {info.key: info for info in store.list(key[:first_wildcard])}
        found = [listed[key]] if key in listed else [i for i in listed.values() if _matches(i.key.split("/"), key.split("/"))]
    return [
        SourceFile(f"s3://{bucket}/{info.key}", PurePosixPath(info.key).name, (s3.endpoint, info), partial(_open_object, store, info.key))
        for info in found
    ]


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Whether a key fits a pattern, part by part, as glob does for local files.

    '*' stays within one part, '**' is any number of parts, and names that begin with a dot are for patterns that do.
    """
    if not patterns:
        return not parts
    first, rest = patterns[0], patterns[1:]
    if first == "**" and not rest:
        return bool(parts) and not any(part.startswith(".") for part in parts)
    if first == "**":
        return _matches(parts, rest) or (bool(parts) and not parts[0].startswith(".") and _matches(parts[1:], patterns))
    if not parts or (parts[0].startswith(".") and not first.startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


def _format(name: str) -> str:
    return PurePosixPath(name.removesuffix(".gz")).suffix


def _open_path(path: Path) -> io.BufferedReader:
    return path.open("rb")


def _open_object(store: "Store", key: str) -> io.BytesIO:
    return io.BytesIO(store.get(key))


_digests: dict[tuple[object, ...], str] = {}


def file_sha256(file: SourceFile) -> str:
    """sha256 of a file's content, 64 hex digits. A file is read once in a process, as long as its state stays what it was."""
    where = (file.address, *file.state)
    if where not in _digests:
        with file.open() as stream:
            _digests[where] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[where]


def file_rows(file: SourceFile, *, prompt: Template, gold: Template | None, reference: Template | None) -> Iterator[RawRow]:
    """All rows of one file through the source's templates.

    Raises:
        SourceError: with file and line (or row), for what cannot be read or lacks a column.
    """
    columns = [column for template in (prompt, gold, reference) if template for column in template.columns]
    kind = _format(file.name)
    with file.open() as stream:
        rows = _READERS[kind](stream if kind == ".parquet" else _decompressed(stream, file.address), file.address, columns)
        for at, row in rows:
            yield RawRow(at, fill(prompt, row, at=at), fill(gold, row, at=at), fill(reference, row, at=at))


_Located = Iterator[tuple[str, Mapping[str, Any]]]


def _decompressed(stream: io.BufferedIOBase, address: str) -> io.BufferedIOBase:
    """The text behind gzip, whatever the file's name; another compression is refused by name."""
    start = stream.read(max(map(len, _COMPRESSIONS)))
    stream.seek(0)
    for magic, name in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise SourceError(f"{address}: it is compressed by {name}; decompress it, or compress it by gzip")
    return cast(io.BufferedIOBase, gzip.GzipFile(fileobj=stream)) if start.startswith(_GZIP) else stream


@contextmanager
def _reading(at: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise SourceError(f"{at}: not valid UTF-8: {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{at}: damaged gzip: {error}; copy the file again") from error


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


def _read_jsonl(stream: io.BufferedIOBase, address: str, columns: list[str]) -> _Located:
    for number, line in enumerate(_lines(stream, address), start=1):
        at = f"{address}:{number}"
        if line.strip():
            yield at, _object(_decoded(partial(decode_json, line), at), at)


def _read_json(stream: io.BufferedIOBase, address: str, columns: list[str]) -> _Located:
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


def _read_csv(stream: io.BufferedIOBase, address: str, columns: list[str], *, delimiter: str = ",") -> _Located:
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


def _read_parquet(stream: io.BufferedIOBase, address: str, columns: list[str]) -> _Located:
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


def _parquet_batches(stream: io.BufferedIOBase, address: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches in which a text that stands in many rows is in memory once."""
    file = pq.ParquetFile(stream)
    schema = file.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        raise SourceError(f"{address}: a column's name stands twice: {', '.join(map(repr, schema.names))}")
    wanted = list(dict.fromkeys(columns)) if set(columns) <= set(schema.names) else schema.names  # all, so that a message can list them
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


_READERS: dict[str, Callable[[io.BufferedIOBase, str, list[str]], _Located]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
}


def _decoded(decode: Callable[[], _Value], at: str) -> _Value:
    try:
        return decode()
    except ValueError as error:
        raise SourceError(f"{at}: not valid JSON: {error}") from error


def _object(row: object, at: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{at}: expected a JSON object with columns, found {str(row)[:80]!r}")
    return row
