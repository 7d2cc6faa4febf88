"""Figures of one row table: where its bytes go, what its rows are like, what lies about unused.

Reads footers and small plain columns, never targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.cache.catalog import Namespace
from kd_core.cache.query import sql
from kd_core.errors import IntegrityError
from kd_core.progress import Tick, Ticker, silent
from kd_core.rows.schemas import CODEC_MODEL, ROW_TABLES
from kd_core.store.arrow import arrow_file_system

__all__ = ["Bin", "Figures", "figures"]

BIN_NATS = 0.5
"""Width of an entropy bin."""


@dataclass(frozen=True)
class Bin:
    """Rows with a mean entropy in [low, high) nats, and their supervised tokens."""

    low: float
    high: float
    rows: int
    tokens: int


@dataclass(frozen=True)
class Figures:
    """Figures of a row table.

    Attributes:
        rows: distinct rows.
        tokens: supervised (or generated) tokens in all shards, duplicates included.
        bytes_by_part: Parquet column, 'codec_model' (in the footer) or 'footer' (the rest) -> stored bytes; they add up to all shards.
        entropy: histogram over rows, empty bins left out; empty for a table without entropies.
        finish_reasons: reason -> rows.
        duplicate_rows: rows that another shard holds too.
        orphan_shards: shards without a commit, and their bytes below.
        orphan_bytes: as above.
    """

    rows: int
    tokens: int
    bytes_by_part: Mapping[str, int]
    entropy: tuple[Bin, ...]
    finish_reasons: Mapping[str, int]
    duplicate_rows: int
    orphan_shards: int
    orphan_bytes: int


def figures(namespace: Namespace, *, tick: Ticker = silent) -> Figures:
    """Compute the figures of one namespace.

    Raises:
        StoreError: a shard is gone or the store failed.
        IntegrityError: a shard cannot be read.
    """
    cache = namespace.cache
    reached = {cache.shard_key(commit) for commit in namespace.snapshot.commits}
    orphans = [info.size_bytes for info in cache.store.list(f"{cache.prefix}/shards/") if info.key not in reached]
    return Figures(
        namespace.num_rows,
        namespace.num_tokens,
        _bytes_by_part(namespace, tick),
        _entropy(namespace) if cache.table == "soft_labels" else (),
        _finish_reasons(namespace) if cache.table in ROW_TABLES else {},
        namespace.num_duplicates,
        len(orphans),
        sum(orphans),
    )


def _bytes_by_part(namespace: Namespace, tick: Ticker) -> dict[str, int]:
    cache, commits = namespace.cache, namespace.snapshot.commits
    files, _ = arrow_file_system(cache.store, {cache.shard_key(commit): commit.size_bytes for commit in commits})
    parts: dict[str, int] = {}
    for done, commit in enumerate(commits, 1):
        key = cache.shard_key(commit)
        try:
            footer = pq.read_metadata(key, filesystem=files)
        except pa.ArrowInvalid as error:
            raise IntegrityError(f"{cache.store.uri}/{key}: its footer cannot be read; kd cache repair moves it aside") from error
        mine: dict[str, int] = {}
        for group in map(footer.row_group, range(footer.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                name = column.path_in_schema.partition(".")[0]
                mine[name] = mine.get(name, 0) + int(column.total_compressed_size)
        mine["codec_model"] = len((footer.metadata or {}).get(CODEC_MODEL, b""))
        mine["footer"] = commit.size_bytes - sum(mine.values())
        parts = {name: parts.get(name, 0) + mine.get(name, 0) for name in [*parts, *(n for n in mine if n not in parts)]}
        tick(Tick(done, len(commits), "shards"))
    return parts


def _entropy(namespace: Namespace) -> tuple[Bin, ...]:
    statement = (
        f"SELECT CAST(floor(mean_entropy / {BIN_NATS}) AS INTEGER) AS bin, count(*), sum(num_supervised) FROM soft_labels "
        f"WHERE namespace = '{namespace.cache.namespace}' GROUP BY bin ORDER BY bin"
    )
    with sql(namespace.cache.store, statement) as answer:
        return tuple(Bin(at * BIN_NATS, (at + 1) * BIN_NATS, rows, int(tokens)) for at, rows, tokens in answer.rows)


def _finish_reasons(namespace: Namespace) -> dict[str, int]:
    statement = (
        f"SELECT finish_reason AS reason, count(*) AS n FROM {namespace.cache.table} "
        f"WHERE namespace = '{namespace.cache.namespace}' GROUP BY reason ORDER BY n DESC, reason"
    )
    with sql(namespace.cache.store, statement) as answer:
        return {str(reason): int(count) for reason, count in answer.rows}
