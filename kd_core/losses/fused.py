"""The objective from hidden states, without the logits of a batch: loss and gradients in one pass, gradient made in the forward.

Axes: N supervised positions, H hidden size, V vocabulary columns, C positions of a chunk, R of a block, K kept ids,
B outcomes, E entries of sampled rows.

A chunk of positions goes through three matrix products, which are the floor: logits, and the gradients to hidden states and to
the projection. Between them, a few positions at a time so that a core's cache holds them, the logits become probabilities
and then the gradient in place. What exists at once is one chunk's logits and the projection's gradient. Plain torch: the
same code on CPU and CUDA. ``divergences`` and ``objective`` are the readable reference, and what the tests compare with.

Dense targets have as many outcomes as columns; their vocabularies are small, and they take the reference path.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.losses.divergences import check_sampled, divergence_of_outcomes, teacher_outcomes
from kd_core.losses.objective import StepWeights, supervised_loss
from kd_core.recipe import Divergence, ForwardKL
from kd_core.softlabels.targets import DenseTargets, SampledTargets, Targets, TopKTargets

__all__ = ["Projection", "fused_loss"]

_CHUNK_BYTES = 64 << 20
"""Of the float32 logits that exist at once: 341 positions at V = 49,152, 110 at 151,936. Smaller ones re-read the projection's gradient
too often."""
_CACHE_BYTES = 2 << 20
"""Of a block of them on a CPU: passes over it stay in a core's second-level cache."""


@dataclass(frozen=True)
class Projection:
    """A model's output projection.

    Attributes:
        weight_VH: at least ``num_columns`` rows; those beyond them get no gradient.
        bias_V: or None.
        num_columns: columns that count.
        scale: factor of the logits.
        softcap: c of c tanh(z / c), after the factor; None for none.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    num_columns: int
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits over the valid columns, float32: the readable definition."""
        dtype = hidden_NH.dtype
        bias_V = None if self.bias_V is None else self.bias_V[: self.num_columns].to(dtype)
        logits_NV = torch.nn.functional.linear(hidden_NH, self.weight_VH[: self.num_columns].to(dtype), bias_V).float() * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


