"""Divergences between a stored teacher and the student's logits: the readable reference.

Axes: N supervised positions, V vocabulary columns, K kept ids, E entries of sampled rows.

Every function returns one value a position, in nats, with gradient to the student's logits. Each is a true divergence:
zero, with zero gradient, where the student equals the teacher (for ``sampled``: in expectation). T^2 is the caller's
(``objective``), so that it reaches value and gradient alike.
"""

import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.softlabels.targets import DenseTargets, SampledTargets, Targets, TopKTargets

__all__ = ["forward_kl"]


def forward_kl(logits_NV: Tensor, targets: Targets, *, temperature: float) -> Tensor:
    """KL(teacher_T || student_T) = sum_v p_v (log p_v - log q_v), with q = softmax(logits / T).

    Args:
        logits_NV: student logits, cut to the shared columns; computed on in float32.
        targets: of the same N positions, on the same device.
        temperature: T > 0.

    Returns:
        float32, shape (N,), nats. For sampled targets an unbiased estimate, which may be negative and is not clamped.

    Raises:
        SoftLabelError: the targets are not valid at this temperature, or of another vocabulary.

    Source: Hinton et al. 2015, eq. 4; tail bucket and systematic draws: ours.
    """
    if logits_NV.shape[-1] != targets.common.num_columns:
        raise SoftLabelError(
            f"student logits have {logits_NV.shape[-1]} columns, the soft labels {targets.common.num_columns}; cut both to the tokenizer"
        )
    log_q_NV = torch.log_softmax(logits_NV.float() / temperature, -1)
    match targets:
        case DenseTargets():
            log_p_NV = torch.log_softmax(targets.logprobs_NV / temperature, -1)
            return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        case TopKTargets():
            return _forward_kl_topk(log_q_NV, targets, temperature)
        case SampledTargets():
            return _forward_kl_sampled(log_q_NV, targets, temperature)


def _forward_kl_topk(log_q_NV: Tensor, targets: TopKTargets, temperature: float) -> Tensor:
    """k kept terms plus one bucket for all the rest, on both sides: student mass outside k is never free."""
    if temperature not in targets.temperatures:
        raise SoftLabelError(
            f"temperature {temperature:g} is not on the grid of these top-k soft labels: {targets.temperatures}; score again with it"
        )
    log_tail_p_N = targets.log_tail_NG[:, targets.temperatures.index(temperature)]
    log_kept_N1 = torch.log(-torch.expm1(log_tail_p_N))[:, None]
    log_p_NK = torch.log_softmax(targets.logprobs_NK / temperature, -1) + log_kept_N1
    log_q_NK = log_q_NV.gather(-1, targets.ids_NK)
    kept_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    if targets.ids_NK.shape[-1] == log_q_NV.shape[-1]:
        return kept_N
    rest_NV = log_q_NV.scatter(-1, targets.ids_NK, -torch.inf)
    log_tail_q_N = torch.logsumexp(rest_NV, -1)
    tail_p_N = log_tail_p_N.exp()
    return kept_N + torch.xlogy(tail_p_N, tail_p_N) - tail_p_N * log_tail_q_N


def _forward_kl_sampled(log_q_NV: Tensor, targets: SampledTargets, temperature: float) -> Tensor:
    """-H(p) - sum_v (count_v / draws) log q_v: unbiased, as E[count_v / draws] = p_v."""
    if temperature != targets.temperature:
        raise SoftLabelError(
            f"these sampled soft labels were drawn at temperature {targets.temperature:g} and are valid only there, not at {temperature:g}"
        )
    rows_E = torch.repeat_interleave(torch.arange(len(log_q_NV), device=log_q_NV.device), targets.offsets_N1.diff())
    terms_E = targets.counts_E * log_q_NV[rows_E, targets.ids_E]
    cross_N = torch.zeros_like(log_q_NV[:, 0]).index_add(0, rows_E, terms_E) / targets.num_draws
    return -targets.cross_entropy_offset_N - cross_N
