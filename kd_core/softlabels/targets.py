"""Target policies: what of the teacher's distribution is kept at each supervised position.

Axes: N supervised positions, V vocabulary columns (already cut to the shared tokenizer), K ids kept, G temperatures of a
grid, E draws' distinct ids over all positions.

Three policies, one union. ``SampledTargets`` is unbiased at its one temperature: systematic sampling, so the
expectation of counts / num_draws is the teacher's probability. ``TopKTargets`` keeps the normaliser of a grid of
temperatures, so the kept probabilities *and* the tail are exact there. ``DenseTargets`` keeps everything. None of them
is ever renormalised over what was kept.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK
from kd_core.tokens.batches import sent

__all__ = [
    "Common",
    "DenseTargets",
    "SampledTargets",
    "Targets",
    "TopKTargets",
    "concatenate",
    "make_targets",
    "move",
    "position_uniforms",
    "reduce_logits",
]


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
        num_draws: draws a position; counts of a position sum to it, or to less where removed ids were left out (``kept``).
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
    targets, finite_N = reduce_logits(logits_NV, labels_N, policy, uniform_N=uniform_N)
    if not bool(finite_N.all()):
        bad = int((~finite_N).sum())
        raise SoftLabelError(
            f"the teacher gave NaN or infinite logits at {bad} of {len(logits_NV)} positions; nothing was stored for these rows"
        )
    return targets


def reduce_logits(logits_NV: Tensor, labels_N: Tensor, policy: SoftLabels, *, uniform_N: Tensor) -> tuple[Targets, Tensor]:
    """``make_targets`` where some positions may be broken: there the targets mean nothing.

    Works through a few positions at a time, as many as stay in a CPU core's cache: every pass over them is then
    three to five times faster than over the whole tile.

    Returns:
        The targets, and a bool a position: True where all logits are finite.

    Raises:
        SoftLabelError: k is larger than the vocabulary.
    """
    num, num_columns = logits_NV.shape
    if isinstance(policy, TopK) and policy.k > num_columns:
        raise SoftLabelError(f"soft_labels.k is {policy.k}, and the vocabulary has {num_columns} tokens; use k <= {num_columns}")
    width = -(-num_columns // _BLOCK) * _BLOCK
    step = max(1, _CACHE_BYTES // (4 * width)) if logits_NV.device.type == "cpu" else max(1, num)
    room = torch.zeros(3, min(step, num), width, dtype=torch.float32, device=logits_NV.device)
    parts, finite = [], []
    for start in range(0, max(1, num), step):
        chunk = slice(start, start + step)
        tile = _Tile.of(logits_NV[chunk], room)
        finite.append(tile.finite_N)
        parts.append(_reduce(tile, labels_N[chunk], policy, uniform_N[chunk].to(logits_NV.device)))
    return concatenate(parts), torch.cat(finite)


_BLOCK = 256
"""Columns whose probabilities are summed before the CDF is walked."""
_STRIPES = 32
"""Columns of a group whose largest one stands for them in the search for the top k."""
_CACHE_BYTES = 2 << 20
"""Of one float32 buffer of a chunk of positions, V = 49,152 measured: 0.5 to 4 MiB are within 10% but for the smallest."""


@dataclass(frozen=True)
class _Tile:
    """A chunk of positions, shifted by each one's largest logit. Columns from V to the next multiple of 256 have no mass.

    Attributes:
        finite_N: False where a logit is NaN or infinite; all logits of such a position were replaced by 0.
        shifted_NW: logits less the position's largest, float32; -inf in the columns after V.
        mass_NW: room for exp(shifted / T).
        spare_NW: room for one more such tensor: fresh memory costs more than the arithmetic.
        num_columns: V.
    """

    finite_N: Tensor
    shifted_NW: Tensor
    mass_NW: Tensor
    spare_NW: Tensor
    num_columns: int

    @classmethod
    def of(cls, logits_NV: Tensor, room: Tensor) -> "_Tile":
        num, num_columns = logits_NV.shape
        shifted_NW, mass_NW, spare_NW = room[:, :num]
        shifted_NW[:, num_columns:] = -torch.inf
        top_N1 = logits_NV.amax(-1, keepdim=True).float()
        finite_N = torch.isfinite(top_N1[:, 0]) & torch.isfinite(logits_NV.amin(-1))  # NaN reaches both
        torch.sub(logits_NV, top_N1, out=shifted_NW[:, :num_columns])
        if not bool(finite_N.all()):
            shifted_NW[~finite_N, :num_columns] = 0.0
        return cls(finite_N, shifted_NW, mass_NW, spare_NW, num_columns)

    def exp(self, temperature: float) -> Tensor:
        """exp(shifted / T), in ``mass_NW``: valid until the next call."""
        scaled_NW = self.shifted_NW if temperature == 1.0 else torch.div(self.shifted_NW, temperature, out=self.mass_NW)
        return torch.exp(scaled_NW, out=self.mass_NW)

    def entropy(self, sum_N: Tensor, temperature: float) -> Tensor:
        """log S - sum(e^y y) / S with y = shifted / T and S = sum(e^y), of the last ``exp``; float32, nats."""
        valid = slice(self.num_columns)
        dot_N = torch.mul(self.mass_NW[:, valid], self.shifted_NW[:, valid], out=self.spare_NW[:, valid]).sum(-1).double()
        return (sum_N.log() - dot_N / temperature / sum_N).float()


def _block_sums(mass_NW: Tensor) -> Tensor:
    """Sums of 256 columns in float32, as float64: the CDF over 10^5 columns must not lose its tail."""
    return mass_NW.view(len(mass_NW), -1, _BLOCK).sum(-1).double()


def _reduce(tile: _Tile, labels_N: Tensor, policy: SoftLabels, uniform_N: Tensor) -> Targets:
    sums_NB = _block_sums(tile.exp(1.0))
    sum_N = sums_NB.sum(-1)
    log_sum_N1 = sum_N.log()[:, None]
    gold_N = (tile.shifted_NW.gather(-1, labels_N[:, None]) - log_sum_N1).float()[:, 0]
    common = Common(gold_N, tile.entropy(sum_N, 1.0), tile.num_columns)
    match policy:
        case Dense():
            return DenseTargets(common, tile.shifted_NW[:, : tile.num_columns] - log_sum_N1.float())
        case TopK():
            return _topk(tile, common, policy, log_sum_N1)
        case Sampled():
            return _sampled(tile, common, policy, sums_NB, uniform_N)


def _topk(tile: _Tile, common: Common, policy: TopK, log_sum_N1: Tensor) -> TopKTargets:
    """A tail is summed over the columns that were not kept, so it keeps its relative precision however small it is; below
    e^-103 of the largest probability it is zero in float32.
    """
    ids_NK = _largest(tile.shifted_NW, policy.k)
    kept_NK = tile.shifted_NW.gather(-1, ids_NK).double()
    norms, tails = [], []
    for i, temperature in enumerate(policy.temperatures):
        mass_NW = tile.mass_NW if i == 0 and temperature == 1.0 else tile.exp(temperature)
        kept_N = (kept_NK / temperature).exp().sum(-1)
        tail_N = _block_sums(mass_NW.scatter_(-1, ids_NK, 0.0)).sum(-1)
        norms.append((kept_N + tail_N).log() - log_sum_N1[:, 0] / temperature)
        tails.append((tail_N / (kept_N + tail_N)).log())
    norm_NG, tail_NG = torch.stack(norms, -1).float(), torch.stack(tails, -1).float()
    return TopKTargets(common, policy.temperatures, ids_NK, (kept_NK - log_sum_N1).float(), norm_NG, tail_NG)


def _largest(values_NW: Tensor, k: int) -> Tensor:
    """Columns of the k largest values, by falling value, int64, shape (N, k).

    The k groups of columns with the largest maxima hold the k largest columns: only they are searched.
    """
    num_groups = values_NW.shape[-1] // _STRIPES
    if k >= num_groups:
        return values_NW.topk(k, -1).indices
    groups_NK = values_NW.view(-1, _STRIPES, num_groups).amax(1).topk(k, -1, sorted=False).indices
    stripes = num_groups * torch.arange(_STRIPES, device=values_NW.device)
    columns_NC = (groups_NK[:, :, None] + stripes).flatten(1)
    best_NK = values_NW.gather(-1, columns_NC).topk(k, -1).indices
    largest_NK: Tensor = columns_NC.gather(-1, best_NK)
    return largest_NK


def _sampled(tile: _Tile, common: Common, policy: Sampled, sums_NB: Tensor, uniform_N: Tensor) -> SampledTargets:
    """Points (i + U) / N through the CDF: token v gets those in [cdf_(v-1), cdf_v), whose expected number is exactly N p_v.

    The walk has two levels: the points find their block of 256 columns in the blocks' CDF, and only the blocks that were hit
    are summed column by column. Both in float64.
    Source: Madow 1949, systematic sampling; for soft labels: ours.
    """
    mass_NW, entropy_N, num = tile.mass_NW, common.entropy_N, len(uniform_N)
    if policy.temperature != 1.0:
        sums_NB = _block_sums(tile.exp(policy.temperature))
        entropy_N = tile.entropy(sums_NB.sum(-1), policy.temperature)
    cdf_NB = sums_NB.cumsum(-1)
    total_N1 = cdf_NB[:, -1:]
    points_ND = (torch.arange(policy.num_draws, device=mass_NW.device) + uniform_N[:, None]) / policy.num_draws * total_N1
    points_ND = torch.minimum(points_ND, torch.nextafter(total_N1, torch.zeros_like(total_N1)))  # U near 1 rounds to N
    blocks_ND = torch.searchsorted(cdf_NB, points_ND, right=True)
    inside_ND = 1.0 - (cdf_NB.gather(-1, blocks_ND) - points_ND) / sums_NB.gather(-1, blocks_ND)
    flat_ND = blocks_ND + sums_NB.shape[-1] * torch.arange(num, device=mass_NW.device)[:, None]
    hit_H, which_P = torch.unique_consecutive(flat_ND.flatten(), return_inverse=True)
    walk_HC = mass_NW.view(-1, _BLOCK)[hit_H].double().cumsum(-1)
    walk_HC = walk_HC / walk_HC[:, -1:] + torch.arange(len(hit_H), device=mass_NW.device)[:, None]  # block h spans (h, h + 1]
    columns_P = torch.searchsorted(walk_HC.flatten(), which_P + inside_ND.flatten().clamp(0.0, 1.0 - 1e-9), right=True)
    columns_P = columns_P + (hit_H[which_P] - which_P) * _BLOCK
    entries_E, counts_E = torch.unique_consecutive(columns_P, return_counts=True)
    rows_E = entries_E // mass_NW.shape[-1]
    offsets_N1 = torch.zeros(num + 1, dtype=torch.int64, device=mass_NW.device)
    offsets_N1[1:] = torch.bincount(rows_E, minlength=num).cumsum(0)
    ids_E = entries_E % mass_NW.shape[-1]
    return SampledTargets(common, policy.temperature, policy.num_draws, entropy_N, offsets_N1, ids_E, counts_E)


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


def split(targets: Targets, lengths: Sequence[int]) -> list[Targets]:
    """The inverse of ``concatenate``: targets of consecutive rows of ``lengths`` positions."""
    ends = list(itertools.accumulate(lengths))
    return [_slice(targets, end - length, end) for length, end in zip(lengths, ends, strict=True)]


def _slice(targets: Targets, start: int, end: int) -> Targets:
    common = Common(targets.common.gold_logprob_N[start:end], targets.common.entropy_N[start:end], targets.common.num_columns)
    if isinstance(targets, SampledTargets):
        first, last = int(targets.offsets_N1[start]), int(targets.offsets_N1[end])
        return replace(
            targets,
            common=common,
            cross_entropy_offset_N=targets.cross_entropy_offset_N[start:end],
            offsets_N1=targets.offsets_N1[start : end + 1] - first,
            ids_E=targets.ids_E[first:last],
            counts_E=targets.counts_E[first:last],
        )
    tensors = {f.name: getattr(targets, f.name)[start:end] for f in fields(targets) if isinstance(getattr(targets, f.name), Tensor)}
    return replace(targets, common=common, **tensors)


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
    gold_N, entropy_N = targets.common.gold_logprob_N, targets.common.entropy_N
    common = replace(targets.common, gold_logprob_N=sent(gold_N, device), entropy_N=sent(entropy_N, device))
    tensors: dict[str, Any] = {
        f.name: sent(getattr(targets, f.name), device) for f in fields(targets) if isinstance(getattr(targets, f.name), Tensor)
    }
    return replace(targets, common=common, **tensors)
