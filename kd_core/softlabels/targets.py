"""Target policies: what of the teacher's distribution is kept at each supervised position.

Axes: N supervised positions, V vocabulary columns (already cut to the shared tokenizer), K ids kept, G temperatures of a
grid, E draws' distinct ids over all positions.

Three policies, one union. ``SampledTargets`` is unbiased at its one temperature: systematic sampling, so the
expectation of counts / num_draws is the teacher's probability. ``TopKTargets`` keeps the normaliser of a grid of
temperatures, so the kept probabilities *and* the tail are exact there. ``DenseTargets`` keeps everything. None of them
is ever renormalised over what was kept.
"""

import functools
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK

__all__ = ["Common", "DenseTargets", "SampledTargets", "Targets", "TopKTargets", "concatenate", "make_targets", "move", "position_uniforms"]


@dataclass(frozen=True)
class Common:
    """What every policy carries.

    Attributes:
        gold_logprob_N: teacher's log-probability (T = 1) of the token that stands there, float32, nats.
        entropy_N: the teacher's entropy at T = 1, float32, nats.
        num_columns: valid vocabulary columns V.
    """

    gold_logprob_N: Tensor
    entropy_N: Tensor
    num_columns: int


@dataclass(frozen=True)
class SampledTargets:
    """Systematic draws in compressed rows: position n owns entries offsets[n]:offsets[n+1].

    Attributes:
        common: gold log-probability, entropy, columns.
        temperature: T0, the only one at which these are valid.
        num_draws: draws a position; counts of a position sum to it.
        cross_entropy_offset_N: entropy of the teacher at T0, float32, nats: makes the loss a divergence.
        offsets_N1: int64, shape (N + 1,).
        ids_E: distinct ids, int64.
        counts_E: draws that fell on each, int64.
    """

    common: Common
    temperature: float
    num_draws: int
    cross_entropy_offset_N: Tensor
    offsets_N1: Tensor
    ids_E: Tensor
    counts_E: Tensor


@dataclass(frozen=True)
class TopKTargets:
    """The k largest, with exact normalisers.

    Attributes:
        common: gold log-probability, entropy, columns.
        temperatures: the grid, G values.
        ids_NK: int64, by falling probability.
        logprobs_NK: log-probabilities at T = 1, float32.
        log_normalizer_NG: logsumexp over all V of logprobs / T_g, float32: p_T(i) = exp(logprob_i / T - log_normalizer).
        log_tail_NG: log of the probability outside the k ids at T_g, float32; -inf where k = V. Stored log-probabilities are
            quantised, the tail is exact: kept ids share 1 - tail in proportion to exp(logprob / T).
    """

    common: Common
    temperatures: tuple[float, ...]
    ids_NK: Tensor
    logprobs_NK: Tensor
    log_normalizer_NG: Tensor
    log_tail_NG: Tensor


@dataclass(frozen=True)
class DenseTargets:
    """All log-probabilities at T = 1, float32, shape (N, V)."""

    common: Common
    logprobs_NV: Tensor


Targets = SampledTargets | TopKTargets | DenseTargets


def make_targets(logits_NV: Tensor, labels_N: Tensor, policy: SoftLabels, *, uniform_N: Tensor) -> Targets:
    """Reduce teacher logits to what a policy keeps.

    Args:
        logits_NV: teacher logits at positions that predict ``labels_N``, cut to the valid columns; any float dtype,
            normalised here in float32.
        labels_N: the tokens that stand there, int64.
        policy: what to keep.
        uniform_N: one number in [0, 1) a position, float64: the offset of systematic sampling.

    Raises:
        SoftLabelError: a logit is NaN or infinite, or k is larger than the vocabulary.
    """
    if not bool(torch.isfinite(logits_NV).all()):
        bad = int((~torch.isfinite(logits_NV)).any(-1).sum())
        raise SoftLabelError(
            f"the teacher gave NaN or infinite logits at {bad} of {len(logits_NV)} positions; nothing was stored for these rows"
        )
    logprobs_NV = torch.log_softmax(logits_NV.float(), -1)
    num_columns = logprobs_NV.shape[-1]
    entropy_N = _entropy(logprobs_NV)
    common = Common(logprobs_NV.gather(-1, labels_N[:, None])[:, 0], entropy_N, num_columns)
    match policy:
        case Dense():
            return DenseTargets(common, logprobs_NV)
        case TopK():
            if policy.k > num_columns:
                raise SoftLabelError(f"soft_labels.k is {policy.k}, and the vocabulary has {num_columns} tokens; use k <= {num_columns}")
            top = logprobs_NV.topk(policy.k, -1)
            rest_NV = logprobs_NV.scatter(-1, top.indices, -torch.inf)
            norm_NG = torch.stack([torch.logsumexp(logprobs_NV / t, -1) for t in policy.temperatures], -1)
            tail_NG = torch.stack([torch.logsumexp(rest_NV / t, -1) for t in policy.temperatures], -1) - norm_NG
            return TopKTargets(common, policy.temperatures, top.indices, top.values, norm_NG, tail_NG)
        case Sampled():
            return _sampled(logprobs_NV, common, policy, uniform_N)


