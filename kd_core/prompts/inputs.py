"""What is classified, kept once by its content: images and texts in one file, found by their SHA-256.

Rows of a classification refer to their input by that hash, so row stores hold no image, and a row's key is content.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from kd_core.errors import ArtifactError

__all__ = ["HASH_WORDS", "INPUTS_FILE", "Inputs", "InputsWriter", "content_hash", "hash_words", "words_hash"]

INPUTS_FILE = "inputs.arrow"
HASH_WORDS = 8
"""32-bit words of a SHA-256."""
_SCHEMA = pa.schema([pa.field("sha256", pa.binary(32), nullable=False), pa.field("data", pa.large_binary(), nullable=False)])
_BATCH_BYTES = 16 << 20


def content_hash(data: bytes) -> str:
    """SHA-256 of an input, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def hash_words(sha256: str) -> tuple[int, ...]:
    """A hash as signed 32-bit words, the form in which a row refers to its input.

    >>> words_hash(hash_words("ff" * 32)) == bytes.fromhex("ff" * 32)
    True
    """
    return tuple(np.frombuffer(bytes.fromhex(sha256), "<i4").tolist())


def words_hash(words: Sequence[int]) -> bytes:
    """The 32 bytes behind ``hash_words``."""
    return np.asarray(words, "<i4").tobytes()


class InputsWriter:
    """Writes inputs to a file, each content once."""

    def __init__(self, path: Path) -> None:
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._seen: set[str] = set()
        self._rows: list[tuple[bytes, bytes]] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def add(self, data: bytes) -> str:
        """Keep an input; its hash, 64 hex digits."""
        found = content_hash(data)
        if found not in self._seen:
            self._seen.add(found)
            self._rows.append((bytes.fromhex(found), data))
            self._bytes += len(data)
            if self._bytes >= _BATCH_BYTES:
                self._flush()
        return found

    def _flush(self) -> None:
        if self._rows:
            hashes, data = zip(*self._rows, strict=True)
            self._writer.write_batch(pa.record_batch([pa.array(hashes, pa.binary(32)), pa.array(data, pa.large_binary())], schema=_SCHEMA))
        self._rows, self._bytes = [], 0


class Inputs:
    """Inputs of a file by hash. The file is mapped, not read: memory is that of what is used, and the file may be removed meanwhile."""

    def __init__(self, path: Path) -> None:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._place = {
            sha256: (number, row) for number, batch in enumerate(self._batches) for row, sha256 in enumerate(batch["sha256"].to_pylist())
        }

    @classmethod
    def none(cls) -> "Inputs":
        """No inputs at all: for a model that is looked at and not run."""
        empty = cls.__new__(cls)
        empty._batches, empty._place = [], {}
        return empty

    def __len__(self) -> int:
        return len(self._place)

    def read(self, sha256: bytes) -> bytes:
        """One input.

        Raises:
            ArtifactError: there is none of this hash.
        """
        found = self._place.get(sha256)
        if found is None:
            raise ArtifactError(f"no input has the hash {sha256.hex()}: rows and inputs are of different runs; run the recipe again")
        data: bytes = self._batches[found[0]]["data"][found[1]].as_py()
        return data
