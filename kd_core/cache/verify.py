"""Check that everything in the store is what was committed. Reads all, or a random sample of the large objects; changes nothing.

For each row table: its description and commits are readable; each shard is there with the bytes of its commit, range by
range; its rows are the commit's rows; each row of soft labels (or hidden states) has the key that its tokens give, decodes, has as many
positions as its tokens say, and ids inside the vocabulary. For each artifact of any stage: its record is readable and in its place,
its files are as recorded, what it was made from is there, and every row it names is in a commit. The ledger has every entry that
a publication saw, and its champion is there. Each checkpoint is whole. What is found is named with the objects that must go with
it, so that ``repair`` needs no second look. What is of another version is no damage: a VersionError ends the check.
"""

import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from kd_core.artifacts import Record, check_file, find, open_artifact, read_bytes, record_keys
from kd_core.cache.catalog import about, row_caches
from kd_core.cache.explode import decode_rows_of, entries, gold_labels
from kd_core.errors import IntegrityError, KDError, SoftLabelError, StoreError, VersionError
from kd_core.fingerprint import sha256_bytes
from kd_core.ledger import check_against_records
from kd_core.progress import Tick, Ticker, silent
from kd_core.rows.keys import soft_label_key
from kd_core.rows.parquet import parse_shard
from kd_core.rows.table import Commit, RowCache
from kd_core.softlabels.hidden import decode_states
from kd_core.store import Store
from kd_core.summaries import PublishSummary, of, shards_of
from kd_core.train.checkpoints import Checkpoints

__all__ = ["Damage", "Verified", "readable_records", "verify"]