def _entropy(logprobs_NV: Tensor) -> Tensor:
    return -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def _sampled(logprobs_NV: Tensor, common: Common, policy: Sampled, uniform_N: Tensor) -> SampledTargets:
    """Points (i + U) / N through the CDF. Source: Horvitz-Thompson systematic sampling; ours for soft labels.

    The number of points at or below cdf_v is ceil(N * cdf_v - U); differences of consecutive ones are the counts, so
    their expectation over U is exactly N * p_v. float64, or the CDF of 10^5 columns loses the tail.
    """
    scaled_NV = torch.log_softmax(logprobs_NV.double() / policy.temperature, -1)
    cdf_NV = scaled_NV.exp().cumsum(-1)
    cdf_NV = cdf_NV / cdf_NV[:, -1:]
    points_NV = torch.ceil(cdf_NV * policy.num_draws - uniform_N.to(cdf_NV)[:, None]).long()
    points_NV[:, -1] = policy.num_draws  # N - U rounds to N - 1 for the largest offsets
    counts_NV = points_NV.diff(dim=-1, prepend=points_NV.new_zeros(len(points_NV), 1))
    rows_E, ids_E = counts_NV.nonzero(as_tuple=True)
    offsets_N1 = torch.zeros(len(counts_NV) + 1, dtype=torch.int64, device=counts_NV.device)
    offsets_N1[1:] = torch.bincount(rows_E, minlength=len(counts_NV)).cumsum(0)
    entropy_N = _entropy(scaled_NV).float()
    return SampledTargets(common, policy.temperature, policy.num_draws, entropy_N, offsets_N1, ids_E, counts_NV[rows_E, ids_E])


def position_uniforms(key: str, count: int) -> np.ndarray:
    """``count`` uniform numbers in [0, 1) that belong to a row key (32 hex digits): the same in every process, float64."""
    return np.random.Generator(np.random.Philox(key=int(key[:32], 16))).random(count)


def concatenate(parts: list[Targets]) -> Targets:
    """Stack the positions of several rows, in order; all of one policy.

    Raises:
        SoftLabelError: the parts differ in policy, vocabulary or temperature.
    """
    first = parts[0]
    if any(_header(part) != _header(first) for part in parts):
        raise SoftLabelError(f"soft labels of different kinds in one batch: {sorted({str(_header(part)) for part in parts})}")
    common = Common(
        torch.cat([part.common.gold_logprob_N for part in parts]),
        torch.cat([part.common.entropy_N for part in parts]),
        first.common.num_columns,
    )
    if isinstance(first, DenseTargets):
        return DenseTargets(common, torch.cat([part.logprobs_NV for part in parts if isinstance(part, DenseTargets)]))
    if isinstance(first, TopKTargets):
        topk = [part for part in parts if isinstance(part, TopKTargets)]
        return TopKTargets(
            common,
            first.temperatures,
            torch.cat([part.ids_NK for part in topk]),
            torch.cat([part.logprobs_NK for part in topk]),
            torch.cat([part.log_normalizer_NG for part in topk]),
            torch.cat([part.log_tail_NG for part in topk]),
        )
    sampled = [part for part in parts if isinstance(part, SampledTargets)]
    lengths = torch.cat([part.offsets_N1.diff() for part in sampled])
    return SampledTargets(
        common,
        first.temperature,
        first.num_draws,
        torch.cat([part.cross_entropy_offset_N for part in sampled]),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        torch.cat([part.ids_E for part in sampled]),
        torch.cat([part.counts_E for part in sampled]),
    )


@functools.singledispatch
def _header(targets: Targets) -> tuple[object, ...]:
    raise AssertionError(type(targets))


@_header.register
def _(targets: SampledTargets) -> tuple[object, ...]:
    return ("sampled", targets.common.num_columns, targets.temperature, targets.num_draws)


@_header.register
def _(targets: TopKTargets) -> tuple[object, ...]:
    return ("topk", targets.common.num_columns, targets.temperatures, targets.ids_NK.shape[-1])


@_header.register
def _(targets: DenseTargets) -> tuple[object, ...]:
    return ("dense", targets.common.num_columns)


def move(targets: Targets, device: torch.device) -> Targets:
    """The same targets on a device."""
    common = replace(targets.common, gold_logprob_N=targets.common.gold_logprob_N.to(device), entropy_N=targets.common.entropy_N.to(device))
    tensors = {f.name: getattr(targets, f.name).to(device) for f in fields(targets) if isinstance(getattr(targets, f.name), Tensor)}
    return replace(targets, common=common, **tensors)
