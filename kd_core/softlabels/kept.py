"""Soft labels for a student that has only some of the teacher's ids.

``dense``: the teacher's distribution given that the token is kept, p_v / m with m the kept mass: exact at every temperature,
for every divergence. ``sampled``: the draws that fell on kept ids, still out of all draws, so the loss is

    -H(p) - sum over kept v of (count_v / draws) log q_v

whose expectation is m KL(p / m || q) and a constant of the data: the same divergence, a position weighing as much as its
kept mass; zero gradient in expectation exactly where q is the conditional distribution. Dividing by the number of kept
draws instead would weigh positions alike, but a ratio of draws is biased, and undefined where no draw was kept.
``topk`` keeps its tail as one number: how much of it lies on kept ids is not known, and the recipe refuses it.

Axes: N positions, V teacher's columns, S kept ones, E entries of sampled rows.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.softlabels.targets import DenseTargets, SampledTargets, Targets
from kd_core.tokens.token_map import TokenMap

__all__ = ["kept_mass", "only_kept"]


def only_kept(targets: Targets, token_map: TokenMap) -> Targets:
    """Targets over the kept ids, numbered as the student numbers them. Entropy and gold log-probability stay the full teacher's.

    Raises:
        SoftLabelError: top-k targets, or targets of another vocabulary.
    """
    _expect_vocabulary(targets, token_map)
    common = replace(targets.common, num_columns=len(token_map.kept))
    if isinstance(targets, DenseTargets):
        kept_NS = targets.logprobs_NV[:, torch.from_numpy(token_map.full_ids)]
        return DenseTargets(common, torch.log_softmax(kept_NS, -1))
    assert isinstance(targets, SampledTargets), "checked above"
    id_E = torch.from_numpy(token_map.trimmed_ids)[targets.ids_E]
    kept_E = id_E >= 0
    before_E1 = torch.nn.functional.pad(kept_E.cumsum(0), (1, 0))
    return replace(targets, common=common, offsets_N1=before_E1[targets.offsets_N1], ids_E=id_E[kept_E], counts_E=targets.counts_E[kept_E])


def kept_mass(targets: Targets, token_map: TokenMap) -> Tensor:
    """The teacher's probability of kept ids at each position, float64, shape (N,): exact at T = 1 for dense targets, an unbiased
    estimate at their own temperature for sampled ones.

    Raises:
        SoftLabelError: top-k targets, or targets of another vocabulary.
    """
    _expect_vocabulary(targets, token_map)
    if isinstance(targets, DenseTargets):
        return targets.logprobs_NV[:, torch.from_numpy(token_map.full_ids)].double().exp().sum(-1)
    assert isinstance(targets, SampledTargets), "checked above"
    kept_E = np.where(token_map.trimmed_ids[targets.ids_E.numpy()] >= 0, targets.counts_E.numpy(), 0)
    before_E1 = torch.from_numpy(np.concatenate([[0], np.cumsum(kept_E)]))
    return before_E1[targets.offsets_N1].diff().double() / targets.num_draws


def _expect_vocabulary(targets: Targets, token_map: TokenMap) -> None:
    if not isinstance(targets, DenseTargets | SampledTargets):
        raise SoftLabelError(
            "top-k soft labels do not say how much of their tail lies on kept ids; use sampled or dense with student.vocabulary"
        )
    if targets.common.num_columns != token_map.num_full:
        raise SoftLabelError(
            f"the soft labels have {targets.common.num_columns} columns, and the vocabulary was trimmed from {token_map.num_full}; "
            "they are of different teachers"
        )
