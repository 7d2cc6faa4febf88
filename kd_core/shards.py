"""Rows that grow: shards committed one by one, keyed by row, shared by every recipe that asks for the same work.

    rows/<table>/<namespace>/shards/<sha256>.parquet    payload
    rows/<table>/<namespace>/commits/<sha256>.json      written after it: row keys, bytes, checksum

The teacher's answers and soft labels both stand on this. Many workers may commit at once without a lock; a reader takes
a snapshot (the list of commits). A row that was computed twice is resolved the same way for every reader: the shard
with the smallest checksum wins. Nothing is overwritten.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd_core.errors import ArtifactError, IntegrityError
from kd_core.failpoints import reach
from kd_core.fingerprint import canonical_json, fingerprint, sha256_bytes
from kd_core.store import Store

__all__ = ["Commit", "RowCache", "Snapshot", "work_in_shards"]


Row = TypeVar("Row")
T = TypeVar("T")


@dataclass(frozen=True)
class Commit:
    """One finished shard: checksum (64 hex), size, and the keys of its rows in order."""

    sha256: str
    size_bytes: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """The commits a reader saw, sorted by checksum."""

    commits: tuple[Commit, ...]

    def keys(self) -> set[str]:
        """Every row key that is there."""
        return {key for commit in self.commits for key in commit.keys}

    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(commit.size_bytes for commit in self.commits)


@dataclass(frozen=True)
class RowCache:
    """A growing table of rows with a string column ``key``.

    Attributes:
        store: where it lives.
        table: 'answers' or 'soft_labels'.
        namespace: fingerprint of whatever all its rows share (teacher identity, policy, sampling).
    """

    store: Store
    table: str
    namespace: str

    @property
    def prefix(self) -> str:
        """Key prefix of all shards and commits."""
        return f"rows/{self.table}/{self.namespace}"

    def snapshot(self) -> Snapshot:
        """List and read all commits.

        Raises:
            IntegrityError: a commit is not readable as one.
        """
        objects = self.store.list(f"{self.prefix}/commits/")
        commits = [self._read_commit(info.key) for info in objects]
        return Snapshot(tuple(sorted(commits, key=lambda commit: commit.sha256)))

    def _read_commit(self, key: str) -> Commit:
        try:
            raw = json.loads(self.store.get(key))
            commit = Commit(raw["sha256"], raw["size_bytes"], tuple(raw["keys"]))
            if not key.endswith(f"/{sha256_bytes(canonical_json(raw))}.json"):
                raise ValueError("its content does not match its name")
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{self.store.uri}/{key}: not a valid commit ({error}); delete it to have its rows computed again"
            ) from error
        return commit

    def commit(self, rows: pa.Table) -> Commit:
        """Write rows as one shard, then its commit.

        Args:
            rows: a table with a unique string column ``key``.
        """
        keys = tuple(rows.column("key").to_pylist())
        assert len(set(keys)) == len(keys), "a shard holds each key once"
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd", store_schema=False)
        data = buffer.getvalue()
        commit = Commit(sha256_bytes(data), len(data), keys)
        for key, content in ((self._shard_key(commit), data), (self._commit_key(commit), _commit_bytes(commit))):
            if not self.store.create(key, content):
                raise IntegrityError(f"{self.store.uri}/{key} holds other bytes than its name says; delete it and run again")
            reach(f"{self.table}.{'shard' if key.endswith('.parquet') else 'commit'}")
        return commit

    def _shard_key(self, commit: Commit) -> str:
        return f"{self.prefix}/shards/{commit.sha256}.parquet"

    def _commit_key(self, commit: Commit) -> str:
        return f"{self.prefix}/commits/{sha256_bytes(_commit_bytes(commit))}.json"

    def read(self, snapshot: Snapshot, keys: Sequence[str]) -> pa.Table:
        """The rows of ``keys``, in that order, checksums verified.

        Raises:
            ArtifactError: a key is in no commit of the snapshot.
            IntegrityError: a shard's bytes differ from its commit.
        """
        assert keys, "a stage that asks for no rows has nothing to do"
        owner: dict[str, str] = {}
        for commit in snapshot.commits:
            for key in commit.keys:
                owner.setdefault(key, commit.sha256)
        missing = [key for key in keys if key not in owner]
        if missing:
            raise ArtifactError(
                f"{self.prefix}: {len(missing)} of {len(keys)} rows are missing, first {missing[0]}; run the recipe again to compute them"
            )
        needed = {owner[key] for key in keys}
        parts = []
        for commit in snapshot.commits:
            if commit.sha256 not in needed:
                continue
            shard = self._read_shard(commit)
            wins = pa.array([owner[key] == commit.sha256 for key in shard.column("key").to_pylist()])
            parts.append(shard.filter(wins))
        rows = pa.concat_tables(parts)
        return rows.take(pc.index_in(pa.array(list(keys), pa.string()), value_set=rows.column("key").combine_chunks()))

    def _read_shard(self, commit: Commit) -> pa.Table:
        key = self._shard_key(commit)
        data = self.store.get(key)
        if sha256_bytes(data) != commit.sha256:
            raise IntegrityError(
                f"{self.store.uri}/{key}: sha256 differs from its name; delete it and {self._commit_key(commit)} "
                "to have its rows computed again"
            )
        return pq.read_table(io.BytesIO(data))


def _commit_bytes(commit: Commit) -> bytes:
    return canonical_json({"sha256": commit.sha256, "size_bytes": commit.size_bytes, "keys": list(commit.keys)})


def snapshot_id(snapshot: Snapshot) -> str:
    """32 hex over the list of commits."""
    return fingerprint([commit.sha256 for commit in snapshot.commits])


def work_in_shards(
    cache: RowCache,
    rows: Sequence[tuple[str, Row]],
    compute: Callable[[list[tuple[str, Row]]], pa.Table],
    *,
    shard_rows: int,
    done: Callable[[int], None],
) -> tuple[Snapshot, int]:
    """Compute and commit the rows that the cache does not hold.

    The missing rows are cut into shards in the order given, so a run that was killed and started again computes the
    same shards as an unbroken one.

    Args:
        cache: where rows are kept.
        rows: (key, input) in a fixed order; a key that stands twice is computed once.
        compute: makes a table with a ``key`` column for one shard's rows.
        shard_rows: rows a shard.
        done: called with the number of rows that are finished (cached ones first, at once).

    Returns:
        A snapshot that holds all rows, and the number of rows computed now.
    """
    unique = dict(rows)
    held = cache.snapshot().keys()
    missing = [(key, row) for key, row in unique.items() if key not in held]
    done(len(unique) - len(missing))
    for shard in _chunks(missing, shard_rows):
        cache.commit(compute(shard))
        done(len(shard))
    return cache.snapshot(), len(missing)


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
