"""The student and its objective as one module: what data-parallel and sharding wrappers see is the whole forward pass.

Axes: B rows, T positions, H hidden size, V vocabulary columns, N supervised positions of a micro-batch.

The backbone runs over all tokens, the output projection over supervised positions only, inside the loss. A plain linear
projection goes into the fused loss; another one (an adapter on it) through the readable reference, which gives the same
numbers. ``check_logits`` compares with the model's own logits before the first step, so that a head with a scale
that is not known here, or documents that see each other, end the run and not the student.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.errors import TrainingError
from kd_core.losses.features import FeatureLoss
from kd_core.losses.fused import Projection, fused_loss
from kd_core.losses.objective import StepWeights, supervised_loss
from kd_core.recipe import Divergence
from kd_core.softlabels.forward import logit_scale, module_outputs
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.packing import isolated_documents
from kd_core.train.batches import Layout, MicroBatch

__all__ = ["ObjectiveModel", "check_logits", "validation_sums"]

_Result = TypeVar("_Result")

_TOLERANCE = 1e-3
"""Largest distance to the model's own logits, relative to their spread over the vocabulary, in float32."""
_CHECKED_POSITIONS = 8
_VALIDATION_POSITIONS = 1024
"""Positions whose logits exist at once in validation."""


class ObjectiveModel(nn.Module):
    """A causal language model with the loss on top, and what the loss learns for itself: the projections of features."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_columns: int,
        divergence: Divergence,
        bf16: bool = False,
        feature_loss: FeatureLoss | None = None,
        places: tuple[nn.Module, ...] = (),
    ) -> None:
        """Wrap ``model``.

        Args:
            model: the student.
            num_columns: logit columns that count.
            divergence: D.
            bf16: train with bfloat16 products over float32 weights.
            feature_loss: F; None without features.
            places: the student's modules whose outputs F compares.
        """
        super().__init__()
        self.model, self.feature_loss = model, feature_loss
        self._num_columns, self._divergence, self._bf16, self._places = num_columns, divergence, bf16, places

    def forward(self, batch: MicroBatch, weights: StepWeights) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective summed over the batch's supervised positions, and its detached parts."""
        acts = self.feature_loss is not None and weights.feature > 0.0
        with module_outputs(self._places if acts else ()) as outputs:
            hidden_NH = self.hidden(batch, bf16=self._bf16)
        loss, parts = self._of_logits(hidden_NH, batch, weights)
        if self.feature_loss is None:
            return loss, parts
        if not acts:  # ranks wait for a gradient of every parameter, of idle ones too
            return loss + sum(0.0 * parameter.sum() for parameter in self.feature_loss.parameters()), parts
        assert batch.features is not None, "a feed without features raises before"
        feature = self.feature_loss([outputs[place][batch.predict_at] for place in self._places], batch.features)
        return loss + weights.feature * feature, {**parts, "feature": feature.detach()}

    def _of_logits(self, hidden_NH: Tensor, batch: MicroBatch, weights: StepWeights) -> tuple[Tensor, dict[str, Tensor]]:
        if type(self.model.get_output_embeddings()) is nn.Linear:
            return fused_loss(hidden_NH, self.projection(), batch.labels_N, batch.targets, weights, self._divergence)
        return supervised_loss(self.logits(hidden_NH), batch.labels_N, batch.targets, weights, self._divergence)

    def within(self, function: Callable[["ObjectiveModel"], _Result]) -> _Result:
        """A function of this module, with weights that a sharding wrapper has gathered as it does for ``forward``."""
        return function(self)

    def hidden(self, batch: MicroBatch, *, bf16: bool = False) -> Tensor:
        """The backbone's output where it predicts a supervised token, shape (N, H); bfloat16 products and result under ``bf16``."""
        with torch.autocast(batch.labels_N.device.type, torch.bfloat16, enabled=bf16):
            hidden_NH: Tensor = self.model.get_decoder()(**batch.inputs).last_hidden_state[batch.predict_at]
        return hidden_NH.to(torch.bfloat16) if bf16 else hidden_NH

    def check(self, rows: list[TokenRow], layout: Layout) -> None:
        """``check_logits`` of this model."""
        check_logits(self, rows, layout)

    def projection(self) -> Projection:
        """The output projection, if it is a plain linear one."""
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return Projection(head.weight, head.bias, self._num_columns, logit_scale(config), softcap)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """float32 logits over the valid columns, by whatever the projection is."""
        head, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        if type(head) is nn.Linear:
            return self.projection().logits(hidden_NH)
        logits_NV: Tensor = head(hidden_NH.to(next(head.parameters()).dtype))[:, : self._num_columns].float() * logit_scale(config)
        softcap = getattr(config, "final_logit_softcapping", None)
        return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


@torch.no_grad()
def check_logits(model: ObjectiveModel, rows: list[TokenRow], layout: Layout) -> None:
    """Compare our logits of some rows, together in one batch, with the model's own, each row alone and with its own attention.

    Call it outside ``isolated_documents`` and in eval mode; within that context the packed side runs.

    Raises:
        TrainingError: they differ by more than rounding.
    """
    own = []
    for row in rows:
        keep = min(_CHECKED_POSITIONS, row.num_supervised)
        ids_BT = torch.tensor(row.ids, dtype=torch.int64, device=layout.device)[None]
        own.append(model.model(input_ids=ids_BT, use_cache=False).logits[0, -keep - 1 : -1])
    with isolated_documents(model.model) if layout.packed else contextlib.nullcontext():
        hidden_NH = model.hidden(layout.batch(rows))
    ends = torch.tensor([row.num_supervised for row in rows]).cumsum(0).tolist()
    for row, own_NV, end in zip(rows, own, ends, strict=True):
        ours_NV = model.logits(hidden_NH[end - len(own_NV) : end])
        own_NV = own_NV[:, : ours_NV.shape[-1]].float()
        if not bool(torch.isfinite(own_NV).all()):
            continue  # the first step says so
        distance = float((ours_NV - own_NV).std(-1).square().mean().sqrt() / own_NV.std(-1).square().mean().sqrt())
        if not distance <= _TOLERANCE:
            raise TrainingError(
                f"{type(model.model).__name__}: logits of a row of {len(row.ids)} tokens are {distance:.2g} of their spread away from the "
                f"model's own (at most {_TOLERANCE:g}): its attention or its head does something that is not known here; please report it, "
                "and add it to kd_core/tokens/packing.py unpackable() or to logit_scale in kd_core/softlabels/forward.py"
            )


@torch.no_grad()
def validation_sums(model: ObjectiveModel, batches: Sequence[tuple[Sequence[TokenRow], float]], layout: Layout) -> Tensor:
    """Sums over the supervised tokens of rows. Leaves the model in its mode.

    Args:
        model: to measure.
        batches: rows of each forward pass, and 1, or 0 where they do not count.
        layout: of a batch.

    Returns:
        (negative log-likelihood in nats, number of tokens), float64, shape (2,).
    """
    was_training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=layout.device), 0.0
    for rows, share in batches:
        batch = layout.batch(rows)
        hidden_NH = model.hidden(batch)
        for start in range(0, len(hidden_NH), _VALIDATION_POSITIONS):
            at = slice(start, start + _VALIDATION_POSITIONS)
            total += share * nn.functional.cross_entropy(model.logits(hidden_NH[at]), batch.labels_N[at], reduction="sum").double()
        count += share * len(batch.labels_N)
    model.train(was_training)
    return torch.stack([total, torch.full_like(total, count)])
