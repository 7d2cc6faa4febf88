"""Row stores: rows in shards committed one by one, keyed, shared by every recipe that asks for the same work.

    rows/<table>/<namespace>/about.json                 what all rows share, for readers and maintenance
    rows/<table>/<namespace>/shards/<sha256>.parquet    payload
    rows/<table>/<namespace>/commits/<sha256>.json      written after it: row keys, sizes, checksums of every byte range
    quarantine/...                                      damaged shards and their commits, moved aside

The teacher's answers and soft labels both stand on this. Many workers may commit at once without a lock; a reader takes
a snapshot (the list of commits). Duplicates of a row are resolved the same way for every reader: the shard with the
smallest checksum wins. Nothing is overwritten. How a shard looks inside is ``parquet.py``'s business.
"""

import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import ArtifactError, IntegrityError, QuarantinedError, StoreError
from kd_core.failpoints import reach
from kd_core.fingerprint import canonical_json, sha256_bytes
from kd_core.rows.parquet import ByteRange, parse_shard, read_footer, read_group, write_shard
from kd_core.store import Store
from kd_core.store.sealed import read_parsed, seal, unseal
from kd_core.store.versions import VERSION, expect_version

__all__ = ["Commit", "Place", "RowCache", "Shard", "Snapshot"]

Fetch = Callable[[str, ByteRange], bytes | None]
"""Reader of (object key, range): its bytes, from the store or a local copy; None where they are not those of the range's checksum."""
_READERS = 16
"""Commits read at once: they are small, and a round trip costs more than their bytes."""


