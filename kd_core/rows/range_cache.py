"""Byte ranges of a remote store, kept on a local disk up to a limit.

A file is what one request brought, named by the sha256 of its ranges, so any number of processes and runs may share one
directory, and a range that was broken on this disk is fetched again. A store on this machine is read in place.
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from kd_core.errors import StoreError
from kd_core.fingerprint import sha256_bytes
from kd_core.rows.parquet import ByteRange
from kd_core.store import Store
from kd_core.store.local import make_directory

__all__ = ["RangeCache", "request_windows"]

_KEEP_SHARE = 0.9
"""Of the limit, after the oldest files were removed: room for the next ones without another look at the directory."""

_REQUEST_BYTES = 4 << 20
"""Of one request for many ranges: a round trip costs both ends as much time as a megabyte."""

_FRESH_BYTES = 32 << 20
"""In memory of ranges that came with others: they are asked for soon, or read from their copies."""

_COPY = re.compile("[0-9a-f]{64}")


def request_windows(parts: Sequence[ByteRange], wanted: Sequence[bool]) -> Iterator[tuple[ByteRange, ...]]:
    """Neighbouring ranges that are wanted, as many together as one request should bring.

    >>> parts = [ByteRange(start, 3 << 20, f"{start}", 64) for start in (0, 3 << 20, 6 << 20)] + [ByteRange(9 << 20, 9, "footer", 0)]
    >>> [len(window) for window in request_windows(parts, [True, False, True, True])]
    [1, 2]
    """
    window: list[ByteRange] = []
    for part, is_wanted in zip(parts, wanted, strict=True):
        if window and (not is_wanted or part.start + part.length - window[0].start > _REQUEST_BYTES):
            yield tuple(window)
            window = []
        if is_wanted:
            window.append(part)
    if window:
        yield tuple(window)


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
        self._locks: dict[str, threading.Lock] = {}
        self._fresh: dict[str, bytes] = {}  # by sha256: fetched for others, and not asked for yet
        self._size: int | None = None

    def keeps(self, size_bytes: int) -> bool:
        """Whether copies of so many bytes can all be kept."""
        return size_bytes <= self._limit

    def read(self, key: str, part: ByteRange, window: Sequence[ByteRange] = ()) -> bytes | None:
        """Bytes of a range of an object, verified; None where the store's are not right.

        Args:
            key: of the object.
            part: the range.
            window: neighbouring ranges in order, ``part`` among them, that will be wanted soon: one request brings them all.
        """
        if self._limit == 0 or self._store.local_path(key) is not None:
            return part.verified(self._store.get_range(key, part.start, part.length))
        window = window or (part,)
        path, start = self._path(window), window[0].start
        if (data := self._copy(path, part, start)) is not None:
            return data
        with self._locks.setdefault(path.name, threading.Lock()):  # whoever comes second finds a copy
            if (data := self._copy(path, part, start)) is not None:
                return data
            fetched = self._store.get_range(key, start, window[-1].start + window[-1].length - start)
            pieces = {piece.sha256: piece.verified(fetched[piece.start - start : piece.start - start + piece.length]) for piece in window}
            if None not in pieces.values():
                self._keep(path, fetched)
            found = pieces.pop(part.sha256)
            with self._lock:
                self._fresh |= {sha256: data for sha256, data in pieces.items() if data is not None}
                while sum(map(len, self._fresh.values())) > _FRESH_BYTES:
                    del self._fresh[next(iter(self._fresh))]
            return found

    def _path(self, window: Sequence[ByteRange]) -> Path:
        return self._directory / sha256_bytes("".join(part.sha256 for part in window).encode())

    def _copy(self, path: Path, part: ByteRange, start: int) -> bytes | None:
        """A range from memory or from the file of its window, which begins at ``start``; None if it is not there, or broken."""
        with self._lock:
            fresh = self._fresh.pop(part.sha256, None)
        if fresh is not None:
            return fresh
        with suppress(OSError), path.open("rb") as file:
            file.seek(part.start - start)
            data = part.verified(file.read(part.length))
            if data is not None:
                os.utime(path)
            return data
        return None

    def _keep(self, path: Path, data: bytes) -> None:
        try:
            make_directory(self._directory)
            handle, name = tempfile.mkstemp(prefix=path.name, dir=self._directory)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except OSError as error:
            raise StoreError(
                f"{self._directory}: what was fetched cannot be kept there: {error.strerror}; make room or correct run.disk_cache, "
                "or set run.disk_cache_bytes to 0"
            ) from error
        with self._lock:
            self._size = self._total() if self._size is None else self._size + len(data)
            if self._size > self._limit:
                self._evict()

    def _files(self) -> list[tuple[float, int, Path]]:
        """Copies, finished or not; nothing else that may lie in the directory is ours to remove."""
        found = []
        for path in self._directory.iterdir():
            with suppress(OSError):
                if _COPY.match(path.name):
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
