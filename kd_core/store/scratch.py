"""Temporary folders for large files: locked while in use, named when they are full, swept up after a kill.

A folder is ``kd-scratch-...`` below TMPDIR, locked for as long as its process uses it. A killed process lets go of its locks:
the first folder that another one of the same user makes there removes those that nobody holds. No clock and no process id decides.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kd_core.errors import KDError, StoreError

__all__ = ["scratch"]

_PREFIX = "kd-scratch-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded", "file write failed", "PytorchStreamWriter failed")
"""What libraries say that lose the number of the error on its way through Rust or C++."""
_swept: set[str] = set()


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty temporary folder for the length of the block.

    Raises:
        StoreError: no folder can be made there, or the file system became full in the block; with path and bytes.
    """
    path, lock = _make()
    try:
        yield path
    except KDError:
        raise
    except Exception as error:
        if _is_full(error):
            raise StoreError(_full(path)) from error
        raise
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make() -> tuple[Path, int]:
    root = ""
    try:
        root = tempfile.gettempdir()
        with _guard(root):  # between its making and its lock a folder looks like one that a killed process left
            if root not in _swept:
                _sweep(Path(root))
                _swept.add(root)
            path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            return path, _locked(path)
    except OSError as error:
        advice = "free some space, or set TMPDIR to a folder that this user can write"
        raise StoreError(
            f"{root or 'TMPDIR'}: cannot make a temporary folder ({error.strerror or error}){_free(root)}; {advice}"
        ) from error


@contextmanager
def _guard(root: str) -> Iterator[None]:
    """One maker at a time: the folder itself is what is locked."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(root: Path) -> None:
    for path in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, in use, or gone meanwhile
            if path.lstat().st_uid != os.getuid():
                continue
            descriptor = _locked(path)
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)


def _is_full(error: BaseException) -> bool:
    text = str(error)
    return (isinstance(error, OSError) and error.errno in _FULL) or any(word in text for word in _WORDS)


def _full(path: Path) -> str:
    held = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return (
        f"{path}: no space left: it holds {held:,} bytes{_free(str(path))}; free some, or set TMPDIR to a folder on a larger file system, "
        "and run again: what was finished is kept"
    )


def _free(root: str) -> str:
    try:
        return f", and {shutil.disk_usage(root).free:,} bytes are free there"
    except OSError:
        return ""
