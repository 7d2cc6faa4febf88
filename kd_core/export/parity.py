"""Whether an exported form of a model is still that model: distance between next-token distributions on a few rows.

Axes: B rows, T positions, N compared positions, V vocabulary columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.errors import KDError
from kd_core.tokens.batches import collate

__all__ = ["Bound", "Forward", "Parity", "compare_forms"]

_BATCH_ROWS = 2  # of different length, so that padding and its mask are part of what is compared

Forward = Callable[[Tensor, Tensor], Tensor]
"""(ids_BT, attention_BT), both int64 -> logits_BTV."""


@dataclass(frozen=True)
class Bound:
    """The largest distances at which a form still counts as the same model, nats a token."""

    mean_kl: float
    max_kl: float


@dataclass(frozen=True)
class Parity:
    """How far an exported form is from the float model.

    Attributes:
        form: int8-dynamic, int8-weight-only or onnx.
        rows: texts compared.
        positions: next-token distributions compared.
        mean_kl: mean over positions of KL(float || form), nats.
        max_kl: the largest of them, nats.
        agreement: share of positions where both have the same most likely token.
        bound: what is required.
    """

    form: str
    rows: int
    positions: int
    mean_kl: float
    max_kl: float
    agreement: float
    bound: Bound

    @property
    def holds(self) -> bool:
        """Whether both distances are within the bound; not a number is outside."""
        return self.mean_kl <= self.bound.mean_kl and self.max_kl <= self.bound.max_kl

    def require(self) -> "Parity":
        """Itself.

        Raises:
            KDError: a distance is above its bound.
        """
        if not self.holds:
            raise KDError(
                f"{self.form}: this form is not the same model: KL to the float model is {self.mean_kl:.2g} on average (at most "
                f"{self.bound.mean_kl:g}) and {self.max_kl:.2g} at worst (at most {self.bound.max_kl:g}), over {self.positions} "
                "positions; nothing was written, export the float model instead"
            )
        return self


@torch.inference_mode()
def compare_forms(
    form: str, reference: Forward, other: Forward, rows: Sequence[Sequence[int]], *, num_columns: int, bound: Bound
) -> Parity:
    """Compare the next-token distributions of two forms at every position of every row.

    Args:
        form: name of the other form.
        reference: the float model.
        other: the exported form.
        rows: token ids, at least two a row.
        num_columns: logit columns that mean something; both sides are cut to them before they are normalised.
        bound: goes into the result; nothing is refused here.
    """
    kls, agreements = [], []
    for start in range(0, len(rows), _BATCH_ROWS):
        batch = collate([(ids, 1) for ids in rows[start : start + _BATCH_ROWS]])
        log_p_NV, log_q_NV = (
            torch.log_softmax(forward(batch.ids_BT, batch.attention_BT)[batch.predict_BT][:, :num_columns].double(), -1)
            for forward in (reference, other)
        )
        kls.append((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1))
        agreements.append(log_p_NV.argmax(-1) == log_q_NV.argmax(-1))
    kl_N, same_N = torch.cat(kls).clamp(min=0.0), torch.cat(agreements)  # below zero by rounding alone: both sides are whole
    return Parity(form, len(rows), len(kl_N), float(kl_N.mean()), float(kl_N.max()), float(same_N.double().mean()), bound)
