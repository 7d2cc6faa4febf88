"""A store in a local directory: one file an object, made by an exclusive hard link.

Write protocol: temporary file beside the target, fsync, ``link`` (which fails if the name is taken), fsync of the
directory. A kill at any point leaves either no object or the whole one. Temporary names contain '~', which no key may,
so they are never listed and never read. Refused: file systems without hard links.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from kd_core.errors import StoreAccessError, StoreError
from kd_core.fingerprint import sha256_bytes, sha256_file
from kd_core.store.base import ObjectInfo, check_key

__all__ = ["LocalStore", "make_directory", "replacing"]

_COPY_BYTES = 4 << 20
_ADVICE = {
    errno.ENOSPC: "; free some space, or point run.store elsewhere",
    errno.EACCES: "; give this user the right to read and write there, or point run.store elsewhere",
    errno.EROFS: "; point run.store at a file system that can be written",
    errno.EPERM: "; the file system must support hard links: point run.store at one that does",
    errno.ENOTSUP: "; the file system must support hard links: point run.store at one that does",
}

_DENIED = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTSUP, errno.ENOTDIR)
"""Errors of the place itself: no other object there fares better."""


def _temporary(directory: Path) -> Path:
    return directory / f"{uuid.uuid4().hex}~"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write a local file all or nothing: through a temporary file beside it that takes its name at a clean exit."""
    make_directory(path.parent)
    temporary = _temporary(path.parent)
    try:
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Make a directory and its parents, so that the names survive a power cut; a ``.kd`` is for this user's eyes only."""
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir(exist_ok=True, mode=0o700 if directory.name == ".kd" else 0o777)
    _sync_directory(directory.parent)


def _write(path: Path, data: bytes | Path) -> None:
    with path.open("xb") as file:
        if isinstance(data, Path):
            with data.open("rb") as source:
                shutil.copyfileobj(source, file, _COPY_BYTES)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _same(path: Path, data: bytes | Path) -> bool:
    if isinstance(data, Path):
        return path.stat().st_size == data.stat().st_size and sha256_file(path) == sha256_file(data)
    return path.stat().st_size == len(data) and sha256_file(path) == sha256_bytes(data)


def _refuse(error: OSError) -> None:
    """A directory that cannot be listed is no empty one; one that is not there is."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class LocalStore:
    """Objects as files below one directory, which is made at the first write."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @property
    def uri(self) -> str:
        """The absolute path of the directory."""
        return str(self._root)

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _errors(self, doing: str, key: str, *, writes: bool = False) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            number, reason = error.errno or 0, error.strerror or str(error)
            if number == errno.ENOENT:
                reason = "its directory cannot be made; point run.store elsewhere" if writes else "no such object"
            denied = number in _DENIED or (writes and number == errno.ENOENT)
            kind = StoreAccessError if denied else StoreError
            raise kind(f"{self.uri}/{key}: cannot {doing}: {reason}{_ADVICE.get(number, '')}") from error

    def create(self, key: str, data: bytes | Path) -> bool:
        """Write an object if there is none; see ``Store.create``."""
        path = self._path(key)
        size = data.stat().st_size if isinstance(data, Path) else len(data)
        with self._errors(f"write {size:,} bytes", key, writes=True):
            make_directory(path.parent)
            temporary = _temporary(path.parent)
            try:
                _write(temporary, data)
                try:
                    os.link(temporary, path)
                    same = True
                except FileExistsError:
                    if not path.is_file():
                        raise
                    same = _same(path, data)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_directory(path.parent)
        return same

    def get(self, key: str) -> bytes:
        """All bytes of an object."""
        with self._errors("read", key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from offset ``start``; fewer only at the object's end."""
        assert min(start, length) >= 0, f"range {start}+{length} is not in an object"
        with self._errors("read", key), self._path(key).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def download(self, key: str, path: Path) -> None:
        """Copy an object to a local file, all or nothing."""
        source = self._path(key)
        with self._errors(f"copy to {path}", key), source.open("rb") as file, replacing(path) as target:
            shutil.copyfileobj(file, target, _COPY_BYTES)

    def info(self, key: str) -> ObjectInfo | None:
        """Size and time of an object, or None if there is none."""
        path = self._path(key)
        with self._errors("look at", key):
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return ObjectInfo(key, status.st_size, status.st_mtime) if path.is_file() else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every object whose key starts with ``prefix``, sorted by key."""
        if prefix:
            check_key(prefix.removesuffix("/"))
        found = []
        with self._errors("list", prefix):
            for directory, _, names in os.walk(self._root / prefix.rpartition("/")[0], onerror=_refuse):
                base = Path(directory).relative_to(self._root).as_posix()
                keys = (name if base == "." else f"{base}/{name}" for name in names if "~" not in name)
                found += [info for key in keys if key.startswith(prefix) and (info := self.info(key)) is not None]
        return iter(sorted(found, key=lambda info: info.key))

    def delete(self, key: str) -> None:
        """Remove an object; no error if there is none."""
        path = self._path(key)
        with self._errors("delete", key), suppress(NotADirectoryError):
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        """The object's own file; whether it exists or not."""
        return self._path(key)