def fused_loss(
    hidden_NH: Tensor, projection: Projection, labels_N: Tensor, targets: Targets | None, weights: StepWeights, divergence: Divergence
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective summed over positions, and its parts: ``objective.supervised_loss`` of the projection's logits.

    Args:
        hidden_NH: where supervised tokens are predicted, any float dtype; products are made in it and summed in float32.
        projection: to logits.
        labels_N: the tokens that stand there, int64.
        targets: soft labels of the same positions; required when weights.soft > 0.
        weights: numbers of this step.
        divergence: D.

    Returns:
        The objective, a scalar sum over N in nats; and detached sums {'hard': CE, 'soft': D without T^2}.

    Raises:
        SoftLabelError: soft labels are asked for and missing, or not valid for this temperature, vocabulary or divergence.
    """
    soft = targets if weights.soft > 0.0 else None
    if weights.soft > 0.0 and targets is None:
        raise SoftLabelError("the objective has a soft part and these rows have no soft labels")
    if isinstance(soft, DenseTargets):
        return supervised_loss(projection.logits(hidden_NH), labels_N, soft, weights, divergence)
    if soft is not None and soft.common.num_columns != projection.num_columns:
        raise SoftLabelError(
            f"student logits have {projection.num_columns} columns, the soft labels {soft.common.num_columns}; cut both to the tokenizer"
        )
    if isinstance(soft, SampledTargets):
        check_sampled(soft, divergence, weights.temperature)
    loss, hard, soft_sum = _Fused.apply(  # type: ignore[no-untyped-call]
        hidden_NH, projection.weight_VH, projection.bias_V, projection, labels_N, soft, weights, divergence
    )
    parts = {"hard": hard}
    if soft is not None:
        parts["soft"] = soft_sum
    return loss, parts


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        projection, labels_N, targets, weights, divergence = given
        kept = None if targets is None else _kept(targets, weights, divergence)
        bias_V = None if bias_V is None else bias_V.detach()
        work = _Work(hidden_NH.detach(), weight_VH.detach(), bias_V, projection, learns=ctx.needs_input_grad[1])
        for chunk in work.chunks():
            work.logits(chunk)
            for block in work.blocks(chunk):
                _to_gradient(work, block, labels_N, kept, weights)
            work.products(chunk)
        ctx.save_for_backward(work.grad_hidden_NH, work.grad_weight_VH, work.grad_bias_V)
        ctx.mark_non_differentiable(work.hard, work.soft)
        loss = weights.hard * work.hard + weights.soft * weights.temperature**2 * work.soft
        return loss, work.hard, work.soft

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        for gradient in (hidden_NH, weight_VH, bias_V):
            if gradient is not None:
                gradient.mul_(grad.to(gradient.dtype))
        return hidden_NH, weight_VH, bias_V, None, None, None, None, None


class _Work:
    """Buffers of one call, and the three products."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, projection: Projection, *, learns: bool) -> None:
        self.projection, self.num = projection, len(hidden_NH)
        columns, device = projection.num_columns, hidden_NH.device
        self.hidden_NH = hidden_NH * projection.scale
        self.weight_VH = weight_VH[:columns].to(hidden_NH.dtype)
        self.bias_V = None if bias_V is None else bias_V[:columns].float() * projection.scale
        self.chunk = max(1, min(self.num, _CHUNK_BYTES // (4 * columns)))
        self.block = max(1, min(self.chunk, _CACHE_BYTES // (4 * columns))) if device.type == "cpu" else self.chunk
        self.logits_CV = torch.empty(self.chunk, columns, dtype=torch.float32, device=device)
        self.spare_RV = torch.empty(self.block, columns, dtype=torch.float32, device=device)
        self.grad_hidden_NH = torch.empty_like(hidden_NH)
        self.grad_weight_VH = torch.zeros_like(weight_VH, memory_format=torch.contiguous_format) if learns else None
        self.grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V)
        self.hard = torch.zeros((), device=device)
        self.soft = torch.zeros((), device=device)

    def chunks(self) -> list[slice]:
        """Positions, a chunk at a time."""
        return [slice(start, min(start + self.chunk, self.num)) for start in range(0, self.num, self.chunk)]

    def blocks(self, chunk: slice) -> list[tuple[slice, Tensor, Tensor]]:
        """Yield (positions, their logits, room for as many) of each block of a chunk."""
        found = []
        for start in range(chunk.start, chunk.stop, self.block):
            stop = min(start + self.block, chunk.stop)
            logits_RV = self.logits_CV[start - chunk.start : stop - chunk.start]
            found.append((slice(start, stop), logits_RV, self.spare_RV[: stop - start]))
        return found

    def logits(self, chunk: slice) -> None:
        """Make the first product: logits of a chunk, before the cap."""
        logits_CV = self.logits_CV[: chunk.stop - chunk.start]
        if self.hidden_NH.dtype == torch.float32:
            torch.mm(self.hidden_NH[chunk], self.weight_VH.t(), out=logits_CV)
        else:
            logits_CV.copy_(self.hidden_NH[chunk] @ self.weight_VH.t())
        if self.bias_V is not None:
            logits_CV += self.bias_V

    def products(self, chunk: slice) -> None:
        """Make the second and third product: the gradient in ``logits_CV`` to hidden states and, where it learns, to the projection."""
        grad_CV = self.logits_CV[: chunk.stop - chunk.start]
        if self.grad_bias_V is not None:
            self.grad_bias_V[: self.projection.num_columns] += grad_CV.sum(0) * self.projection.scale
        grad_CV = grad_CV.to(self.hidden_NH.dtype)
        self.grad_hidden_NH[chunk] = (grad_CV @ self.weight_VH) * self.projection.scale
        if self.grad_weight_VH is None:  # a frozen projection, under an adapter
            return
        grad_VH = self.grad_weight_VH[: self.projection.num_columns]
        if grad_VH.dtype == grad_CV.dtype:
            grad_VH.addmm_(grad_CV.t(), self.hidden_NH[chunk])
        else:
            grad_VH += grad_CV.t() @ self.hidden_NH[chunk]


class _Kept(Protocol):
    """Stored targets of the teacher, at the student's columns."""

    temperature: float

    def pick(self, positions: slice, logits_RV: Tensor) -> Tensor:
        """Logits / T at the kept columns of a block."""
        ...

    def part(self, positions: slice, picked: Tensor, mass_RV: Tensor) -> "_Part":
        """Divergence and its gradient, from exp(logits / T) of a block; ``mass_RV`` is as it was afterwards."""
        ...


@dataclass(frozen=True)
class _Part:
    """Divergence of a block, and its gradient to logits / T: ``factor * mass``, and ``amount`` more at some places.

    Attributes:
        value: sum of D over the block.
        sum_R1: row sums of the mass.
        factor_R1: of the mass.
        rows, columns: places.
        amount: added there.
    """

    value: Tensor
    sum_R1: Tensor
    factor_R1: Tensor
    rows: Tensor
    columns: Tensor
    amount: Tensor


class _KeptTopK:
    """Outcomes of top-k labels: k columns, and where k < V all the rest as one.

    With q the student's outcomes and a = dD / d log q, dD / d(z / T) is a_v - q_v sum(a) at a kept column, and
    (a_rest / q_rest - sum(a)) q_v at any other: one factor for all columns, and corrections at the kept ones.
    """

    def __init__(self, targets: TopKTargets, temperature: float, divergence: Divergence) -> None:
        self.temperature, self._divergence = temperature, divergence
        self._ids_NK, self._log_p_NB = targets.ids_NK, teacher_outcomes(targets, temperature)

    def pick(self, positions: slice, logits_RV: Tensor) -> Tensor:
        return logits_RV.gather(-1, self._ids_NK[positions]) / self.temperature

    def part(self, positions: slice, picked: Tensor, mass_RV: Tensor) -> _Part:
        ids_RK, log_p_RB = self._ids_NK[positions], self._log_p_NB[positions]
        kept_RK = picked.exp()
        has_rest = log_p_RB.shape[-1] > ids_RK.shape[-1]
        rest_R1 = mass_RV.scatter_(-1, ids_RK, 0.0).sum(-1, keepdim=True)  # summed without the kept: no cancellation where it is small
        mass_RV.scatter_(-1, ids_RK, kept_RK)
        sum_R1 = rest_R1 + kept_RK.sum(-1, keepdim=True)
        outcomes_RB = torch.cat([picked, rest_R1.log()], -1) if has_rest else picked
        log_q_RB = outcomes_RB - sum_R1.log()
        value, a_RB = _value_and_gradient(log_p_RB, log_q_RB, self._divergence)
        total_R1 = a_RB.sum(-1, keepdim=True)
        rest_factor_R1 = a_RB[:, -1:] / log_q_RB[:, -1:].exp() if has_rest else torch.zeros_like(total_R1)
        amount_RK = a_RB[:, : ids_RK.shape[-1]] - rest_factor_R1 * kept_RK / sum_R1
        rows_RK = torch.arange(len(ids_RK), device=ids_RK.device)[:, None].expand_as(ids_RK)
        return _Part(value, sum_R1, (rest_factor_R1 - total_R1) / sum_R1, rows_RK, ids_RK, amount_RK)


def _value_and_gradient(log_p_RB: Tensor, log_q_RB: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Sum of D over rows, and dD / d log q."""
    if isinstance(divergence, ForwardKL):
        return divergence_of_outcomes(log_p_RB, log_q_RB, divergence).sum(), -log_p_RB.exp()
    with torch.enable_grad():
        log_q_RB = log_q_RB.detach().requires_grad_()
        value = divergence_of_outcomes(log_p_RB, log_q_RB, divergence).sum()
        (a_RB,) = torch.autograd.grad(value, log_q_RB)
    return value.detach(), a_RB


class _KeptDraws:
    """Draws of sampled labels: forward KL is -H - sum (count / draws) log q, and its gradient q_v - count_v / draws.

    Where a student has only some of the teacher's ids (``softlabels.kept``), a position's counts sum to a share of the draws, and
    its gradient is share * q_v - count_v / draws.
    """

    def __init__(self, targets: SampledTargets) -> None:
        self.temperature, self._targets = targets.temperature, targets
        self._starts = targets.offsets_N1.tolist()
        self._share_E = targets.counts_E / targets.num_draws
        lengths_N = targets.offsets_N1.diff()
        self._row_E = torch.repeat_interleave(
            torch.arange(len(lengths_N), device=lengths_N.device), lengths_N, output_size=len(targets.ids_E)
        )
        counted_N = torch.zeros_like(lengths_N).index_add_(0, self._row_E, targets.counts_E)
        self._share_N1 = (counted_N / targets.num_draws)[:, None]

    def _entries(self, positions: slice) -> tuple[slice, Tensor, Tensor]:
        entries = slice(self._starts[positions.start], self._starts[positions.stop])
        return entries, self._row_E[entries] - positions.start, self._targets.ids_E[entries]

    def pick(self, positions: slice, logits_RV: Tensor) -> Tensor:
        _, row_E, ids_E = self._entries(positions)
        return logits_RV[row_E, ids_E] / self.temperature

    def part(self, positions: slice, picked: Tensor, mass_RV: Tensor) -> _Part:
        entries, row_E, ids_E = self._entries(positions)
        share_E = self._share_E[entries]
        sum_R1 = mass_RV.sum(-1, keepdim=True)
        log_q_E = picked - sum_R1[row_E, 0].log()
        value = -self._targets.cross_entropy_offset_N[positions].sum() - (share_E * log_q_E).sum()
        return _Part(value, sum_R1, self._share_N1[positions] / sum_R1, row_E, ids_E, -share_E)


def _kept(targets: Targets, weights: StepWeights, divergence: Divergence) -> _Kept:
    if isinstance(targets, SampledTargets):
        return _KeptDraws(targets)
    assert isinstance(targets, TopKTargets), "dense targets take the reference path"
    return _KeptTopK(targets, weights.temperature, divergence)


def _to_gradient(work: _Work, block: tuple[slice, Tensor, Tensor], labels_N: Tensor, kept: _Kept | None, weights: StepWeights) -> None:
    """Turn a block of logits into the objective's gradient to them, in place, and add to the sums.

    Both softmaxes come from one reading of the logits; at T = 1 they are one.
    """
    positions, logits_RV, spare_RV = block
    softcap, slope_RV = work.projection.softcap, None
    if softcap is not None:
        logits_RV.div_(softcap).tanh_()
        slope_RV = 1.0 - logits_RV.square()
        logits_RV.mul_(softcap)
    labels_R1 = labels_N[positions, None]
    logits_RV.sub_(logits_RV.amax(-1, keepdim=True))
    gold_R1 = logits_RV.gather(-1, labels_R1)
    part = None
    if kept is None:
        mass_RV = logits_RV.exp_()
        sum_R1 = mass_RV.sum(-1, keepdim=True)
        mass_RV.mul_(weights.hard / sum_R1)
    elif kept.temperature == 1.0:
        picked = kept.pick(positions, logits_RV)
        mass_RV = logits_RV.exp_()
        part = kept.part(positions, picked, mass_RV)
        sum_R1 = part.sum_R1
        mass_RV.mul_(weights.hard / sum_R1 + weights.soft * part.factor_R1)
    else:
        picked = kept.pick(positions, logits_RV)
        soft_RV = torch.div(logits_RV, kept.temperature, out=spare_RV).exp_()
        part = kept.part(positions, picked, soft_RV)
        mass_RV = logits_RV.exp_()
        sum_R1 = mass_RV.sum(-1, keepdim=True)
        mass_RV.mul_(weights.hard / sum_R1).addcmul_(soft_RV, weights.soft * kept.temperature * part.factor_R1)
    work.hard += (sum_R1.log() - gold_R1).sum()
    mass_RV.scatter_add_(-1, labels_R1, torch.full_like(gold_R1, -weights.hard))
    if part is not None and kept is not None:
        work.soft += part.value
        mass_RV.index_put_((part.rows, part.columns), weights.soft * kept.temperature * part.amount, accumulate=True)
    if slope_RV is not None:
        mass_RV.mul_(slope_RV)
