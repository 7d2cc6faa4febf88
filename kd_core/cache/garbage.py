"""Objects that no commit and no record reaches, and that are old enough that nobody can be about to reach them.

A shard is written before its commit and a payload before its record, so a young object without either may belong to a
writer at work: age, this machine's clock against the times the store keeps, tells garbage from work. Never deleted:
commits and what they name, records and what they name, artifacts in the ledger, descriptions, and whatever lies under a
prefix that is not ours. One limit: a writer that makes the very bytes of an old stray shard anew while it is being
deleted ends with a commit without its shard; ``verify`` names it, ``repair`` puts it right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kd_core.artifacts import Record, find
from kd_core.errors import ArtifactError
from kd_core.ledger import history
from kd_core.progress import Tick, Ticker, silent
from kd_core.rows.table import RowCache
from kd_core.store import ObjectInfo, Store
from kd_core.summaries import shards_of

__all__ = ["Garbage", "collect", "plan_collection"]


@dataclass(frozen=True)
class Garbage:
    """One object that nothing reaches.

    Attributes:
        key: its object key.
        size_bytes: what deleting it frees.
        age_seconds: since it was written.
        reason: why nothing reaches it.
    """

    key: str
    size_bytes: int
    age_seconds: float
    reason: str


def plan_collection(store: Store, *, grace_seconds: float, now_seconds: float, unused_namespaces: bool) -> tuple[Garbage, ...]:
    """List all garbage, sorted by key within the order in which it is deleted. Changes nothing.

    Args:
        store: where.
        grace_seconds: younger objects are kept, whatever they are.
        now_seconds: the time now, seconds since the epoch.
        unused_namespaces: also row tables that no record names, if all of their objects are old enough.

    Raises:
        IntegrityError: a commit, record or ledger entry is not readable, so what it reaches is not known.
        VersionError: one of them is of another version.
        ArtifactError: a summary in a record is of another version, or the record went away.
    """
    objects = list(store.list(""))  # before commits and records are read: what is committed meanwhile is seen as reached
    records = {info.key: _record(store, info.key) for info in objects if _is_record(info.key)}
    found = [
        *_rows(store, objects, records, grace_seconds if unused_namespaces else None, now_seconds),
        *_payloads(store, objects, records),
        *_checkpoints(objects, {record.fingerprint for record in records.values()}),
        *((info, "quarantined") for info in objects if info.key.startswith("quarantine/")),
    ]
    ages = ((info, now_seconds - info.modified_seconds, reason) for info, reason in found)
    return tuple(Garbage(info.key, info.size_bytes, age, reason) for info, age, reason in ages if age >= grace_seconds)


def collect(store: Store, garbage: Sequence[Garbage], *, tick: Ticker = silent) -> None:
    """Delete what a plan lists, in its order."""
    for done, item in enumerate(garbage, 1):
        store.delete(item.key)
        tick(Tick(done, len(garbage), "objects"))


Found = Iterator[tuple[ObjectInfo, str]]


def _is_record(key: str) -> bool:
    parts = key.split("/")
    return len(parts) == 4 and parts[0] == "artifacts" and parts[3] == "record.json"


def _record(store: Store, key: str) -> Record:
    record = find(store, *key.split("/")[1:3])
    if record is None:
        raise ArtifactError(f"{store.uri}/{key} went away while it was read; run kd cache gc again")
    return record


def _rows(store: Store, objects: Sequence[ObjectInfo], records: dict[str, Record], unused_grace: float | None, now: float) -> Found:
    named = {own.namespace for record in records.values() if (own := shards_of(record)) is not None}
    tables: dict[tuple[str, str], list[ObjectInfo]] = {}
    for info in objects:
        parts = info.key.split("/")
        if parts[0] == "rows" and len(parts) > 3:
            tables.setdefault((parts[1], parts[2]), []).append(info)
    for (table, namespace), held in tables.items():
        cache = RowCache(store, table, namespace)
        if unused_grace is not None and namespace not in named and all(now - info.modified_seconds >= unused_grace for info in held):
            commits_first = sorted(held, key=lambda info: (not info.key.startswith(f"{cache.prefix}/commits/"), info.key))
            yield from ((info, "no record names its namespace") for info in commits_first)
            continue
        reached = {cache.shard_key(commit) for commit in cache.snapshot().commits}
        shards = (info for info in held if info.key.startswith(f"{cache.prefix}/shards/"))
        yield from ((info, "shard without a commit") for info in shards if info.key not in reached)


def _payloads(store: Store, objects: Sequence[ObjectInfo], records: dict[str, Record]) -> Found:
    reached = {f"{record.prefix}/{file.name}" for record in records.values() for file in record.files}
    models = {info.key.split("/")[1] for info in objects if info.key.startswith("ledger/")}
    entries = (entry.artifact for model in sorted(models) for entry in history(store, model))
    promoted = tuple(f"artifacts/{artifact.stage}/{artifact.fingerprint}/{artifact.digest}/" for artifact in entries)
    for info in objects:
        if not info.key.startswith("artifacts/") or info.key in records or info.key in reached or info.key.startswith(promoted):
            continue
        if len(info.key.split("/")) > 4:
            yield info, "payload without a record"


def _checkpoints(objects: Sequence[ObjectInfo], finished: set[str]) -> Found:
    """Find checkpoints of finished work, records before their states; and states whose record was never written."""
    mine = [info for info in objects if info.key.startswith("checkpoints/")]
    complete = {info.key.rpartition("/")[0] for info in mine if info.key.endswith("/record.json")}
    for info in sorted(mine, key=lambda info: (not info.key.endswith("/record.json"), info.key)):
        if info.key.split("/")[1] in finished:
            yield info, "checkpoint of finished work"
        elif info.key.rpartition("/")[0] not in complete:
            yield info, "checkpoint without a record"
