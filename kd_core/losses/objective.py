"""The weighted objective of one optimiser step, and its parts for the log.

    L = hard_weight * CE(student, label) + soft_weight * T^2 * D(teacher_T || student_T) + feature_weight * F(inner states)

a mean over the supervised tokens of the whole step. Callers pass sums of micro-batches divided by the step's token
count, so splits of the batch cannot change it. F is in ``features``; the two other terms need logits only and are here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.losses.divergences import FORWARD_KL, soft_divergence
from kd_core.losses.schedule import value_at
from kd_core.recipe import Divergence, Objective
from kd_core.softlabels.targets import Targets

__all__ = ["StepWeights", "step_weights", "supervised_loss"]


@dataclass(frozen=True)
class StepWeights:
    """The objective's numbers at one step: weights and temperature as they act."""

    hard: float
    soft: float
    temperature: float
    feature: float = 0.0


def step_weights(objective: Objective, *, step: int, steps: int) -> StepWeights:
    """Weights and temperature at a step (0-based) of ``steps``. Without soft supervision: cross-entropy alone, weight 1."""
    if objective.supervision != "soft":
        return StepWeights(hard=1.0, soft=0.0, temperature=1.0)
    share = step / max(1, steps - 1)
    return StepWeights(
        value_at(objective.hard_weight, share),
        value_at(objective.soft_weight, share),
        value_at(objective.temperature, share),
        0.0 if objective.features is None else value_at(objective.features.weight, share),
    )


def supervised_loss(
    logits_NV: Tensor, labels_N: Tensor, targets: Targets | None, weights: StepWeights, divergence: Divergence = FORWARD_KL
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's first two terms summed over positions, and their parts.

    Args:
        logits_NV: student logits at supervised positions, cut to the shared columns.
        labels_N: the tokens that stand there, int64.
        targets: soft labels of the same positions; required when weights.soft > 0.
        weights: numbers of this step.
        divergence: D.

    Returns:
        The objective, a scalar sum over N in nats; and detached sums {'hard': CE, 'soft': D without T^2}.

    Raises:
        SoftLabelError: soft labels are asked for and missing; there is no fallback to hard labels.
    """
    hard = torch.nn.functional.cross_entropy(logits_NV.float(), labels_N, reduction="sum")
    parts = {"hard": hard.detach()}
    loss = weights.hard * hard
    if weights.soft > 0.0:
        if targets is None:
            raise SoftLabelError("the objective has a soft part and these rows have no soft labels")
        soft = soft_divergence(logits_NV, targets, divergence, temperature=weights.temperature).sum()
        parts["soft"] = soft.detach()
        loss = loss + weights.soft * weights.temperature**2 * soft
    return loss, parts
