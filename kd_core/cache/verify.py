"""Check that every row in the store is what was committed. Reads all, or a random sample of shards; changes nothing.

For each row table: its description and commits are readable; each shard is there with the bytes of its commit, range by
range; its rows are the commit's rows; each row of soft labels (or hidden states) has the key that its tokens give, decodes, has as many
positions as its tokens say, and ids inside the vocabulary. For each record that froze rows: it is readable, its files are
as recorded, and every row it names is in a commit. What is found is named with the objects that must go with it, so that
``repair`` needs no second look. What is of another version is no damage: a VersionError ends the check.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.artifacts import Record, find, read_bytes
from kd_core.cache.catalog import about, row_caches
from kd_core.cache.explode import decode_rows_of, entries, gold_labels
from kd_core.errors import IntegrityError, KDError, SoftLabelError, StoreError, VersionError
from kd_core.fingerprint import sha256_bytes
from kd_core.progress import Tick, Ticker, silent
from kd_core.rows.keys import soft_label_key
from kd_core.rows.parquet import parse_shard
from kd_core.rows.table import Commit, RowCache
from kd_core.softlabels.hidden import decode_states
from kd_core.store import Store

__all__ = ["Damage", "Verified", "frozen_records", "verify"]

FREEZING_STAGES = ("answers", "soft_labels", "hidden_states")
"""Stages whose records name rows; their tables have the same names."""
_ROWS = 16
"""Rows decoded together."""


@dataclass(frozen=True)
class Damage:
    """One damaged object.

    Attributes:
        key: its object key.
        reason: what is wrong with it.
        shard: checksum of the shard whose rows are lost with it; None where it is not known or no rows are lost.
        also: keys of the objects that mean nothing without it: the commit of a shard.
    """

    key: str
    reason: str
    shard: str | None = None
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verified:
    """Result of a check: what was looked at, and what was found.

    Attributes:
        commits: commits read.
        shards: of their shards, how many were read whole.
        rows: rows in those shards.
        records: records that name rows.
        damage: sorted by key.
    """

    commits: int
    shards: int
    rows: int
    records: int
    damage: tuple[Damage, ...]


def verify(store: Store, *, sample: float = 1.0, tick: Ticker = silent) -> Verified:
    """Check the row tables of a store and the records that name their rows.

    Args:
        store: where.
        sample: share of the shards that are read, in (0, 1]; drawn anew each time, at least one of each table. Commits and
            records are always read.
        tick: progress, in shards.

    Raises:
        VersionError: something is of another version.
    """
    damage: list[Damage] = []
    picked: list[tuple[RowCache, Commit]] = []
    held: dict[tuple[str, str], set[str]] = {}
    num_commits = 0
    for cache in row_caches(store):
        damage += _description(cache)
        commits, broken = _commits(cache)
        damage += broken
        num_commits += len(commits)
        held[cache.table, cache.namespace] = {key for commit in commits for key in commit.keys}
        count = min(len(commits), max(1, round(sample * len(commits))))
        picked += [(cache, commit) for commit in sorted(random.sample(commits, count), key=lambda commit: commit.sha256)]
    for done, (cache, commit) in enumerate(picked, 1):
        damage += _shard(cache, commit)
        tick(Tick(done, len(picked), "shards"))
    records, broken = _records(store, held)
    rows = sum(len(commit.keys) for _, commit in picked)
    return Verified(num_commits, len(picked), rows, records, tuple(sorted(damage + broken, key=lambda found: found.key)))


def _description(cache: RowCache) -> list[Damage]:
    try:
        about(cache)
    except IntegrityError as error:
        return [Damage(f"{cache.prefix}/about.json", _reason(error))]
    return []


def _reason(error: Exception) -> str:
    """Cut the leading URI off a message: the key stands beside it."""
    line = " ".join(str(error).split())
    return line.partition(": ")[2] if "://" in line.split(" ")[0] or line.startswith("/") else line


def _commits(cache: RowCache) -> tuple[list[Commit], list[Damage]]:
    commits, damage = [], []
    for info in cache.store.list(f"{cache.prefix}/commits/"):
        try:
            commits.append(cache.read_commit(info.key.rpartition("/")[2].removesuffix(".json")))
        except IntegrityError as error:
            damage.append(Damage(info.key, _reason(error)))
    return commits, damage


def _shard(cache: RowCache, commit: Commit) -> list[Damage]:
    """Make every check of one shard; the first that fails is what is reported."""
    key, also = cache.shard_key(commit), (cache.commit_key(commit),)
    if cache.store.info(key) is None:
        return [Damage(key, "gone, and a commit names it", commit.sha256, also)]
    try:
        data = cache.store.get(key)
        _check_bytes(commit, data)
        _check_rows(cache, commit, parse_shard(data))
    except (KDError, pa.ArrowException, ValueError, KeyError, OSError) as error:
        if isinstance(error, VersionError) or (isinstance(error, StoreError) and not isinstance(error, IntegrityError)):
            raise
        return [Damage(key, _reason(error), commit.sha256, also)]
    return []


def _check_bytes(commit: Commit, data: bytes) -> None:
    if len(data) != commit.size_bytes:
        raise IntegrityError(f"{len(data):,} bytes, and its commit says {commit.size_bytes:,}")
    for i, part in enumerate(commit.ranges):
        if sha256_bytes(data[part.start : part.start + part.length]) != part.sha256:
            name = f"row group {i}" if part.num_rows else "footer"
            raise IntegrityError(f"sha256 of its {name} (bytes {part.start} to {part.start + part.length}) differs from its commit")
    if sha256_bytes(data) != commit.sha256:
        raise IntegrityError("its sha256 differs from its name")
    ends = [0, *(part.start + part.length for part in commit.ranges)]
    if [part.start for part in commit.ranges] != ends[:-1] or ends[-1] != len(data):
        raise IntegrityError("the ranges of its commit do not cover it without a gap")
    if commit.num_rows != len(commit.keys):
        raise IntegrityError("the ranges of its commit hold another number of rows than its keys")


def _check_rows(cache: RowCache, commit: Commit, rows: pa.Table) -> None:
    keys = rows["key"].to_pylist()
    if keys != list(commit.keys):
        raise IntegrityError("its rows are not the rows of its commit")
    check = {"soft_labels": _check_soft_labels, "hidden_states": _check_hidden_states}.get(cache.table)
    if check is None:
        return
    _check_tokens(cache.namespace, rows)
    for start in range(0, len(keys), _ROWS):
        check(rows.slice(start, _ROWS))


def _check_tokens(namespace: str, rows: pa.Table) -> None:
    for key, ids, first, said in zip(*(rows[n].to_pylist() for n in ("key", "ids", "first_supervised", "num_supervised")), strict=True):
        if soft_label_key(namespace, ids, first) != key:
            raise IntegrityError(f"row {key}: its tokens give another key")
        if said != len(ids) - first:
            raise IntegrityError(f"row {key}: {said} supervised tokens are said, and it has {len(ids) - first}")


def _check_soft_labels(rows: pa.Table) -> None:
    """Decode rows and look at their ids; raises an error that names the first bad row."""
    try:
        targets = decode_rows_of(rows)
    except SoftLabelError as error:
        if rows.num_rows > 1:  # one by one, to name it
            for i in range(rows.num_rows):
                _check_soft_labels(rows.slice(i, 1))
        raise IntegrityError(f"row {rows['key'][0]} does not decode: {error}") from error
    num_columns, found = targets.common.num_columns, entries(targets)
    largest = max([*(int(ids.max(initial=0)) for ids in gold_labels(rows)), int(found.id_E.max()) if len(found.id_E) else 0])
    if largest >= num_columns:
        raise IntegrityError(f"rows from {rows['key'][0]} on hold token {largest}, outside the vocabulary of {num_columns}")


def _check_hidden_states(rows: pa.Table) -> None:
    for key, data, num in zip(*(rows[n].to_pylist() for n in ("key", "states", "num_supervised")), strict=True):
        try:
            found = len(decode_states(data).codes_NLW)
        except SoftLabelError as error:
            raise IntegrityError(f"row {key} does not decode: {error}") from error
        if found != num:
            raise IntegrityError(f"row {key}: states of {found} positions, and it has {num} supervised tokens")


# ---------------------------------------------------------------------------------------------- records


def frozen_records(store: Store) -> Iterator[tuple[str, Record | IntegrityError]]:
    """Read (key, record) of every record that names rows; the error in its place where it is not readable as one."""
    for stage in FREEZING_STAGES:
        for info in store.list(f"artifacts/{stage}/"):
            parts = info.key.split("/")
            if len(parts) == 4 and parts[3] == "record.json":
                try:
                    record = find(store, stage, parts[2])
                except IntegrityError as error:
                    yield info.key, error
                    continue
                if record is not None:
                    yield info.key, record


def _records(store: Store, held: dict[tuple[str, str], set[str]]) -> tuple[int, list[Damage]]:
    damage, count = [], 0
    for key, record in frozen_records(store):
        count += 1
        if isinstance(record, IntegrityError):
            damage.append(Damage(key, _reason(record)))
            continue
        damage += _record(store, key, record, held.get((record.stage, record.summary["namespace"]), set()))
    return count, damage


def _record(store: Store, key: str, record: Record, held: set[str]) -> list[Damage]:
    try:
        for file in record.files:
            read_bytes(store, record, file.name)
        wanted = pq.read_table(io.BytesIO(read_bytes(store, record, "keys.parquet")))["key"].to_pylist()
    except (StoreError, pa.ArrowException, KeyError) as error:
        return [Damage(key, f"its files are not as recorded: {error}")]
    missing = [row for row in wanted if row not in held]
    if missing:
        return [Damage(key, f"{len(missing)} of {len(wanted)} rows it names are in no commit, first {missing[0]}")]
    return []