_REWRITE = "put the record of that artifact aside and run the recipe again: it is written, and no row is computed again"
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
        records: artifacts whose record was read.
        artifacts: of those, how many were read whole, file by file.
        entries: entries of all ledgers.
        checkpoints: checkpoints read whole.
        damage: sorted by key.
    """

    commits: int
    shards: int
    rows: int
    records: int
    artifacts: int
    entries: int
    checkpoints: int
    damage: tuple[Damage, ...]


def verify(store: Store, *, sample: float = 1.0, tick: Ticker = silent) -> Verified:
    """Check the row tables, the artifacts, the ledgers and the checkpoints of a store.

    Args:
        store: where.
        sample: share of the shards and of the artifacts whose bytes are read, in (0, 1]; drawn anew each time, at least one of each
            table and stage. Commits, descriptions, records, ledgers and checkpoints are always read.
        tick: progress, in shards and artifacts.

    Raises:
        VersionError: something is of another version.
    """
    damage: list[Damage] = []
    shards: list[tuple[RowCache, Commit]] = []
    held: dict[tuple[str, str], set[str]] = {}
    num_commits = 0
    for cache in row_caches(store):
        commits, broken = _commits(cache)
        damage += _description(cache, commits) + broken
        num_commits += len(commits)
        held[cache.table, cache.namespace] = {key for commit in commits for key in commit.keys}
        shards += [(cache, commit) for commit in _sampled(commits, sample, lambda commit: commit.sha256)]
    records, broken = _records(store)
    damage += broken
    stages = sorted({record.stage for record in records})
    artifacts = [
        record
        for stage in stages
        for record in _sampled([record for record in records if record.stage == stage], sample, lambda record: record.fingerprint)
    ]
    total = len(shards) + len(artifacts)
    for done, (cache, commit) in enumerate(shards, 1):
        damage += _shard(cache, commit)
        tick(Tick(done, total, "objects"))
    for done, record in enumerate(artifacts, len(shards) + 1):
        damage += _files(store, record) or _frozen_rows(store, record, held)
        tick(Tick(done, total, "objects"))
    damage += _sources(store, records)
    num_entries, broken = _ledgers(store, records)
    damage += broken
    num_checkpoints, broken = _checkpoints(store)
    damage += broken
    return Verified(
        commits=num_commits,
        shards=len(shards),
        rows=sum(len(commit.keys) for _, commit in shards),
        records=len(records),
        artifacts=len(artifacts),
        entries=num_entries,
        checkpoints=num_checkpoints,
        damage=tuple(sorted({found.key: found for found in reversed(damage)}.values(), key=lambda found: found.key)),
    )


T = TypeVar("T")


def _sampled(items: Sequence[T], sample: float, order: Callable[[T], str]) -> list[T]:
    count = min(len(items), max(1, round(sample * len(items))))
    return sorted(random.sample(items, count), key=order)


def _description(cache: RowCache, commits: Sequence[Commit]) -> list[Damage]:
    try:
        if about(cache) == (None, None) and commits:
            return [Damage(cache.about_key, f"gone, and its table has commits; {_REWRITE}")]
    except IntegrityError as error:
        return [Damage(cache.about_key, _reason(error))]
    return []


def _reason(error: Exception) -> str:
    """Cut the leading URI off a message: the key stands beside it."""
    line = " ".join(str(error).split())
    return (line.partition(": ")[2] or line) if "://" in line.split(" ")[0] or line.startswith("/") else line


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


# ---------------------------------------------------------------------------------------------- artifacts


def readable_records(store: Store) -> Iterator[tuple[str, Record | IntegrityError]]:
    """(key, record) of every artifact; the error in its place where it is not readable as one."""
    for key in record_keys(store):
        _, stage, fp, _ = key.split("/")
        try:
            record = find(store, stage, fp)
        except IntegrityError as error:
            yield key, error
            continue
        if record is not None:
            yield key, record


def _records(store: Store) -> tuple[list[Record], list[Damage]]:
    found = list(readable_records(store))
    records = [record for _, record in found if isinstance(record, Record)]
    return records, [Damage(key, _reason(error)) for key, error in found if isinstance(error, IntegrityError)]


def _files(store: Store, record: Record) -> list[Damage]:
    """Every file of an artifact, each with its own damage."""
    damage = []
    for file in record.files:
        try:
            check_file(store, record, file)
        except IntegrityError as error:
            damage.append(Damage(f"{record.prefix}/{file.name}", _reason(error), also=(record.key,)))
    return damage


def _frozen_rows(store: Store, record: Record, held: dict[tuple[str, str], set[str]]) -> list[Damage]:
    """Whether the rows that a whole artifact names are committed."""
    shards = shards_of(record)
    if shards is None:
        return []
    try:
        wanted = pq.read_table(io.BytesIO(read_bytes(store, record, "keys.parquet")))["key"].to_pylist()
    except (KDError, pa.ArrowException, KeyError) as error:
        return [Damage(record.key, f"it names no rows: {error}")]
    there = held.get((record.stage, shards.namespace), set())
    missing = [row for row in wanted if row not in there]
    if missing:
        return [Damage(record.key, f"{len(missing)} of {len(wanted)} rows it names are in no commit, first {missing[0]}")]
    return []


def _sources(store: Store, records: Sequence[Record]) -> list[Damage]:
    """What records say they were made from and is not there."""
    there = {record.fingerprint for record in records} | {key.split("/")[2] for key in record_keys(store)}
    lost = {fp: (role, record) for record in records for role, fp in record.upstream.items() if fp not in there}
    stages = {info.key.split("/")[2]: info.key.split("/")[1] for info in store.list("artifacts/")} if lost else {}
    return [
        Damage(
            f"artifacts/{stages.get(fp, role.partition('.')[0])}/{fp}/record.json",
            f"gone, and {record.stage} {record.fingerprint} was made from it ({role}); run the recipe again to make it",
        )
        for fp, (role, record) in lost.items()
    ]


# ---------------------------------------------------------------------------------------------- ledgers and checkpoints


def _ledgers(store: Store, records: Sequence[Record]) -> tuple[int, list[Damage]]:
    count, damage = 0, []
    published = {of(record, PublishSummary).model for record in records if record.stage == "publish"}
    for model in sorted(published | {info.key.split("/")[1] for info in store.list("ledger/")}):
        try:
            entries = check_against_records(store, model)
        except IntegrityError as error:
            damage.append(Damage(_key_in(store, error) or f"ledger/{model}", _reason(error)))
            continue
        count += len(entries)
        if entries:
            artifact = entries[-1].artifact
            try:
                open_artifact(store, artifact)
            except KDError as error:
                key = f"artifacts/{artifact.stage}/{artifact.fingerprint}/record.json"
                damage.append(Damage(key, f"champion of {model}: {_reason(error)}"))
    return count, damage


def _checkpoints(store: Store) -> tuple[int, list[Damage]]:
    count, damage = 0, []
    for fp in sorted({info.key.split("/")[1] for info in store.list("checkpoints/")}):
        checkpoints = Checkpoints(store, fp)
        for step in checkpoints.steps():
            count += 1
            try:
                checkpoints.check(step)
            except IntegrityError as error:
                record = checkpoints.record_key(step)
                key = _key_in(store, error) or record
                damage.append(Damage(key, _reason(error), also=() if key == record else (record,)))
    return count, damage


def _key_in(store: Store, error: Exception) -> str | None:
    """The object key at the head of a message."""
    text = str(error)
    return text.removeprefix(f"{store.uri}/").partition(": ")[0] if text.startswith(f"{store.uri}/") else None
