"""Seam between a kind of task and the training loop: how rows become batches, and a batch the objective's logits."""

from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from kd_core.recipe import Run
from kd_core.tokens.packing import unpackable
from kd_core.train.batches import Layout, TokenLayout
from kd_core.train.objective_model import ObjectiveModel
from kd_core.train.speed import Flops, text_flops

__all__ = ["Reading", "TokenReading"]


class Reading(Protocol):
    """Way in which a model reads rows in training; a kind of task has one."""

    @property
    def objective_model(self) -> type[ObjectiveModel]:
        """Class of the module that holds model and objective."""
        ...

    def layout(self, model: PreTrainedModel, run: Run, device: torch.device, *, packable: bool) -> Layout:
        """How rows become batches; ``packable`` tells whether the rest of the run can do with packed documents."""
        ...

    def backbone(self, model: PreTrainedModel) -> nn.Module:
        """The part of the model that ``run.compile`` is about."""
        ...

    def flops(self, model: PreTrainedModel, num_columns: int) -> Flops | None:
        """Floating-point operations of a forward and backward pass; None where they are not known, and so no share of a rate is said."""
        ...


class TokenReading:
    """Reading of token rows by a causal language model."""

    objective_model = ObjectiveModel

    def layout(self, model: PreTrainedModel, run: Run, device: torch.device, *, packable: bool) -> Layout:
        """Packed where model and run can do it, else padded."""
        packed = packable and unpackable(model) is None and not run.compile
        return TokenLayout(packed, run.micro_batch_tokens, device)

    def backbone(self, model: PreTrainedModel) -> nn.Module:
        """The decoder without its head."""
        decoder: nn.Module = model.get_decoder()
        return decoder

    def flops(self, model: PreTrainedModel, num_columns: int) -> Flops:
        """Operations of its matrix products."""
        return text_flops(model, num_columns)