@dataclass(frozen=True)
class Commit:
    """One finished shard.

    Attributes:
        name: sha256 of the commit's own bytes, 64 hex: its object is ``commits/<name>.json``.
        sha256: of the shard, 64 hex.
        size_bytes: of the shard.
        keys: of its rows, in order.
        num_tokens: the shard's work: supervised tokens of soft labels, generated tokens of answers.
        ranges: byte ranges that cover the shard without a gap, the footer last.
    """

    name: str
    sha256: str
    size_bytes: int
    keys: tuple[str, ...]
    num_tokens: int
    ranges: tuple[ByteRange, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the shard, known without their keys."""
        return sum(part.num_rows for part in self.ranges)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is: a commit of the snapshot, and the row's number in its shard."""

    commit: Commit
    row: int


@dataclass(frozen=True)
class Snapshot:
    """The commits a reader saw, sorted by the shard's checksum."""

    commits: tuple[Commit, ...]

    @cached_property
    def first_lines(self) -> list[int]:
        """First line of each commit, where the rows of all commits stand one after the other; and the number of lines."""
        return list(itertools.accumulate((len(commit.keys) for commit in self.commits), initial=0))

    @cached_property
    def lines(self) -> Mapping[str, int]:
        """Line of each row key; a row that stands in several shards is the one of the smallest checksum."""
        found: dict[str, int] = {}
        for commit, first in zip(reversed(self.commits), reversed(self.first_lines[:-1]), strict=True):
            found.update(zip(commit.keys, range(first, first + len(commit.keys)), strict=True))
        return found

    def place(self, line: int) -> Place:
        """Find the place of a line."""
        i = bisect_right(self.first_lines, line) - 1
        return Place(self.commits[i], line - self.first_lines[i])

    def keys(self) -> set[str]:
        """All row keys, each once."""
        return set(self.lines)

    def size_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(commit.size_bytes for commit in self.commits)

    def frozen(self, shards: Iterable[str]) -> "Snapshot":
        """Keep the commits of these shards alone: what a record saw, whatever came later.

        Raises:
            QuarantinedError: one of them is gone.
        """
        wanted = set(shards)
        gone = wanted - {commit.sha256 for commit in self.commits}
        if gone:
            raise QuarantinedError(
                f"{len(gone)} of {len(wanted)} shards of a finished stage are gone, first {min(gone)}; run the recipe again"
            )
        return Snapshot(tuple(commit for commit in self.commits if commit.sha256 in wanted))

    def of(self, keys: Iterable[str]) -> "Snapshot":
        """Keep the commits that own these rows; keys that are not there own none."""
        owners = {self.place(self.lines[key]).commit.sha256 for key in keys if key in self.lines}
        return Snapshot(tuple(commit for commit in self.commits if commit.sha256 in owners))


@dataclass(frozen=True)
class RowCache:
    """A row store: a table of rows with a string column ``key``, to which shards are added.

    Attributes:
        store: where it lives.
        table: 'answers', 'soft_labels' or 'hidden_states'.
        namespace: fingerprint of whatever all its rows share (teacher identity, policy, sampling).
    """

    store: Store
    table: str
    namespace: str

    @property
    def prefix(self) -> str:
        """Key prefix of all shards and commits."""
        return f"rows/{self.table}/{self.namespace}"

    @property
    def about_key(self) -> str:
        """Object key of the description."""
        return f"{self.prefix}/about.json"

    def shard_key(self, commit: Commit) -> str:
        """Object key of a commit's shard."""
        return f"{self.prefix}/shards/{commit.sha256}.parquet"

    def commit_key(self, commit: Commit) -> str:
        """Object key of a commit."""
        return f"{self.prefix}/commits/{commit.name}.json"

    # ------------------------------------------------------------------------------------------ writing

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write ``about.json``: what all rows of this namespace share, as plain data. Idempotent.

        Raises:
            VersionError: there is one of another version.
            IntegrityError: there is one that says something else.
        """
        place = {"table": self.table, "namespace": self.namespace}
        if not self.store.create(self.about_key, seal("about", {**place, **about})):
            with suppress(IntegrityError):
                self.description()
            raise IntegrityError(
                f"{self.store.uri}/{self.about_key} holds another description; if it is damaged, "
                f"kd cache repair --store {self.store.uri} --yes puts it aside; run again then"
            )

    def description(self) -> dict[str, Any] | None:
        """Read what ``describe`` wrote; None where nothing was.

        Raises:
            VersionError: it is of another version.
            IntegrityError: its bytes are no description of this namespace.
        """
        if self.store.info(self.about_key) is None:
            return None
        advice = f"kd cache repair --store {self.store.uri} --yes puts it aside, and the next run writes it again"
        return read_parsed(self.store, self.about_key, self._parse_about, what="description", advice=advice)

    def _parse_about(self, data: bytes) -> dict[str, Any]:
        said = unseal("about", data)
        if (said["table"], said["namespace"]) != (self.table, self.namespace):
            raise ValueError(f"it describes {said['namespace']} of {said['table']}")
        return said

    def commit(self, rows: pa.Table, *, num_tokens: int, metadata: Mapping[bytes, bytes] | None = None) -> Commit:
        """Write rows as one shard, then its commit.

        Args:
            rows: a table with a unique string column ``key``.
            num_tokens: the work in it, for sizes and plans.
            metadata: goes into the shard's footer.
        """
        keys = tuple(rows.column("key").to_pylist())
        assert len(set(keys)) == len(keys), "a shard holds each key once"
        data, ranges = write_shard(rows, metadata or {})
        fields = {
            "version": VERSION,
            "sha256": sha256_bytes(data),
            "size_bytes": len(data),
            "num_rows": len(keys),
            "num_tokens": num_tokens,
            "ranges": [[r.start, r.length, r.sha256, r.num_rows] for r in ranges],
            "keys": list(keys),
        }
        content = canonical_json(fields)
        commit = _parse_commit(sha256_bytes(content), content)
        for kind, key, body in (("shard", self.shard_key(commit), data), ("commit", self.commit_key(commit), content)):
            if not self.store.create(key, body):
                raise IntegrityError(f"{self.store.uri}/{key} holds other bytes than its name says; run kd cache repair, then run again")
            reach(f"{self.table}.{kind}")
        return commit

    # ------------------------------------------------------------------------------------------ reading

    def snapshot(self, known: Snapshot | None = None) -> Snapshot:
        """List all commits, and read those that are not in ``known``.

        Raises:
            IntegrityError: a commit is not readable as one.
            VersionError: a commit is of another version.
        """
        seen = {commit.name: commit for commit in known.commits} if known else {}
        names = [info.key.rpartition("/")[2].removesuffix(".json") for info in self.store.list(f"{self.prefix}/commits/")]
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(lambda name: seen.get(name) or self._read_if_there(name), names))
        return Snapshot(tuple(sorted((commit for commit in found if commit is not None), key=lambda commit: commit.sha256)))

    def _read_if_there(self, name: str) -> Commit | None:
        """Read a commit; None if it was quarantined since it was listed."""
        try:
            return self.read_commit(name)
        except IntegrityError:
            raise
        except StoreError:
            if self.store.info(f"{self.prefix}/commits/{name}.json") is not None:
                raise
            return None

    def read_commit(self, name: str) -> Commit:
        """Read the commit of this name.

        Raises:
            IntegrityError: its bytes are not a commit of this name.
            VersionError: it is of another version.
        """
        advice = f"kd cache repair --store {self.store.uri} --yes puts it aside, and its rows are computed again"
        parse = partial(_parse_commit, name)
        return read_parsed(self.store, f"{self.prefix}/commits/{name}.json", parse, what="commit", advice=advice)

    def lines(self, snapshot: Snapshot, keys: Sequence[str]) -> list[int]:
        """Find the lines (``Snapshot.lines``) of rows, in the order asked for.

        Raises:
            ArtifactError: a key is in no commit of the snapshot.
        """
        lines = snapshot.lines
        missing = [key for key in keys if key not in lines]
        if missing:
            raise ArtifactError(
                f"{self.prefix}: {len(missing)} of {len(keys)} rows are missing, first {missing[0]}; run the recipe again to compute them"
            )
        return [lines[key] for key in keys]

    def read(self, snapshot: Snapshot, keys: Sequence[str]) -> pa.Table:
        """Read the rows of ``keys``, in that order, into memory, checksums verified.

        Raises:
            ArtifactError: a key is in no commit of the snapshot.
            IntegrityError: a shard's bytes differ from its commit; QuarantinedError if both have been moved aside.
        """
        assert keys, "a stage that asks for no rows has nothing to do"
        rows_of: dict[str, list[int]] = {}
        commits: dict[str, Commit] = {}
        for place in map(snapshot.place, self.lines(snapshot, list(dict.fromkeys(keys)))):
            rows_of.setdefault(place.commit.sha256, []).append(place.row)
            commits[place.commit.sha256] = place.commit
        parts = [self.read_shard(commits[sha]).take(pa.array(rows)) for sha, rows in rows_of.items()]
        rows = pa.concat_tables(parts, promote_options="default")
        return rows.take(pc.index_in(pa.array(list(keys), pa.string()), value_set=rows.column("key").combine_chunks()))

    def read_shard(self, commit: Commit) -> pa.Table:
        """Read a whole shard, verified.

        Raises:
            StoreError: it is gone.
            IntegrityError: its bytes differ from the commit; QuarantinedError if both have been moved aside.
        """
        try:
            data = self.store.get(self.shard_key(commit))
        except StoreError as error:
            raise self.unless_quarantined(commit, error) from error
        if sha256_bytes(data) != commit.sha256:
            raise self.quarantine(commit, "its sha256 differs from its commit")
        return parse_shard(data)

    def quarantine(self, commit: Commit, reason: str) -> StoreError:
        """Move a damaged shard and its commit aside, so that its rows are missing and can be computed again.

        The shard is read once more first: bytes that are right now were broken on the way, and nothing is moved.

        Returns:
            The error to raise, which says what happened.
        """
        try:
            if sha256_bytes(self.store.get(self.shard_key(commit))) == commit.sha256:
                return IntegrityError(
                    f"{self.store.uri}/{self.shard_key(commit)}: {reason}, and a second read was right: the network or this machine "
                    "is faulty, the store is not; run again"
                )
            for key in (self.shard_key(commit), self.commit_key(commit)):
                self.store.create(f"quarantine/{key}", self.store.get(key))
                self.store.delete(key)
        except StoreError as error:
            return self.unless_quarantined(commit, error)
        return self._quarantined(commit, reason)

    def _quarantined(self, commit: Commit, reason: str) -> QuarantinedError:
        return QuarantinedError(
            f"{self.store.uri}/{self.shard_key(commit)}: {reason}; it was moved to quarantine/, "
            f"and its {commit.num_rows} rows are computed again when the recipe is run"
        )

    def unless_quarantined(self, commit: Commit, error: StoreError) -> StoreError:
        """Choose the error of a failed read; if the commit is gone too, another reader has moved both aside, and that is the error."""
        if self.store.info(self.commit_key(commit)) is not None:
            return error
        return self._quarantined(commit, "another reader found it damaged")


@dataclass(frozen=True)
class Shard:
    """A shard that is read row group by row group, every byte verified against its commit.

    Attributes:
        cache: where it is.
        commit: the shard's.
        fetch: where its bytes come from.
        footer: see ``open``.
    """

    cache: RowCache
    commit: Commit
    fetch: Fetch
    footer: Any

    @classmethod
    def open(cls, cache: RowCache, commit: Commit, fetch: Fetch) -> "Shard":
        """Read the footer.

        Raises:
            IntegrityError: its bytes differ from the commit; QuarantinedError if both have been moved aside.
        """
        return cls(cache, commit, fetch, read_footer(_fetch(cache, commit, fetch, commit.ranges[-1])))

    @property
    def metadata(self) -> Mapping[bytes, bytes]:
        """Key-value pairs that the writer left in the footer."""
        return self.footer.metadata or {}

    def group(self, index: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the rows of one row group; those of ``columns`` that there are, None for all.

        Raises:
            IntegrityError: its bytes differ from the commit; QuarantinedError if both have been moved aside.
        """
        part = self.commit.ranges[index]
        return read_group(self.footer, index, part, _fetch(self.cache, self.commit, self.fetch, part), columns)


def _fetch(cache: RowCache, commit: Commit, fetch: Fetch, part: ByteRange) -> bytes:
    try:
        data = fetch(cache.shard_key(commit), part)
    except StoreError as error:
        raise cache.unless_quarantined(commit, error) from error
    if data is None:
        raise cache.quarantine(commit, f"bytes {part.start} to {part.start + part.length} differ from their checksum")
    return data


def _parse_commit(name: str, data: bytes) -> Commit:
    """A commit of this name. Raises ValueError, KeyError or TypeError where the bytes are none, and VersionError."""
    if sha256_bytes(data) != name:
        raise ValueError("its content does not match its name")
    raw = json.loads(data)
    expect_version(raw["version"], "a commit")
    ranges = tuple(ByteRange(*part) for part in raw["ranges"])
    return Commit(name, raw["sha256"], raw["size_bytes"], tuple(raw["keys"]), raw["num_tokens"], ranges)
