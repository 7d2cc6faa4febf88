"""Loss and gradient of a few rows, through the module that the training loop runs, in any cut and layout of the batch."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kd_core.losses import StepWeights
from kd_core.recipe import Divergence, ForwardKL
from kd_core.softlabels import Targets, concatenate
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.packing import isolated_documents
from kd_core.train.batches import Layout, MicroBatch, TokenLayout
from kd_core.train.objective_model import ObjectiveModel

__all__ = ["Gradient", "distance", "hard_gradient", "loss_and_gradient", "norm"]

Gradient = dict[str, Tensor]
"""Of every parameter that the loss reaches, by name."""

_HARD = StepWeights(hard=1.0, soft=0.0, temperature=1.0)


def loss_and_gradient(
    student: LoadedModel,
    rows: Sequence[TokenRow],
    targets: Sequence[Targets] | None,
    weights: StepWeights,
    divergence: Divergence,
    *,
    layout: Layout,
    padding: int = 0,
    bf16: bool = False,
) -> tuple[float, dict[str, float], Gradient]:
    """Mean objective over supervised tokens, its parts, and its gradient; the model's own gradients are left empty.

    Args:
        student: in eval mode, so that nothing is dropped.
        rows: at least one.
        targets: soft labels, one entry a row; None without.
        weights: of the parts.
        divergence: of the soft part.
        layout: how rows are cut into micro-batches, which are added up.
        padding: more padded positions on the right of each micro-batch that is padded.
        bf16: products in bfloat16.
    """
    objective = ObjectiveModel(student.model, num_columns=student.num_columns, divergence=divergence, bf16=bf16)
    num_tokens = sum(row.num_supervised for row in rows)
    total, sums = 0.0, dict[str, float]()
    student.model.zero_grad(set_to_none=True)
    with isolated_documents(student.model) if layout.packed else contextlib.nullcontext():
        for part in layout.cut([len(row.ids) for row in rows]):
            stored = None if targets is None else concatenate([targets[i] for i in part])
            loss, parts = objective(_padded(layout.batch([rows[i] for i in part], stored), padding), weights)
            (loss / num_tokens).backward()
            total += float(loss.detach()) / num_tokens
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + float(value) / num_tokens
    gradient = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad(set_to_none=True)
    return total, sums, gradient


def hard_gradient(student: LoadedModel, rows: Sequence[TokenRow]) -> tuple[float, Gradient]:
    """Mean cross-entropy of rows, padded in one batch, and its gradient."""
    whole = TokenLayout(packed=False, budget_tokens=len(rows) * max(len(row.ids) for row in rows), device=student.device)
    loss, _, gradient = loss_and_gradient(student, rows, None, _HARD, ForwardKL(kind="forward_kl"), layout=whole)
    return loss, gradient


def _padded(batch: MicroBatch, padding: int) -> MicroBatch:
    if not padding:
        return batch

    def pad(values_BT: Tensor) -> Tensor:
        return torch.nn.functional.pad(values_BT, (0, padding))

    inputs = {name: pad(value) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()}
    return replace(batch, inputs=inputs)


def norm(gradient: Gradient) -> float:
    """Euclidean norm of all parameters' gradients as one vector."""
    return math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))


def distance(a: Gradient, b: Gradient) -> float:
    """Norm of the difference, as a share of the norm of ``b``; infinite where they reach other parameters."""
    if a.keys() != b.keys():
        return math.inf
    return math.sqrt(sum(float((a[name] - b[name]).square().sum()) for name in b)) / norm(b)
