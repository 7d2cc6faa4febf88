"""Byte ranges of a remote store, kept on a local disk up to a limit.

Files are named by the sha256 of their bytes, so any number of processes and runs may share one directory, and a file
that was broken on this disk is fetched again. A store on this machine is read in place.
"""

import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from kd_core.fingerprint import sha256_bytes
from kd_core.store.base import Store

__all__ = ["RangeCache"]

_KEEP_SHARE = 0.9
"""Of the limit, after the oldest files were removed: room for the next ones without another look at the directory."""


class RangeCache:
    """Reads of one store through a directory.

    Args:
        store: where the bytes are.
        directory: where copies are kept.
        limit_bytes: of all copies together; 0 keeps none.
    """

    def __init__(self, store: Store, directory: Path, limit_bytes: int) -> None:
        self._store, self._directory, self._limit = store, directory, limit_bytes
        self._lock = threading.Lock()
        self._size: int | None = None

    def read(self, key: str, start: int, length: int, sha256: str) -> bytes:
        """Bytes [start, start + length) of an object: a right copy, or what the store gives. The caller verifies."""
        if self._limit == 0 or self._store.local_path(key) is not None:
            return self._store.get_range(key, start, length)
        path = self._directory / sha256[:2] / sha256
        with suppress(OSError):
            data = path.read_bytes()
            if sha256_bytes(data) == sha256:
                os.utime(path)
                return data
        data = self._store.get_range(key, start, length)
        if sha256_bytes(data) == sha256:
            self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        with self._lock:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
            self._size = (self._size or self._total()) + len(data)
            if self._size > self._limit:
                self._evict()

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self._directory.glob("*/*"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _total(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _evict(self) -> None:
        """Remove the copies that were not read for the longest time."""
        files = self._files()
        size = sum(length for _, length, _ in files)
        for _, length, path in files:
            if size <= _KEEP_SHARE * self._limit:
                break
            path.unlink(missing_ok=True)
            size -= length
        self._size = size
