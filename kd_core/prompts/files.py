"""Files of sources: one local file, a local glob, or the same in an S3 bucket, and the content hash of each.

An object of a bucket is downloaded once a process (`kd_core.prompts.fetched`), whoever reads it: its hash, its rows, a graph that
is drawn again.
"""

import fnmatch
import glob
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from kd_core.errors import SourceError
from kd_core.prompts.fetched import open_fetched
from kd_core.prompts.readers import READERS, format_of, read_rows
from kd_core.recipe import S3Options

__all__ = ["SourceFile", "file_rows", "file_sha256", "find_source_files", "local_file"]

_WILDCARDS = frozenset("*?[")


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
        if format_of(file.name) not in READERS:
            raise SourceError(f"{where}.path: {file.address} ends in none of {', '.join(READERS)}, which are the formats that can be read")
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
    states = [(s3.endpoint, bucket, info) for info in found]
    return [
        SourceFile(f"s3://{bucket}/{info.key}", PurePosixPath(info.key).name, state, partial(open_fetched, store, info, state))
        for info, state in zip(found, states, strict=True)
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


def _open_path(path: Path) -> io.BufferedReader:
    return path.open("rb")


_digests: dict[tuple[object, ...], str] = {}


def file_sha256(file: SourceFile) -> str:
    """sha256 of a file's content, 64 hex digits. A file is read once in a process, as long as its state stays what it was."""
    where = (file.address, *file.state)
    if where not in _digests:
        with file.open() as stream:
            _digests[where] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _digests[where]


def file_rows(file: SourceFile, columns: list[str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read (file and line, row) of all rows of one file; a row is column name -> text, None, list or mapping.

    Args:
        file: one that ``find_source_files`` found.
        columns: those that are needed, None: all; other columns of a Parquet file are read only where one of these is not there.

    Raises:
        SourceError: with file and line (or row), for what cannot be read.
    """
    with file.open() as stream:
        yield from read_rows(stream, format_of(file.name), file.address, columns)
