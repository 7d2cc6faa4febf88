"""Soft labels over fewer ids: the conditional distribution exactly, or its mass-weighted divergence in expectation."""

import pytest
import torch

from kd_core.errors import SoftLabelError
from kd_core.losses import Projection, StepWeights, forward_kl, fused_loss, supervised_loss
from kd_core.recipe import Dense, ForwardKL, Sampled, TopK
from kd_core.softlabels.kept import kept_mass, only_kept
from kd_core.softlabels.targets import SampledTargets, Targets, concatenate, make_targets, move
from kd_core.tokens.token_map import TokenMap

COLUMNS, HIDDEN = 24, 6
MAP = TokenMap((0, 3, 4, 9, 10, 17, 23), COLUMNS, "")
KEPT = list(MAP.kept)
FORWARD = ForwardKL(kind="forward_kl")


def teacher(num: int = 5) -> torch.Tensor:
    return 2.0 * torch.randn(num, COLUMNS, generator=torch.Generator().manual_seed(1))


def student(num: int = 5) -> torch.Tensor:
    return torch.randn(num, len(KEPT), generator=torch.Generator().manual_seed(2))


def make(logits_NV: torch.Tensor, policy: Dense | Sampled | TopK) -> Targets:
    labels_N = torch.zeros(len(logits_NV), dtype=torch.int64)
    return make_targets(logits_NV, labels_N, policy, uniform_N=torch.full((len(logits_NV),), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_dense_targets_are_the_conditional_distribution_at_every_temperature(temperature: float) -> None:
    targets = only_kept(make(teacher(), Dense(kind="dense")), MAP)
    p_NV = torch.softmax(teacher().double() / temperature, -1)[:, KEPT]
    p_NV = p_NV / p_NV.sum(-1, keepdim=True)
    log_q_NV = torch.log_softmax(student().double() / temperature, -1)
    expected_N = (p_NV * (p_NV.log() - log_q_NV)).sum(-1)
    assert torch.allclose(forward_kl(student(), targets, temperature=temperature).double(), expected_N, atol=1e-6)
    at_equality = forward_kl(teacher()[:, KEPT], targets, temperature=temperature)
    assert at_equality.abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased_for_the_mass_weighted_divergence(temperature: float) -> None:
    """Over a fine grid of offsets the mean of value and gradient is m KL(p / m || q) and a constant; zero gradient at equality."""
    policy, offsets = Sampled(kind="sampled", num_draws=3, temperature=temperature), 4000
    p_NV = torch.softmax(teacher().double() / temperature, -1)
    mass_N = p_NV[:, KEPT].sum(-1)
    conditional_NV = p_NV[:, KEPT] / mass_N[:, None]
    uniform_N = ((torch.arange(offsets, dtype=torch.float64) + 0.5) / offsets).repeat(5)
    labels_N = torch.zeros(5 * offsets, dtype=torch.int64)
    whole = make_targets(teacher().repeat_interleave(offsets, 0), labels_N, policy, uniform_N=uniform_N)
    logits_NV = student().requires_grad_()
    value_N = forward_kl(logits_NV.repeat_interleave(offsets, 0), only_kept(whole, MAP), temperature=temperature)
    gradients = torch.autograd.grad(value_N.sum(), logits_NV)[0] / offsets
    values, masses = value_N.detach().view(5, -1).mean(1), kept_mass(whole, MAP).view(5, -1).mean(1)
    log_q_NV = torch.log_softmax(student().double() / temperature, -1)
    divergence_N = (conditional_NV * (conditional_NV.log() - log_q_NV)).sum(-1)
    removed = [i for i in range(COLUMNS) if i not in KEPT]
    constant_N = mass_N * mass_N.log() + (p_NV * p_NV.log())[:, removed].sum(-1)
    assert torch.allclose(values.double(), mass_N * divergence_N + constant_N, atol=3e-3)
    assert torch.allclose(gradients.double(), mass_N[:, None] * (log_q_NV.exp() - conditional_NV) / temperature, atol=2e-3)
    assert torch.allclose(masses, mass_N, atol=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_fused_loss_is_the_readable_one(temperature: float, device: torch.device) -> None:
    """Positions with all, some and none of their draws kept."""
    logits_NV = teacher(6)
    logits_NV[1, KEPT] += 30.0
    logits_NV[2, KEPT] -= 30.0
    policy = Sampled(kind="sampled", num_draws=7, temperature=temperature)
    targets = move(only_kept(make(logits_NV, policy), MAP), device)
    assert isinstance(targets, SampledTargets)
    counted = [int(targets.counts_E[a:b].sum()) for a, b in zip(targets.offsets_N1[:-1], targets.offsets_N1[1:], strict=True)]
    assert (counted[1], counted[2]) == (7, 0)
    assert 0 < counted[0] < 7
    generator = torch.Generator().manual_seed(3)
    hidden_NH = torch.randn(6, HIDDEN, generator=generator).to(device)
    weight_VH = torch.randn(len(KEPT), HIDDEN, generator=generator).to(device)
    labels_N, weights = torch.arange(6, device=device), StepWeights(hard=0.3, soft=0.7, temperature=temperature)
    found = []
    for fused in (True, False):
        leaves = [hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_()]
        projection = Projection(leaves[1], None, len(KEPT))
        if fused:
            loss, parts = fused_loss(leaves[0], projection, labels_N, targets, weights, FORWARD)
        else:
            loss, parts = supervised_loss(projection.logits(leaves[0]), labels_N, targets, weights, FORWARD)
        loss.backward()
        found.append([loss.detach(), parts["soft"], *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(*found, strict=True):
        assert torch.allclose(ours, reference, atol=1e-5)


def test_mass_and_numbering_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), four draws; id 1 is removed."""
    token_map = TokenMap((0, 2), 3, "")
    logits_NV = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]).log()
    for policy in (Dense(kind="dense"), Sampled(kind="sampled", num_draws=4, temperature=1.0)):
        assert kept_mass(make(logits_NV, policy), token_map).tolist() == pytest.approx([0.75, 0.5])
    targets = only_kept(make(logits_NV, Sampled(kind="sampled", num_draws=4, temperature=1.0)), token_map)
    assert isinstance(targets, SampledTargets)
    assert (targets.ids_E.tolist(), targets.counts_E.tolist(), targets.offsets_N1.tolist()) == ([0, 1, 0, 1], [2, 1, 1, 1], [0, 2, 4])
    assert targets.common.num_columns == 2
    parts = [only_kept(make(logits_NV[i : i + 1], Sampled(kind="sampled", num_draws=4, temperature=1.0)), token_map) for i in (0, 1)]
    joined = concatenate(parts)
    assert isinstance(joined, SampledTargets)
    assert torch.equal(joined.ids_E, targets.ids_E)


def test_a_map_of_everything_changes_nothing() -> None:
    everything = TokenMap(tuple(range(COLUMNS)), COLUMNS, "")
    whole = make(teacher(), Sampled(kind="sampled", num_draws=9, temperature=1.0))
    assert isinstance(whole, SampledTargets)
    same = only_kept(whole, everything)
    assert isinstance(same, SampledTargets)
    assert all(torch.equal(getattr(same, name), getattr(whole, name)) for name in ("offsets_N1", "ids_E", "counts_E"))


def test_what_cannot_be_cut_is_refused() -> None:
    topk = make(teacher(), TopK(kind="topk", k=4, temperatures=(1.0,)))
    for function in (only_kept, kept_mass):
        with pytest.raises(SoftLabelError, match="how much of their tail lies on kept ids"):
            function(topk, MAP)
        with pytest.raises(SoftLabelError, match="have 24 columns, and the vocabulary was trimmed from 25"):
            function(make(teacher(), Dense(kind="dense")), TokenMap((0, 1), 25, ""))
