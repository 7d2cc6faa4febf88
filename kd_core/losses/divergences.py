"""Divergences between a stored teacher and the student's logits: the readable reference.

Axes: N supervised positions, V vocabulary columns, K kept ids, B = K or K + 1 outcomes, E entries of sampled rows.

A stored teacher is a distribution over outcomes: every column (``dense``), or k ids and one outcome for all the rest
(``topk``), the same on both sides, so that student mass outside k is never free. Over outcomes each divergence is a true
one: zero, with zero gradient, where the student equals the teacher. ``sampled`` labels are draws: they allow what is linear
in the teacher's probabilities, which is forward KL, and are zero in expectation.

Every function returns one value a position, in nats, with gradient to the student's logits. T^2 is the caller's
(``objective``), so that it reaches value and gradient alike. ``fused`` does the same without the logits.
"""

import math

import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.recipe import Divergence, ForwardKL, JensenShannon, ReverseKL, SkewKL, TotalVariation
from kd_core.softlabels.targets import DenseTargets, SampledTargets, Targets, TopKTargets

__all__ = ["check_sampled", "divergence_of_outcomes", "forward_kl", "soft_divergence", "teacher_outcomes"]

FORWARD_KL = ForwardKL(kind="forward_kl")
_ROUNDING = 1e-5
"""Probabilities that differ by this share of themselves are equal: |p - q| has no slope at zero, and rounding must not choose one. float32
logits near 100 are up to 4e-6 off; a bound that is no share would lose a large vocabulary, whose probabilities are all small.
"""
_LEAST_LOG_TAIL = -104.0
"""A tail that was zero in float32 is some mass below e^-103 all the same: reverse divergences stay finite."""


def forward_kl(logits_NV: Tensor, targets: Targets, *, temperature: float) -> Tensor:
    """KL(teacher_T || student_T) = sum_v p_v (log p_v - log q_v), with q = softmax(logits / T): see ``soft_divergence``.

    Source: Hinton et al. 2015, eq. 4; tail outcome and systematic draws: ours.
    """
    return soft_divergence(logits_NV, targets, FORWARD_KL, temperature=temperature)


def soft_divergence(logits_NV: Tensor, targets: Targets, divergence: Divergence, *, temperature: float) -> Tensor:
    """D(teacher_T || student_T) at each position.

    Args:
        logits_NV: student logits, cut to the shared columns; computed on in float32.
        targets: of the same N positions, on the same device.
        divergence: D.
        temperature: T > 0.

    Returns:
        float32, shape (N,), nats. For sampled targets an unbiased estimate, which may be negative and is not clamped.

    Raises:
        SoftLabelError: the targets are not valid at this temperature, of another vocabulary, or for another divergence.
    """
    if logits_NV.shape[-1] != targets.common.num_columns:
        raise SoftLabelError(
            f"student logits have {logits_NV.shape[-1]} columns, the soft labels {targets.common.num_columns}; cut both to the tokenizer"
        )
    log_q_NV = torch.log_softmax(logits_NV.float() / temperature, -1)
    if isinstance(targets, SampledTargets):
        return _forward_kl_sampled(log_q_NV, targets, divergence, temperature)
    log_p_NB = teacher_outcomes(targets, temperature)
    if isinstance(targets, DenseTargets):
        return divergence_of_outcomes(log_p_NB, log_q_NV, divergence)
    log_q_NK = log_q_NV.gather(-1, targets.ids_NK)
    if log_p_NB.shape[-1] == log_q_NK.shape[-1]:
        return divergence_of_outcomes(log_p_NB, log_q_NK, divergence)
    rest_NV = log_q_NV.scatter(-1, targets.ids_NK, -torch.inf)
    log_q_NB = torch.cat([log_q_NK, torch.logsumexp(rest_NV, -1, keepdim=True)], -1)
    return divergence_of_outcomes(log_p_NB, log_q_NB, divergence)


