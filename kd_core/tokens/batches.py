"""Rows of token ids as batches, and the one place that shifts.

Axes: B rows of a batch, T positions, N supervised positions of the whole batch (row by row, left to right).

``first_supervised`` is the index of the first answer token; the logits that predict token t stand at t-1, and ``collate`` alone
knows it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "TokenRow", "collate", "padded_batches", "sent", "token_batches"]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        ids_BT: token ids, int64; padding is 0 and masked.
        attention_BT: 1 on tokens, 0 on padding, int64.
        predict_BT: True where the logits of this position predict a supervised token.
        labels_N: the supervised tokens, int64, row by row: ``logits_BTV[predict_BT]`` lines up with them.
    """

    ids_BT: Tensor
    attention_BT: Tensor
    predict_BT: Tensor
    labels_N: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return Batch(*(sent(tensor, device) for tensor in (self.ids_BT, self.attention_BT, self.predict_BT, self.labels_N)))


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same tensor on a device. The host does not wait for a copy to a GPU, and does for one from it: its numbers may be read next."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def collate(rows: Sequence[tuple[Sequence[int], int]]) -> Batch:
    """Pad (token ids, first supervised index) rows to one batch. The only shift in the project.

    >>> batch = collate([([5, 6, 7, 8], 2), ([5, 9], 1)])
    >>> batch.labels_N.tolist(), batch.predict_BT.int().tolist()
    ([7, 8, 9], [[0, 1, 1, 0], [1, 0, 0, 0]])
    """
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    attention_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    predict_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (ids, first) in enumerate(rows):
        assert 1 <= first < len(ids), f"first supervised index {first} must be in 1..{len(ids) - 1}"
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        attention_BT[b, : len(ids)] = 1
        predict_BT[b, first - 1 : len(ids) - 1] = True
    labels_N = torch.cat([torch.tensor(ids[first:], dtype=torch.int64) for ids, first in rows])
    return Batch(ids_BT, attention_BT, predict_BT, labels_N)


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One sequence.

    Attributes:
        ids: token ids of prompt and answer; of a row that was read from storage an int32 array, never copied on its way to a batch.
        first_supervised: index of the first answer token.
    """

    ids: Sequence[int]
    first_supervised: int

    def __eq__(self, other: object) -> bool:
        """Equal ids, in whatever they are held."""
        if not isinstance(other, TokenRow):
            return NotImplemented
        return self.first_supervised == other.first_supervised and np.array_equal(self.ids, other.ids)

    @property
    def num_supervised(self) -> int:
        """Tokens that count in the loss."""
        return len(self.ids) - self.first_supervised


def token_batches(rows: Sequence[TokenRow], budget_tokens: int) -> Iterator[list[int]]:
    """Numbers of rows, sorted by length and cut so that rows * longest <= budget (one row at least)."""
    yield from padded_batches([len(row.ids) for row in rows], budget_tokens)


def padded_batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """``token_batches`` of rows of these lengths.

    >>> list(padded_batches([2, 5, 3, 2], 6))
    [[0, 3], [2], [1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > budget_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
