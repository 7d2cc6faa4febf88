"""Way in which a classifier reads rows in training: the input behind a hash, through the model's own processor.

Axes: N rows of a batch, V classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.losses.objective import StepWeights, supervised_loss
from kd_core.recipe import Run
from kd_core.softlabels.targets import Targets, move
from kd_core.teacher.classifiers import InputReader
from kd_core.tokens.batches import TokenRow, sent
from kd_core.tokens.class_rows import input_hash, number_of
from kd_core.train.batches import Layout, MicroBatch
from kd_core.train.objective_model import ObjectiveModel
from kd_core.train.speed import Flops

__all__ = ["ClassReading"]


class _ClassObjective(ObjectiveModel):
    """A classifier with the loss on top. Its logits are the model's own, so there is nothing to compare them with."""

    def hidden(self, batch: MicroBatch, *, bf16: bool = False) -> Tensor:
        """The logits of a batch, float32, shape (N, V)."""
        with torch.autocast(batch.labels_N.device.type, torch.bfloat16, enabled=bf16):
            logits_NV: Tensor = self.model(**batch.inputs).logits
        return logits_NV.float()

    def _of_logits(self, hidden_NH: Tensor, batch: MicroBatch, weights: StepWeights) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised_loss(hidden_NH, batch.labels_N, batch.targets, weights, self._divergence)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """The logits, which ``hidden`` gave already."""
        return hidden_NH

    def check(self, rows: list[TokenRow], layout: Layout) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class _ClassLayout:
    """Rows as a batch of inputs.

    Attributes:
        reader: prepares inputs.
        budget_tokens: tokens a batch, each input counted as the longest.
        device: where it is run.
        packed: never: a row has one position.
    """

    reader: InputReader
    budget_tokens: int
    device: torch.device
    packed: bool = False

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows of each batch."""
        size, numbers = self.reader.batch_size(self.budget_tokens), list(range(len(lengths)))
        return [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def batch(self, rows: Sequence[TokenRow], targets: Targets | None = None, *, share: float = 1.0) -> MicroBatch:
        """Rows, in this order, as one batch."""
        inputs = {name: sent(value, self.device) for name, value in self.reader.batch([input_hash(row) for row in rows]).items()}
        at_N = torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64)
        rows_N, positions_N = (sent(at, self.device) for at in at_N)
        labels_N = sent(torch.tensor([number_of(row) for row in rows]), self.device)
        num_tokens = inputs["input_ids"].numel() if "input_ids" in inputs else len(rows) * self.reader.cost
        found = None if targets is None else move(targets, self.device)
        return MicroBatch(inputs, (rows_N, positions_N), labels_N, num_tokens, found, share)


@dataclass(frozen=True)
class ClassReading:
    """Reading of inputs by a classifier; a ``Reading``."""

    reader: InputReader
    objective_model: type[ObjectiveModel] = _ClassObjective

    def layout(self, model: PreTrainedModel, run: Run, device: torch.device, *, packable: bool) -> Layout:
        """Batches within run.micro_batch_tokens."""
        return _ClassLayout(self.reader, run.micro_batch_tokens, device)

    def backbone(self, model: PreTrainedModel) -> nn.Module:
        """The whole model."""
        whole: nn.Module = model
        return whole

    def flops(self, model: PreTrainedModel, num_columns: int) -> Flops | None:
        """None: families of classifiers differ too much to count them."""
        return None
