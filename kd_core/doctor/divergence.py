"""Checks of the divergence: mass outside what was kept is never free, and the gradient is that of the loss, T^2 included.

Axes: N supervised positions, H hidden size, V vocabulary columns.
"""

import math

import torch
from torch import Tensor

from kd_core.doctor.findings import Skipped
from kd_core.doctor.labels import model_logits
from kd_core.doctor.subject import Subject, temperatures_of
from kd_core.errors import SoftLabelError, TrainingError
from kd_core.losses import StepWeights, fused_loss, soft_divergence
from kd_core.softlabels import Targets, concatenate
from kd_core.softlabels.targets import DenseTargets, SampledTargets, move
from kd_core.tokens.batches import collate
from kd_core.train.batches import TokenLayout
from kd_core.train.objective_model import ObjectiveModel

__all__ = ["check_mass_outside", "check_slope"]

_LEAST_RISE = 0.002  # of the kept ids' mass: the least a divergence says to half of it being moved is 0.01 (jsd with beta 0.1 or 0.9)
_LEAST_TAIL = 1e-3  # mass outside the kept ids below which moving it shows nothing
_LEAST_PULL = 0.01  # of the mass outside, in the gradient of a student that is too sure of the kept ids
_SLOPE_TOLERANCE = 0.02
_LOGIT_STEP = 0.02  # largest change of a logit: third-order terms are far below the tolerance


def check_mass_outside(subject: Subject) -> str:
    """Student mass moved outside the kept ids raises the divergence; moved inside, it still leaves a gradient."""
    teacher, _ = subject.scored()
    rows = [subject.rows[i] for i in subject.few]
    batch = collate([(row.ids, row.first_supervised) for row in rows]).to(teacher.device)
    targets = move(concatenate([subject.targets[i] for i in subject.few]), teacher.device)
    if isinstance(targets, DenseTargets):
        raise Skipped("dense soft labels keep all columns")
    temperature, divergence = temperatures_of(subject.recipe)[0], subject.recipe.objective.divergence
    logits_NV = model_logits(teacher, batch).detach().float()
    kept_NV = _kept(targets, logits_NV)
    open_N = ~kept_NV.all(-1)
    if not bool(open_N.any()):
        raise Skipped("every position keeps all columns")
    log_q_NV = torch.log_softmax(logits_NV / temperature, -1)
    inside_N1, outside_N1 = (torch.logsumexp(log_q_NV.masked_fill(mask, -torch.inf), -1, keepdim=True) for mask in (~kept_NV, kept_NV))

    def divergence_where(kept_shift_N1: Tensor) -> tuple[float, Tensor]:
        """D with the kept ids' log-odds moved, and its gradient by the logits."""
        moved_NV = (logits_NV + temperature * kept_shift_N1 * kept_NV).requires_grad_()
        found_N = soft_divergence(moved_NV, targets, divergence, temperature=temperature)
        (gradient_NV,) = torch.autograd.grad(found_N[open_N].sum(), moved_NV)
        return float(found_N.detach()[open_N].mean()), gradient_NV[open_N]

    own, _ = divergence_where(torch.zeros_like(inside_N1))
    halved_N1 = inside_N1 - math.log(2.0)
    less_N1 = halved_N1 - torch.log1p(-halved_N1.exp()) - (inside_N1 - outside_N1)
    less, _ = divergence_where(torch.where(open_N[:, None], less_N1, 0.0))
    least = _LEAST_RISE * float(inside_N1[open_N].exp().mean())
    numbers = f"{divergence.kind} {own:.3g} as the teacher, {less:.3g} with half of the kept ids' mass moved outside"
    if not less > own + least:
        raise SoftLabelError(f"{numbers}; it must rise by {least:.2g}: mass outside is free, as if normalised over k; please report it")
    tail = float(outside_N1.exp().max())
    if isinstance(targets, SampledTargets) or tail < _LEAST_TAIL:
        return f"{numbers} (a rise of {least:.2g} required)"
    _, gradient_NV = divergence_where(torch.full_like(inside_N1, math.log(2.0)))
    pull, bound = float(gradient_NV.abs().max()), _LEAST_PULL * tail
    if not pull > bound:
        raise SoftLabelError(f"{numbers}; too sure of them, its gradient is {pull:.2g}, above {bound:.2g} required: it is clamped at zero")
    return f"{numbers} (a rise of {least:.2g} required); too sure of them, its gradient is {pull:.2g} (above {bound:.2g} required)"


def _kept(targets: Targets, logits_NV: Tensor) -> Tensor:
    """True at the ids that the labels hold."""
    kept_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
    if isinstance(targets, SampledTargets):
        rows_E = torch.repeat_interleave(torch.arange(len(kept_NV), device=kept_NV.device), targets.offsets_N1.diff())
        kept_NV[rows_E, targets.ids_E] = True
        return kept_NV
    assert not isinstance(targets, DenseTargets), "dense labels hold all of them"
    return kept_NV.scatter(-1, targets.ids_NK, True)


def check_slope(subject: Subject) -> str:
    """The loss falls along its gradient as fast as the gradient says, at every temperature of the recipe."""
    recipe, student = subject.recipe, subject.student
    soft = recipe.objective.supervision == "soft"
    rows = [subject.rows[i] for i in subject.few]
    stored = concatenate([subject.targets[i] for i in subject.few]) if soft else None
    model = ObjectiveModel(student.model, num_columns=student.num_columns, divergence=recipe.objective.divergence)
    batch = TokenLayout(packed=False, budget_tokens=1, device=student.device).batch(rows, stored)
    if type(student.model.get_output_embeddings()) is not torch.nn.Linear:
        raise Skipped("the head is no plain linear projection")
    with torch.no_grad():
        hidden_NH, projection = model.hidden(batch), model.projection()

    def loss_at(hidden_NH: Tensor, weights: StepWeights) -> Tensor:
        return fused_loss(hidden_NH, projection, batch.labels_N, batch.targets, weights, recipe.objective.divergence)[0]

    found = []
    for temperature in temperatures_of(recipe) if soft else (1.0,):
        weights = StepWeights(hard=0.0, soft=1.0, temperature=temperature) if soft else StepWeights(hard=1.0, soft=0.0, temperature=1.0)
        leaf_NH = hidden_NH.clone().requires_grad_()
        (gradient_NH,) = torch.autograd.grad(loss_at(leaf_NH, weights), leaf_NH)
        with torch.no_grad():
            unit_NH = gradient_NH / gradient_NH.norm()
            step = _LOGIT_STEP / float((projection.logits(hidden_NH + unit_NH) - projection.logits(hidden_NH)).abs().max())
            ahead, behind = (float(loss_at(hidden_NH + side * step * unit_NH, weights)) for side in (1, -1))
        found.append((temperature, (ahead - behind) / (2 * step * float(gradient_NH.norm()))))
    numbers = f"slope of the loss over its gradient: {', '.join(f'{ratio:.4f} at T = {temperature:g}' for temperature, ratio in found)}"
    if not all(abs(ratio - 1.0) <= _SLOPE_TOLERANCE for _, ratio in found):
        raise TrainingError(f"{numbers}; 1 within {_SLOPE_TOLERANCE:g} required: T^2 or a weight is in the loss or in the gradient alone")
    return f"{numbers} (1 within {_SLOPE_TOLERANCE:g} required)"
