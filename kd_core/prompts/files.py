"""Rows of JSONL, JSON and Parquet files: one local file, a local glob, or the same in an S3 bucket.

Owns finding the files, reading them and saying where in them something is wrong. It refuses to guess a format: the
name's ending decides.
"""

import fnmatch
import glob
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.errors import SourceError
from kd_core.prompts.rows import RawRow
from kd_core.prompts.templates import Template, fill
from kd_core.recipe import S3Options

if TYPE_CHECKING:
    from kd_core.store import Store

__all__ = ["SourceFile", "file_rows", "file_sha256", "find_source_files"]

_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: its address for messages, its base name, and how to open it for reading."""

    address: str
    name: str
    open: Callable[[], io.BufferedIOBase]


def find_source_files(path: str, *, where: str, s3: S3Options) -> list[SourceFile]:
    """The files behind a path, a glob or an s3:// address, sorted by address.

    Args:
        path: `FileSource.path`.
        where: the recipe's path to the source, for messages.
        s3: how to reach s3:// addresses.

    Raises:
        SourceError: there is none, or one ends in anything but .jsonl, .json or .parquet.
        StoreError: the bucket cannot be reached.
    """
    files = _find_in_bucket(path, s3) if path.startswith("s3://") else _find_local(path)
    if not files:
        raise SourceError(f"{where}.path: no file at {path!r}; put one there, or name another with --set {where}.path=...")
    for file in files:
        if PurePosixPath(file.name).suffix not in _READERS:
            raise SourceError(f"{where}.path: {file.address} ends in none of {', '.join(_READERS)}, which are the formats that can be read")
    return files


def _find_local(path: str) -> list[SourceFile]:
    base = Path(path).expanduser()
    paths = [base]
    if not base.exists() and _WILDCARDS & set(path):
        paths = [Path(name) for name in sorted(glob.glob(str(base), recursive=True))]
    return [SourceFile(str(file), file.name, partial(_open_path, file)) for file in paths if file.is_file()]


def _find_in_bucket(address: str, s3: S3Options) -> list[SourceFile]:
    from kd_core.store import open_bucket

    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket or not key:
        return []
    store = open_bucket(bucket, s3)
    first_wildcard = min((i for i, character in enumerate(key) if character in _WILDCARDS), default=None)
    if first_wildcard is None:
        keys = [key] if store.info(key) is not None else []
    else:
        listed = [info.key for info in store.list(key[:first_wildcard])]
        keys = [key] if key in listed else [found for found in listed if _matches(found.split("/"), key.split("/"))]
    return [SourceFile(f"s3://{bucket}/{k}", PurePosixPath(k).name, partial(_open_object, store, k)) for k in keys]


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


def _open_path(path: Path) -> io.BufferedReader:
    return path.open("rb")


def _open_object(store: "Store", key: str) -> io.BytesIO:
    return io.BytesIO(store.get(key))


def file_sha256(file: SourceFile) -> str:
    """sha256 of a file's content, 64 hex digits."""
    with file.open() as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_rows(file: SourceFile, *, prompt: Template, gold: Template | None, reference: Template | None) -> Iterator[RawRow]:
    """All rows of one file through the source's templates.

    Raises:
        SourceError: with file and line (or row), for what cannot be read or lacks a column.
    """
    columns = [column for template in (prompt, gold, reference) if template for column in template.columns]
    with file.open() as stream:
        for at, row in _READERS[PurePosixPath(file.name).suffix](stream, file.address, columns):
            yield RawRow(at, fill(prompt, row, at=at), fill(gold, row, at=at), fill(reference, row, at=at))


_Located = Iterator[tuple[str, Mapping[str, Any]]]


def _read_jsonl(stream: io.BufferedIOBase, address: str, columns: list[str]) -> _Located:
    for number, line in enumerate(stream, start=1):
        at = f"{address}:{number}"
        if line.strip():
            yield at, _object(_decode(line, at), at)


def _read_json(stream: io.BufferedIOBase, address: str, columns: list[str]) -> _Located:
    rows = _decode(stream.read(), address)
    if not isinstance(rows, list):
        raise SourceError(
            f"{address}: expected a JSON list of objects, found a {type(rows).__name__}; one object a line belongs in a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        at = f"{address} row {number}"
        yield at, _object(row, at)


def _read_parquet(stream: io.BufferedIOBase, address: str, columns: list[str]) -> _Located:
    try:
        file = pq.ParquetFile(stream)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{address}: not a readable Parquet file: {error}") from error
    names = file.schema_arrow.names
    wanted = columns if set(columns) <= set(names) else names  # all of them, so that the message can list them
    number = 0
    for batch in file.iter_batches(columns=list(dict.fromkeys(wanted))):
        for row in batch.to_pylist():
            number += 1
            yield f"{address} row {number}", row


_READERS: dict[str, Callable[[io.BufferedIOBase, str, list[str]], _Located]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _decode(data: bytes, at: str) -> object:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except ValueError as error:  # both UnicodeDecodeError and JSONDecodeError
        raise SourceError(f"{at}: not valid JSON in UTF-8: {error}") from error


def _object(row: object, at: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{at}: expected a JSON object with columns, found {str(row)[:80]!r}")
    return row
