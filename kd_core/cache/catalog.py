"""Row stores that a store holds: namespaces, who made them, their commits.

A namespace is one row store (answers, soft labels ...) of one teacher and policy; ``about.json`` says which in plain data.
Reads commits and descriptions only, never a shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from kd_core.errors import IntegrityError, StoreError
from kd_core.fingerprint import sha256_bytes
from kd_core.rows.parquet import parse_shard
from kd_core.rows.table import Commit, RowCache, Snapshot
from kd_core.store import Store
from kd_core.store.sealed import check_twice

__all__ = ["Namespace", "about", "find_namespace", "losing_rows", "namespaces", "read_shard", "row_caches"]


@dataclass(frozen=True)
class Namespace:
    """One row table with its commits.

    Attributes:
        cache: table, namespace and store.
        teacher: short name of the teacher; None where no description was written.
        policy: what is kept, or how answers are sampled, as 'field=value' words; None as above.
        snapshot: its commits.
        modified_seconds: when the newest commit was written, seconds since the epoch; 0 without commits.
    """

    cache: RowCache
    teacher: str | None
    policy: str | None
    snapshot: Snapshot
    modified_seconds: float

    @property
    def num_rows(self) -> int:
        """Distinct rows."""
        return len(self.snapshot.keys())

    @property
    def num_duplicates(self) -> int:
        """Duplicates: rows that another shard holds too and that no reader sees."""
        return sum(len(commit.keys) for commit in self.snapshot.commits) - self.num_rows

    @property
    def num_tokens(self) -> int:
        """Supervised or generated tokens in all shards."""
        return sum(commit.num_tokens for commit in self.snapshot.commits)


def row_caches(store: Store) -> list[RowCache]:
    """List every (table, namespace) below rows/, sorted."""
    parts = (info.key.split("/") for info in store.list("rows/"))
    return [RowCache(store, table, namespace) for table, namespace in sorted({(p[1], p[2]) for p in parts if len(p) > 3})]


def namespaces(store: Store) -> list[Namespace]:
    """Read all row tables of a store.

    Raises:
        IntegrityError: a commit or a description is not readable as one.
        VersionError: one of them is of another version.
    """
    return [_describe(cache) for cache in row_caches(store)]


def find_namespace(store: Store, wanted: str | None, *, table: str | None) -> Namespace:
    """Find the namespace (of a table, if one is named) that starts with ``wanted``; with None, the only one there is.

    Raises:
        StoreError: none, or more than one.
    """
    caches = [cache for cache in row_caches(store) if table in (None, cache.table)]
    matching = [cache for cache in caches if cache.namespace.startswith(wanted or "")]
    if len(matching) == 1:
        return _describe(matching[0])
    found = ", ".join(f"{cache.namespace} ({cache.table})" for cache in caches) or "none"
    said = "say which namespace" if wanted is None else f"{wanted!r} names {len(matching)} namespaces"
    raise StoreError(f"{store.uri}: {said}; there are: {found}")


def _describe(cache: RowCache) -> Namespace:
    times = [info.modified_seconds for info in cache.store.list(f"{cache.prefix}/commits/")]
    return Namespace(cache, *about(cache), cache.snapshot(), max(times, default=0.0))


def about(cache: RowCache) -> tuple[str | None, str | None]:
    """Tell (teacher, policy) of a namespace in a few words, from its ``about.json``; None twice where there is none.

    Raises:
        IntegrityError: it is not readable as a description.
        VersionError: it is of another version.
    """
    if (said := cache.description()) is None:
        return None, None
    made = next((said[name] for name in ("policy", "sampling", "hidden_states") if name in said), None)
    if made is None:
        raise IntegrityError(f"{cache.store.uri}/{cache.about_key}: it names no policy; kd cache repair puts it aside")
    return _teacher_name(said["teacher"]), _words(made)


def read_shard(cache: RowCache, commit: Commit) -> pa.Table:
    """Read a whole shard, verified; unlike ``RowCache.read_shard`` it moves nothing: looking changes nothing.

    Raises:
        StoreError: it is gone.
        IntegrityError: its bytes differ from its commit.
    """
    key = cache.shard_key(commit)

    def wrong(data: bytes) -> str | None:
        return None if sha256_bytes(data) == commit.sha256 else "its sha256 differs from its name"

    advice = f"kd cache repair --store {cache.store.uri} --yes puts it aside"
    return parse_shard(check_twice(lambda: cache.store.get(key), wrong, where=f"{cache.store.uri}/{key}", advice=advice))


def _teacher_name(teacher: Mapping[str, Any]) -> str:
    """Name a teacher in a few words: the hub id or served model where there is one, else the first digits of its content."""
    if teacher["engine"] == "server":
        return str(teacher["model"])
    weights = teacher["weights"]
    if "hub" in weights:
        name = f"{weights['hub']}@{str(weights['revision'])[:8]}"
    else:
        name = f"{'trained' if 'training' in weights else 'content'} {weights['content'][:8]}"
    return f"{name} {teacher['dtype']}"


def _words(fields: Mapping[str, Any]) -> str:
    """Write a policy on one line: its kind, then each field.

    >>> _words({"kind": "sampled", "num_draws": 25, "temperature": 2.0})
    'sampled num_draws=25 temperature=2'
    """
    words = [str(fields["kind"])] if "kind" in fields else []
    return " ".join([*words, *(f"{name}={_value(value)}" for name, value in fields.items() if name != "kind" and value is not None)])


def _value(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def losing_rows(snapshot: Snapshot) -> list[tuple[str, str]]:
    """List (key, shard checksum) of each row that a shard with a smaller checksum holds too: readers take that one."""
    seen: set[str] = set()
    lost = []
    for commit in snapshot.commits:  # sorted by checksum
        lost += [(key, commit.sha256) for key in commit.keys if key in seen]
        seen.update(commit.keys)
    return lost
