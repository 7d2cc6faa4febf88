"""Ids of a trimmed tokenizer against ids of the one it was trimmed from: rising, one to one, written beside the student.

Rows, labels and soft labels stay in the ids in which the teacher gave them; they are mapped when they are read.

Axes: V ids of the full tokenizer, S ids of the trimmed one.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kd_core.errors import TrainingError
from kd_core.store.versions import VERSION, expect_version

__all__ = ["TOKEN_MAP_FILE", "TokenMap", "read_token_map", "write_token_map"]

TOKEN_MAP_FILE = "token_map.json"


@dataclass(frozen=True)
class TokenMap:
    """Which ids were kept: trimmed id s is full id ``kept[s]``.

    Attributes:
        kept: full ids, rising, S of them.
        num_full: ids of the full tokenizer, V.
        source: fingerprint of the full tokenizer's vocabulary, as in ``tokenizer_identity``.
    """

    kept: tuple[int, ...]
    num_full: int
    source: str

    @cached_property
    def full_ids(self) -> np.ndarray:
        """Full id of each trimmed one, int64."""
        return np.array(self.kept, np.int64)

    @cached_property
    def trimmed_ids(self) -> np.ndarray:
        """Trimmed id of each full one, int64; -1 where it was removed."""
        found = np.full(self.num_full, -1, np.int64)
        found[self.full_ids] = np.arange(len(self.kept))
        return found

    def trim(self, ids: np.ndarray) -> np.ndarray:
        """Trimmed ids of full ones, int64.

        Raises:
            TrainingError: an id was removed.
        """
        found: np.ndarray = self.trimmed_ids[ids]
        if (found < 0).any():
            gone = int(np.asarray(ids)[found < 0][0])
            raise TrainingError(f"token id {gone} is not in the student's trimmed vocabulary; these rows are not those it was trimmed for")
        return found

    def restore(self, ids: np.ndarray) -> np.ndarray:
        """Full ids of trimmed ones, int64.

        >>> tokens = TokenMap((0, 3, 7), 8, "")
        >>> tokens.trim(np.array([7, 0])).tolist(), tokens.restore(np.array([2, 0])).tolist()
        ([2, 0], [7, 0])
        """
        found: np.ndarray = self.full_ids[ids]
        return found


def write_token_map(token_map: TokenMap, directory: Path) -> None:
    """Write token_map.json into a directory: plain JSON, with the full id of every trimmed one in order."""
    about = {"version": VERSION, "source_vocabulary": token_map.source, "num_full": token_map.num_full, "full_ids": list(token_map.kept)}
    (directory / TOKEN_MAP_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")


def read_token_map(directory: Path) -> TokenMap | None:
    """The map in a model's directory; None where its vocabulary was not trimmed.

    Raises:
        VersionError: it is of another version.
    """
    path = directory / TOKEN_MAP_FILE
    if not path.is_file():
        return None
    about = json.loads(path.read_text(encoding="utf-8"))
    expect_version(about["version"], f"{path}: a token map", otherwise="use the package that wrote it")
    return TokenMap(tuple(about["full_ids"]), about["num_full"], about["source_vocabulary"])
