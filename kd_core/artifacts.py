"""Artifacts: payload objects and the record that is written last.

    artifacts/<stage>/<fingerprint>/<digest>/<file>   payload, content-addressed by the digest over all files
    artifacts/<stage>/<fingerprint>/record.json       written last, conditionally; only its existence means done

Two workers that did the same work both upload, one record wins, the other adopts it. Reading verifies every sha256, twice
before it calls stored bytes damaged.
"""

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from kd_core.errors import ArtifactError, IntegrityError
from kd_core.fingerprint import canonical_json, fingerprint, sha256_bytes, sha256_file
from kd_core.store import Store
from kd_core.store.scratch import scratch
from kd_core.store.sealed import check_object, check_twice, read_parsed, seal, unseal

__all__ = [
    "Artifact",
    "Payload",
    "Record",
    "check_bytes",
    "check_file",
    "check_sizes",
    "find",
    "forget",
    "open_artifact",
    "publish",
    "read_bytes",
    "record_keys",
    "workspace",
]

_PACKAGES = ("knowledge-distillery", "torch", "transformers", "datasets", "accelerate", "pyarrow", "duckdb")


@dataclass(frozen=True)
class Payload:
    """One file of an artifact: name (may contain '/'), size and sha256 (64 hex)."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What was made, from what, by what; the commit of an artifact.

    Attributes:
        stage: name of the stage.
        fingerprint: 32 hex over identity and upstream.
        identity: the stage's own resolved fields, plain data.
        upstream: stage name -> fingerprint.
        files: payload objects.
        summary: what the stage hands to others beside its files, as ``summaries.plain`` writes it.
        seconds: that the stage took.
        provenance: code and package versions, host kind, time; no part of identity.
    """

    stage: str
    fingerprint: str
    identity: Mapping[str, Any]
    upstream: Mapping[str, str]
    files: tuple[Payload, ...]
    summary: Mapping[str, Any]
    seconds: float
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """32 hex over the names and checksums of all files: the identity of the bytes."""
        return files_digest(self.files)

    @property
    def key(self) -> str:
        """Object key of the record itself."""
        return _record_key(self.stage, self.fingerprint)

    @property
    def prefix(self) -> str:
        """Key prefix of the payload, without a trailing slash."""
        return f"{artifact_prefix(self.stage, self.fingerprint)}/{self.digest}"


@dataclass(frozen=True)
class Artifact:
    """A small, picklable reference to a finished artifact: what stages hand to each other."""

    stage: str
    fingerprint: str
    digest: str
    seconds: float = 0.0
    hit: bool = True


def files_digest(files: tuple[Payload, ...]) -> str:
    """32 hex over names and checksums, independent of order."""
    return fingerprint({file.name: file.sha256 for file in files})


def artifact_prefix(stage: str, fp: str) -> str:
    """Key prefix of all that belongs to one (stage, fingerprint)."""
    return f"artifacts/{stage}/{fp}"


def _record_key(stage: str, fp: str) -> str:
    return f"{artifact_prefix(stage, fp)}/record.json"


def record_keys(store: Store, stage: str | None = None) -> list[str]:
    """Keys of all records, or those of one stage, sorted."""
    keys = (info.key for info in store.list("artifacts/" if stage is None else f"artifacts/{stage}/"))
    return [key for key in keys if key.endswith("/record.json") and key.count("/") == 3]


def find(store: Store, stage: str, fp: str) -> Record | None:
    """The record of a finished artifact, or None.

    Raises:
        IntegrityError: the record is there and cannot be read as one, its own checksum does not hold, or it belongs elsewhere.
        VersionError: the record is of another version.
    """
    key = _record_key(stage, fp)
    if store.info(key) is None:
        return None
    return _read_record(store, stage, fp)


def _read_record(store: Store, stage: str, fp: str) -> Record:
    return read_parsed(store, _record_key(stage, fp), partial(_parse_record, stage, fp), what="record", advice=_advice(store))


def _parse_record(stage: str, fp: str, data: bytes) -> Record:
    body = unseal("record", data)
    record = Record(**{**body, "files": tuple(Payload(**file) for file in body["files"])})
    if (record.stage, record.fingerprint) != (stage, fp):
        raise ValueError(f"it is the record of {record.stage} {record.fingerprint}")
    return record


def _advice(store: Store) -> str:
    return f"kd cache repair --store {store.uri} --yes puts it aside, and the next run computes its stage again"


def forget(store: Store, record: Record) -> None:
    """Delete a record, so that its stage is computed again. Its payload is left to garbage collection."""
    store.delete(_record_key(record.stage, record.fingerprint))


