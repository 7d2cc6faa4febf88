"""A store's objects as a read-only Arrow file system: what Arrow and DuckDB read, they read in ranges, from any store.

Owns the one bridge between the Store protocol and Arrow. It shows the objects it was given and no others, so a reader
sees committed shards and never a stray file. Nothing can be written through it.
"""

import io
from collections.abc import Mapping
from typing import NoReturn

import pyarrow as pa
from pyarrow import fs

from kd_core.errors import StoreError
from kd_core.store.base import Store

__all__ = ["StoreFiles", "arrow_file_system"]


class _Object(io.RawIOBase):
    """One object as a seekable file; every read is one range."""

    def __init__(self, files: "StoreFiles", key: str) -> None:
        self.files, self.key, self.size, self.at = files, key, files.sizes[key], 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def read(self, size: int | None = -1) -> bytes:
        length = self.size - self.at if size is None or size < 0 else size
        try:
            data = self.files.store.get_range(self.key, self.at, length)
        except StoreError as error:  # Arrow keeps only its text
            self.files.error = error
            raise
        self.at += len(data)
        return data


class StoreFiles(fs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """The handler behind ``arrow_file_system``.

    Attributes:
        store: where the objects are.
        sizes: key -> bytes of every object that is visible.
        error: the last StoreError of a read, which on its way through Arrow becomes another one; None if there was none.
    """

    def __init__(self, store: Store, sizes: Mapping[str, int]) -> None:
        self.store, self.sizes = store, sizes
        self.error: StoreError | None = None

    def get_type_name(self) -> str:
        """Name of the file system, for Arrow's messages."""
        return "kd-store"

    def normalize_path(self, path: str) -> str:
        """Keys are normal as they are."""
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """Size of each path, or that it is not there."""
        return [
            fs.FileInfo(path, fs.FileType.File, size=self.sizes[path]) if path in self.sizes else fs.FileInfo(path, fs.FileType.NotFound)
            for path in paths
        ]

    def open_input_file(self, path: str) -> pa.PythonFile:
        """An object, for reading at any offset."""
        if path not in self.sizes:
            raise FileNotFoundError(path)
        return pa.PythonFile(_Object(self, path), mode="r")

    def open_input_stream(self, path: str) -> pa.PythonFile:
        """An object, for reading from its start."""
        return self.open_input_file(path)

    def _refuse(self, *_: object) -> NoReturn:
        raise PermissionError(f"{self.store.uri}: read-only through Arrow")

    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = delete_root_dir_contents = _refuse
    get_file_info_selector = move = open_append_stream = open_output_stream = _refuse


def arrow_file_system(store: Store, sizes: Mapping[str, int]) -> tuple[fs.PyFileSystem, StoreFiles]:
    """A file system over these objects, and its handler, which keeps the first cause of a failed read.

    Args:
        store: where the objects are.
        sizes: key -> bytes; no other object is visible.
    """
    handler = StoreFiles(store, sizes)
    return fs.PyFileSystem(handler), handler
