"""Training rows and their order.

Order is a pure function of (seed, step): every epoch is a fresh permutation drawn from (seed, epoch), so a resumed run,
or one on another number of ranks, sees the same rows at the same step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kd_core.softlabels.targets import Targets

__all__ = ["TokenRow", "TrainingData", "step_rows", "token_batches"]


@dataclass(frozen=True)
class TokenRow:
    """One sequence: token ids of prompt and answer, and the index of the first answer token."""

    ids: tuple[int, ...]
    first_supervised: int

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.first_supervised


@dataclass(frozen=True)
class TrainingData:
    """What a training run reads.

    Attributes:
        rows: training rows.
        targets: soft labels of row i, decoded on demand; None without soft supervision.
        validation: rows for the validation loss; may be empty.
    """

    rows: Sequence[TokenRow]
    targets: Callable[[int], Targets] | None
    validation: Sequence[TokenRow]


def step_rows(num_rows: int, batch_rows: int, *, seed: int, step: int) -> list[int]:
    """Indices of the rows of one optimiser step.

    Args:
        num_rows: rows there are, at least 1.
        batch_rows: rows a step; a batch may span epochs.
        seed: of the training run.
        step: 0-based.
    """
    indices: list[int] = []
    at = step * batch_rows
    while len(indices) < batch_rows:
        epoch, start = divmod(at, num_rows)
        order = np.random.Generator(np.random.Philox(key=(seed << 64) | epoch)).permutation(num_rows)
        taken = order[start : start + batch_rows - len(indices)]
        indices.extend(int(i) for i in taken)
        at += len(taken)
    return indices


def token_batches(rows: Sequence[TokenRow], budget_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, sorted by length and cut so that rows * longest <= budget (one row at least)."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(rows[i].ids) > budget_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