def open_artifact(store: Store, artifact: Artifact) -> Record:
    """The record behind a reference.

    Raises:
        ArtifactError: there is none, or it holds other bytes than the reference names.
    """
    record = find(store, artifact.stage, artifact.fingerprint)
    if record is None:
        raise ArtifactError(f"{store.uri}/{_record_key(artifact.stage, artifact.fingerprint)} is gone; run the recipe again to make it")
    if record.digest != artifact.digest:
        raise ArtifactError(f"{artifact.stage} {artifact.fingerprint}: expected bytes {artifact.digest}, the store holds {record.digest}")
    return record


def expect_identity(record: Record, identity: Mapping[str, Any], upstream: Mapping[str, str]) -> None:
    """Assert that a record was made from this identity, field by field.

    Raises:
        ArtifactError: with the differing fields; a fingerprint collision or an edited record, never a cache miss.
    """
    stored = {**record.identity, **{f"upstream.{k}": v for k, v in record.upstream.items()}}
    wanted = {**identity, **{f"upstream.{k}": v for k, v in upstream.items()}}
    names = sorted(set(stored) | set(wanted))
    differ = [n for n in names if canonical_json(stored.get(n)) != canonical_json(wanted.get(n))]
    if differ:
        lines = "; ".join(f"{n}: stored {stored.get(n)!r}, recipe {wanted.get(n)!r}" for n in differ)
        raise ArtifactError(f"{record.stage} {record.fingerprint} was made from something else: {lines}")


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary directory in which a stage builds its files."""
    with scratch() as path:
        yield path


def provenance() -> dict[str, Any]:
    """Versions and time, for the record."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"packages": versions, "python": platform.python_version(), "machine": platform.machine(), "unix_time": int(time.time())}


def publish(
    store: Store,
    directory: Path,
    *,
    stage: str,
    fp: str,
    identity: Mapping[str, Any],
    upstream: Mapping[str, str],
    summary: Mapping[str, Any],
    seconds: float = 0.0,
) -> Record:
    """Upload every file below a directory, then write the record; adopt the record of whoever was first.

    Returns:
        The record that the store holds: ours, or an equal right to the same fingerprint by another worker.
    """
    files = tuple(
        Payload(path.relative_to(directory).as_posix(), path.stat().st_size, sha256_file(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    )
    record = Record(stage, fp, dict(identity), dict(upstream), files, dict(summary), seconds, provenance())
    for file in files:
        key = f"{record.prefix}/{file.name}"
        if not store.create(key, directory / file.name):
            raise IntegrityError(f"{store.uri}/{key} holds other bytes than its address says; move it elsewhere and run again")
    key = _record_key(stage, fp)
    return record if store.create(key, seal("record", asdict(record))) else _read_record(store, stage, fp)


def read_bytes(store: Store, record: Record, name: str) -> bytes:
    """One payload file, with its checksum verified.

    Raises:
        ArtifactError: the record has no such file.
        IntegrityError: the stored bytes differ from the record.
        StoreError: it is gone, or the reads failed.
    """
    file = next((file for file in record.files if file.name == name), None)
    if file is None:
        raise ArtifactError(f"{record.stage} {record.fingerprint} has no file {name!r}; it has {[f.name for f in record.files]}")
    key = f"{record.prefix}/{name}"

    def wrong(data: bytes) -> str | None:
        return None if sha256_bytes(data) == file.sha256 else "its sha256 differs from the record"

    return check_twice(lambda: store.get(key), wrong, where=f"{store.uri}/{key}", advice=_advice(store))


def materialize(store: Store, record: Record, directory: Path) -> Path:
    """All payload files as local files, verified: in place for a local store, else downloaded below ``directory``.

    Returns:
        The directory that holds them.
    """
    target = directory / record.digest
    for file in record.files:
        check_file(store, record, file, download=target / file.name)
    local = store.local_path(record.prefix + "/x")
    return local.parent if local is not None else target


def check_sizes(store: Store, record: Record) -> None:
    """Check that every payload file is there with its size; one listing, no byte is read.

    Raises:
        IntegrityError: with the first that is not.
    """
    sizes = {info.key: info.size_bytes for info in store.list(f"{record.prefix}/")} if record.files else {}
    for file in record.files:
        key = f"{record.prefix}/{file.name}"
        if key not in sizes:
            raise IntegrityError(f"{store.uri}/{key}: gone, and its record names it; {_advice(store)}")
        if sizes[key] != file.size_bytes:
            raise IntegrityError(f"{store.uri}/{key}: {sizes[key]:,} bytes, and its record says {file.size_bytes:,}; {_advice(store)}")


def check_bytes(store: Store, record: Record) -> None:
    """Check every byte of the payload where it is.

    Raises:
        IntegrityError: a file is gone, or its stored bytes differ from the record.
        StoreError: the reads failed.
    """
    for file in record.files:
        check_file(store, record, file)


def check_file(store: Store, record: Record, file: Payload, *, download: Path | None = None) -> None:
    """Check one file where it is, or as it is downloaded; errors as ``check_bytes``."""
    check_object(store, f"{record.prefix}/{file.name}", file.sha256, advice=_advice(store), download=download)
