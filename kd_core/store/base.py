"""The Store protocol: immutable objects under validated keys. Two implementations, one contract test.

Nothing is ever overwritten: ``create`` either makes the object, finds the very same bytes there, or says that other
bytes were first. That is the whole concurrency story; see ARCHITECTURE.md, "commit protocol".
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from kd_core.errors import StoreError

__all__ = ["ObjectInfo", "Store", "check_key"]

_PART = re.compile(r"[A-Za-z0-9_=+,.-]{1,200}")


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its key, its size, when it was written (seconds since the epoch), and S3's ETag ('' elsewhere)."""

    key: str
    size_bytes: int
    modified_seconds: float
    etag: str = ""


def check_key(key: str) -> str:
    """Return the key, or refuse it: parts of ``[A-Za-z0-9_=+,.-]`` joined by '/', no '..', not absolute.

    Raises:
        StoreError: for any other key.

    >>> check_key("artifacts/prompts/0a/record.json")
    'artifacts/prompts/0a/record.json'
    """
    parts = key.split("/")
    if len(key) > 900 or any(part in (".", "..") or not _PART.fullmatch(part) for part in parts):
        raise StoreError(f"object key {key!r} is refused: use parts of letters, digits and _=+,.- joined by '/'")
    return key


@runtime_checkable
class Store(Protocol):
    """Objects by key. All methods raise StoreError with the URI of what failed."""

    @property
    def uri(self) -> str:
        """Where the store is: 's3://bucket/prefix', or an absolute path."""
        ...

    def create(self, key: str, data: bytes | Path) -> bool:
        """Write an object if there is none, durably and all or nothing.

        Args:
            key: a valid key.
            data: the bytes, or a file to send (streamed, any size).

        Returns:
            True if the store now holds exactly these bytes (written now, or the same bytes were there);
            False if other bytes were there first; they are left alone.
        """
        ...

    def get(self, key: str) -> bytes:
        """All bytes of an object; StoreError if there is none."""
        ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from offset ``start``; fewer only at the object's end. StoreError if there is none."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Write an object to a local file (through a temporary file beside it); never a short file."""
        ...

    def info(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None if there is none."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, sorted by key. Temporary files are never listed."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none. For garbage collection and quarantine only."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The object's own file where the store is a local directory; None elsewhere. Read-only by contract."""
        ...
