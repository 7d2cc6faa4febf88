"""Small JSON objects under a checksum of their own, and reads that are repeated before stored bytes are called damaged.

Owns the form ``{"version": n, "<kind>": body, "sha256": over the body's canonical JSON}`` of records, ledger entries,
descriptions and checkpoint records, and the three ends of a read that is not right: a second one is right (a warning, and
work goes on), two give the same wrong bytes (those are stored), two give different ones (nothing is known of what is stored).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kd_core.errors import IntegrityError, StoreError, VersionError
from kd_core.fingerprint import canonical_json, sha256_bytes, sha256_file
from kd_core.store.base import Store
from kd_core.store.versions import VERSION, expect_version

__all__ = ["UNREADABLE", "check_object", "check_twice", "read_parsed", "seal", "unseal"]

T = TypeVar("T")

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What JSON of another form, or nested too deeply to be read, raises on the way to plain data."""

_LOG = logging.getLogger(__name__)
_BLOCK_BYTES = 16 << 20


_NAMES = {"record": "a record", "entry": "a ledger entry", "about": "a row table", "checkpoint": "a checkpoint"}


def seal(kind: str, body: Mapping[str, Any]) -> bytes:
    """Bytes of a sealed object."""
    plain = json.loads(canonical_json(body))
    return json.dumps({"version": VERSION, kind: plain, "sha256": sha256_bytes(canonical_json(plain))}, indent=1).encode()


def unseal(kind: str, data: bytes) -> dict[str, Any]:
    """Body of a sealed object.

    Raises:
        VersionError: it is of another version.
        ValueError: its checksum does not hold. One of ``UNREADABLE`` where it has another form.
    """
    raw = json.loads(data)
    expect_version(raw["version"], _NAMES[kind])
    body = raw[kind]
    if sha256_bytes(canonical_json(body)) != raw["sha256"]:
        raise ValueError("its checksum does not hold")
    found: dict[str, Any] = body
    return found


def check_twice(read: Callable[[], T], wrong: Callable[[T], str | None], *, where: str, advice: str) -> T:
    """Read something that can be checked; what is wrong is read a second time before it is called damaged.

    Args:
        read: reads it; its errors rise.
        wrong: what is wrong with what was read, or None.
        where: the object's address, for messages.
        advice: what to do about stored bytes that are wrong.

    Raises:
        IntegrityError: two reads gave the same wrong bytes.
        StoreError: two reads gave different wrong bytes.
    """
    first = read()
    reason = wrong(first)
    if reason is None:
        return first
    second = read()
    if wrong(second) is None:
        _LOG.warning("%s: a first read was wrong (%s) and a second one is right: the network or this machine is faulty", where, reason)
        return second
    if second != first:
        raise StoreError(
            f"{where}: two reads gave different bytes, both wrong ({reason}): the network or this machine is faulty, and nothing is known "
            "of the stored object; leave it, and run again"
        )
    raise IntegrityError(f"{where}: {reason}, in two reads; {advice}")


def read_parsed(store: Store, key: str, parse: Callable[[bytes], T], *, what: str, advice: str) -> T:
    """Read and parse one small object, as ``check_twice`` does.

    Args:
        store: where it is.
        key: its key.
        parse: raises one of ``UNREADABLE`` for bytes that are not such an object.
        what: what it should be, for messages: 'record'.
        advice: what to do if it is not.

    Raises:
        IntegrityError: the stored bytes are no such object.
        VersionError: they are one of another version.
        StoreError: there is no object, or the reads failed.
    """

    parsed: list[T] = []

    def wrong(data: bytes) -> str | None:
        try:
            parsed[:] = [parse(data)]
        except UNREADABLE as error:
            return f"not a valid {what} ({_short(error)})"
        except VersionError as error:
            raise VersionError(f"{store.uri}/{key}: {error}") from None
        return None

    check_twice(lambda: store.get(key), wrong, where=f"{store.uri}/{key}", advice=advice)
    return parsed[0]


def check_object(store: Store, key: str, sha256: str, *, advice: str, download: Path | None = None) -> None:
    """Check an object of any size against its recorded sha256, where it is or as it is downloaded.

    Args:
        store: where it is.
        key: its key.
        sha256: 64 hex, as recorded.
        advice: what to do if it differs.
        download: where to write it, if it is not a local file already.

    Raises:
        IntegrityError: it is gone, or other bytes are stored.
        StoreError: the reads failed.
    """
    where = f"{store.uri}/{key}"
    info = store.info(key)
    if info is None:
        raise IntegrityError(f"{where}: gone, and its record names it; {advice}")
    size_bytes = info.size_bytes

    def read() -> str:
        try:
            if (local := store.local_path(key)) is not None:
                return sha256_file(local)
            if download is None:
                return _streamed_sha256(store, key, size_bytes)
            download.parent.mkdir(parents=True, exist_ok=True)
            store.download(key, download)
            return sha256_file(download)
        except OSError as error:
            raise StoreError(f"{where}: cannot read: {error.strerror or error}") from error

    check_twice(read, lambda found: None if found == sha256 else "its sha256 differs from the record", where=where, advice=advice)


def _streamed_sha256(store: Store, key: str, size_bytes: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size_bytes, _BLOCK_BYTES):
        digest.update(store.get_range(key, start, min(_BLOCK_BYTES, size_bytes - start)))
    return digest.hexdigest()


def _short(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(error).split())[:200]
