"""SQL on the bucket itself: DuckDB over committed shards, read through Arrow in ranges of the columns that are asked for.

Views: ``soft_labels``, ``answers`` and ``hidden_states`` (rows of all namespaces, each row once, with namespace, teacher, policy, shard),
``commits`` and ``namespaces``. Only one SELECT is run: nothing can be written, and no other file can be read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from kd_core.cache.catalog import Namespace, losing_rows, namespaces
from kd_core.errors import IntegrityError
from kd_core.rows.schemas import ROW_TABLES
from kd_core.store import Store
from kd_core.store.arrow import StoreFiles, arrow_file_system

__all__ = ["VIEWS", "Answer", "sql"]

_SHARED = [pa.field("namespace", pa.string()), pa.field("teacher", pa.string()), pa.field("policy", pa.string())]
_PLACE = [*_SHARED, pa.field("shard", pa.string())]
VIEWS = {
    **{table: pa.schema([*_PLACE, *schema]) for table, schema in ROW_TABLES.items()},
    "commits": pa.schema(
        [
            pa.field("namespace", pa.string()),
            pa.field("table_name", pa.string()),
            pa.field("sha256", pa.string()),
            pa.field("bytes", pa.int64()),
            pa.field("rows", pa.int64()),
            pa.field("tokens", pa.int64()),
        ]
    ),
    "namespaces": pa.schema(
        [
            *_SHARED,
            pa.field("table_name", pa.string()),
            pa.field("commits", pa.int64()),
            pa.field("rows", pa.int64()),
            pa.field("duplicate_rows", pa.int64()),
            pa.field("tokens", pa.int64()),
            pa.field("bytes", pa.int64()),
            pa.field("modified", pa.timestamp("s", "UTC")),
        ]
    ),
}
"""Columns of each view."""

_READING = "reading the stream registered as"  # DuckDB's words for an error that came out of Arrow
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class Answer:
    """Result of a query: column names, and its rows, fetched as they are asked for."""

    columns: tuple[str, ...]
    rows: Iterator[Sequence[Any]]


@contextmanager
def sql(store: Store, statement: str) -> Iterator[Answer]:
    """Run one SELECT on the views of a store.

    Raises:
        ValueError: the statement is not one valid SELECT; one line.
        StoreError: the store failed.
        IntegrityError: a shard, commit or description is damaged.
    """
    found = namespaces(store)
    connection = duckdb.connect()
    try:
        files = [_add_rows(connection, store, found, table) for table in ROW_TABLES]
        connection.register("commits", pa.Table.from_pylist(_commit_rows(found), VIEWS["commits"]))
        connection.register("namespaces", pa.Table.from_pylist(_namespace_rows(found), VIEWS["namespaces"]))
        for setting in ("enable_external_access = false", "python_enable_replacements = false", "lock_configuration = true"):
            connection.execute(f"SET {setting}")
        with _errors(store, files):
            _check(connection, statement)
            connection.execute(statement)
            yield Answer(tuple(column[0] for column in connection.description or ()), _rows(connection))
    finally:
        connection.close()


def _check(connection: duckdb.DuckDBPyConnection, statement: str) -> None:
    statements = connection.extract_statements(statement)
    if [s.type for s in statements] != [duckdb.StatementType.SELECT]:
        raise ValueError("one SELECT is expected: the cache is read, never written")


def _rows(connection: duckdb.DuckDBPyConnection) -> Iterator[Sequence[Any]]:
    while rows := connection.fetchmany(_BATCH_ROWS):
        yield from rows


@contextmanager
def _errors(store: Store, files: Sequence[StoreFiles]) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        cause = next((f.error for f in files if f.error is not None), None)
        if cause is not None:
            raise cause from error
        line = " ".join(str(error).split())
        if _READING in line:
            raise IntegrityError(f"{store.uri}: a shard cannot be read ({line}); kd cache verify names it") from error
        raise ValueError(line) from error


def _add_rows(connection: duckdb.DuckDBPyConnection, store: Store, found: Sequence[Namespace], table: str) -> StoreFiles:
    """Register a table's committed shards, and its view, in which a row stands once."""
    mine = [namespace for namespace in found if namespace.cache.table == table]
    sizes = {n.cache.shard_key(commit): commit.size_bytes for n in mine for commit in n.snapshot.commits}
    file_system, files = arrow_file_system(store, sizes)
    parquet = ds.ParquetFileFormat(default_fragment_scan_options=ds.ParquetFragmentScanOptions(pre_buffer=True))
    fragments = [
        parquet.make_fragment(n.cache.shard_key(commit), file_system, partition_expression=_same_for_all(n, commit.sha256))
        for n in mine
        for commit in n.snapshot.commits
    ]
    connection.register(f"_{table}", ds.FileSystemDataset(fragments, VIEWS[table], parquet, file_system))
    lost = [(n.cache.namespace, shard, key) for n in mine for key, shard in losing_rows(n.snapshot)]
    without = ""
    if lost:
        columns = zip(*lost, strict=True)
        connection.register(f"_{table}_duplicates", pa.table([pa.array(c, pa.string()) for c in columns], ["namespace", "shard", "key"]))
        without = f" ANTI JOIN _{table}_duplicates USING (namespace, shard, key)"
    connection.execute(f"CREATE VIEW {table} AS SELECT * FROM _{table}{without}")
    return files


def _same_for_all(namespace: Namespace, shard: str) -> ds.Expression:
    """Expression of what is the same in all rows of a shard: columns that cost no bytes, and by which whole shards are left out."""
    known = {"namespace": namespace.cache.namespace, "shard": shard, "teacher": namespace.teacher, "policy": namespace.policy}
    same = ds.scalar(True)
    for name, value in known.items():
        if value is not None:
            same = same & (ds.field(name) == value)
    return same


def _commit_rows(found: Sequence[Namespace]) -> list[dict[str, Any]]:
    return [
        {
            "namespace": n.cache.namespace,
            "table_name": n.cache.table,
            "sha256": commit.sha256,
            "bytes": commit.size_bytes,
            "rows": len(commit.keys),
            "tokens": commit.num_tokens,
        }
        for n in found
        for commit in n.snapshot.commits
    ]


def _namespace_rows(found: Sequence[Namespace]) -> list[dict[str, Any]]:
    return [
        {
            "namespace": n.cache.namespace,
            "teacher": n.teacher,
            "policy": n.policy,
            "table_name": n.cache.table,
            "commits": len(n.snapshot.commits),
            "rows": n.num_rows,
            "duplicate_rows": n.num_duplicates,
            "tokens": n.num_tokens,
            "bytes": n.snapshot.size_bytes(),
            "modified": int(n.modified_seconds),
        }
        for n in found
    ]
