"""Training rows and their order.

Order is a pure function of (seed, step): rows are shuffled in two levels, blocks of neighbours first and then the rows
of some blocks together, so that a reader of remote shards needs few of them at a time. It never depends on how rows
lie in shards, on the number of ranks, or on where a run was broken. Up to BLOCK_ROWS * BUFFER_BLOCKS rows it is one
shuffle of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from kd_core.errors import SoftLabelError
from kd_core.softlabels.targets import Targets, concatenate
from kd_core.tokens.batches import TokenRow

__all__ = ["BLOCK_ROWS", "BUFFER_BLOCKS", "MemoryRows", "Rows", "TrainingData", "step_rows"]

BLOCK_ROWS = 64
"""Neighbours that stay in one buffer: as many as a row group of a shard holds."""
BUFFER_BLOCKS = 64
"""Blocks that are shuffled together."""


class Rows(Protocol):
    """Training rows by number, read when they are needed."""

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each row, int32, shape (rows,)."""
        ...

    @property
    def first_supervised(self) -> np.ndarray:
        """Index of each row's first answer token, int32, shape (rows,)."""
        ...

    def prefetch(self, numbers: Sequence[int], *, soft: bool) -> None:
        """Start to fetch rows that will be read soon, with ``soft`` their soft labels too; returns at once."""
        ...

    def expect(self, numbers: Sequence[int]) -> None:
        """Hear of rows that will be read in a while: fetch them where that lets go of none that is read before; returns at once."""
        ...

    def read(self, numbers: Sequence[int]) -> list[TokenRow]:
        """Rows, in the order asked for."""
        ...

    def targets(self, numbers: Sequence[int]) -> Targets:
        """Soft labels of rows, their positions one after the other in the order asked for.

        Raises:
            SoftLabelError: these rows have none.
        """
        ...


@dataclass(frozen=True)
class MemoryRows:
    """Rows at hand.

    Attributes:
        rows: the rows.
        row_targets: soft labels of row i; None without soft supervision.
    """

    rows: Sequence[TokenRow]
    row_targets: Callable[[int], Targets] | None = None

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of each row."""
        return np.array([len(row.ids) for row in self.rows], np.int32)

    @property
    def first_supervised(self) -> np.ndarray:
        """Index of each row's first answer token."""
        return np.array([row.first_supervised for row in self.rows], np.int32)

    def prefetch(self, numbers: Sequence[int], *, soft: bool) -> None:
        """Do nothing: there is nothing to fetch."""

    def expect(self, numbers: Sequence[int]) -> None:
        """Do nothing: there is nothing to fetch."""

    def read(self, numbers: Sequence[int]) -> list[TokenRow]:
        """Rows, in the order asked for."""
        return [self.rows[i] for i in numbers]

    def targets(self, numbers: Sequence[int]) -> Targets:
        """Soft labels of rows, in the order asked for."""
        if self.row_targets is None:
            raise SoftLabelError("the objective has a soft part and these rows have no soft labels")
        return concatenate([self.row_targets(i) for i in numbers])


@dataclass(frozen=True)
class TrainingData:
    """Data of a training run: training rows, and rows for the validation loss (may be empty)."""

    rows: Rows
    validation: Sequence[TokenRow]


def step_rows(num_rows: int, batch_rows: int, *, seed: int, step: int) -> list[int]:
    """Numbers of the rows of one optimiser step.

    Args:
        num_rows: rows there are, at least 1.
        batch_rows: rows a step; a batch may span epochs.
        seed: of the training run.
        step: 0-based.
    """
    numbers: list[int] = []
    at = step * batch_rows
    while len(numbers) < batch_rows:
        epoch, start = divmod(at, num_rows)
        ends, _ = _buffers(num_rows, seed, epoch)
        buffer = int(np.searchsorted(ends, start, side="right"))
        order = _buffer_order(num_rows, seed, epoch, buffer)
        begin = start - (int(ends[buffer - 1]) if buffer else 0)
        taken = order[begin : begin + batch_rows - len(numbers)]
        numbers.extend(int(i) for i in taken)
        at += len(taken)
    return numbers


@lru_cache(maxsize=4)
def _buffers(num_rows: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Place in the epoch at which each buffer ends; and the blocks in their order, BUFFER_BLOCKS a buffer."""
    blocks = np.random.Generator(np.random.Philox(key=(seed << 64) | epoch)).permutation(-(-num_rows // BLOCK_ROWS))
    sizes = np.minimum(BLOCK_ROWS, num_rows - blocks * BLOCK_ROWS)
    return np.add.reduceat(sizes, np.arange(0, len(blocks), BUFFER_BLOCKS)).cumsum(), blocks


@lru_cache(maxsize=4)
def _buffer_order(num_rows: int, seed: int, epoch: int, buffer: int) -> np.ndarray:
    blocks = np.sort(_buffers(num_rows, seed, epoch)[1][buffer * BUFFER_BLOCKS : (buffer + 1) * BUFFER_BLOCKS])
    rows = (blocks[:, None] * BLOCK_ROWS + np.arange(BLOCK_ROWS)).ravel()
    rows = rows[rows < num_rows]
    return rows[np.random.Generator(np.random.Philox(key=(seed << 64) | epoch, counter=buffer)).permutation(len(rows))]