def teacher_outcomes(targets: DenseTargets | TopKTargets, temperature: float) -> Tensor:
    """Log-probabilities of the teacher's outcomes at T, float32: V columns; or k ids and, if k < V, the rest.

    Raises:
        SoftLabelError: top-k targets whose grid does not hold T.
    """
    if isinstance(targets, DenseTargets):
        return torch.log_softmax(targets.logprobs_NV / temperature, -1)
    if temperature not in targets.temperatures:
        raise SoftLabelError(
            f"temperature {temperature:g} is not on the grid of these top-k soft labels: {targets.temperatures}; score again with it"
        )
    log_p_NK = torch.log_softmax(targets.logprobs_NK / temperature, -1)
    if targets.ids_NK.shape[-1] == targets.common.num_columns:
        return log_p_NK
    log_tail_N1 = targets.log_tail_NG[:, targets.temperatures.index(temperature), None].clamp(min=_LEAST_LOG_TAIL)
    return torch.cat([log_p_NK + torch.log(-torch.expm1(log_tail_N1)), log_tail_N1], -1)


def divergence_of_outcomes(log_p_NB: Tensor, log_q_NB: Tensor, divergence: Divergence) -> Tensor:
    """Divergence D(p || q) over the last axis, nats.

    Args:
        log_p_NB: teacher, log-probabilities that sum to one; -inf where an outcome cannot be.
        log_q_NB: student, the same outcomes.
        divergence: D.

    Source: Hinton et al. 2015 (forward); Gu et al. 2024 (reverse); Agarwal et al. 2024, eq. 1 (generalised JSD); Ko et al. 2024,
    eq. 2 (skew); Wen et al. 2023 (total variation).
    """
    match divergence:
        case ForwardKL():
            return _kl(log_p_NB, log_q_NB)
        case ReverseKL():
            return _kl(log_q_NB, log_p_NB)
        case JensenShannon():
            log_m_NB = _mixture(log_p_NB, log_q_NB, divergence.beta)
            return divergence.beta * _kl(log_p_NB, log_m_NB) + (1.0 - divergence.beta) * _kl(log_q_NB, log_m_NB)
        case SkewKL():
            return _kl(log_p_NB, _mixture(log_p_NB, log_q_NB, divergence.alpha))
        case TotalVariation():
            p_NB, q_NB = log_p_NB.exp(), log_q_NB.exp()
            apart_NB = p_NB - q_NB
            return 0.5 * torch.where(apart_NB.abs() > _ROUNDING * torch.maximum(p_NB, q_NB), apart_NB, 0.0).abs().sum(-1)


def _kl(log_a_NB: Tensor, log_b_NB: Tensor) -> Tensor:
    """Sum of a (log a - log b); an outcome without mass in ``a`` adds nothing, whatever ``b`` says."""
    possible_NB = log_a_NB > -torch.inf
    ratio_NB = torch.where(possible_NB, log_a_NB - log_b_NB, 0.0)
    return (log_a_NB.exp() * ratio_NB).sum(-1)


def _mixture(log_p_NB: Tensor, log_q_NB: Tensor, share: float) -> Tensor:
    """Logarithm of the mixture share p + (1 - share) q."""
    return torch.logaddexp(log_p_NB + math.log(share), log_q_NB + math.log1p(-share))


def _forward_kl_sampled(log_q_NV: Tensor, targets: SampledTargets, divergence: Divergence, temperature: float) -> Tensor:
    """Forward KL from draws, -H(p) - sum_v (count_v / draws) log q_v: unbiased, as E[count_v / draws] = p_v."""
    check_sampled(targets, divergence, temperature)
    rows_N = torch.arange(len(log_q_NV), device=log_q_NV.device)
    rows_E = torch.repeat_interleave(rows_N, targets.offsets_N1.diff(), output_size=len(targets.ids_E))
    terms_E = targets.counts_E * log_q_NV[rows_E, targets.ids_E]
    cross_N = torch.zeros_like(log_q_NV[:, 0]).index_add(0, rows_E, terms_E) / targets.num_draws
    return -targets.cross_entropy_offset_N - cross_N


def check_sampled(targets: SampledTargets, divergence: Divergence, temperature: float) -> None:
    """Refuse draws at another temperature than their own, and for what is not linear in the teacher's probabilities.

    Raises:
        SoftLabelError: another temperature, or another divergence than forward KL.
    """
    if temperature != targets.temperature:
        raise SoftLabelError(
            f"these sampled soft labels were drawn at temperature {targets.temperature:g} and are valid only there, not at {temperature:g}"
        )
    if not isinstance(divergence, ForwardKL):
        raise SoftLabelError(f"{divergence.kind} over sampled soft labels would be biased; use forward_kl, or topk or dense soft labels")
