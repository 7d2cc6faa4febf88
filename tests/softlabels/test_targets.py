"""Target policies: unbiased within a stated bound, exact normalisers, cut before normalised."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_core.errors import SoftLabelError
from kd_core.losses import forward_kl
from kd_core.recipe import Dense, Sampled, TopK
from kd_core.softlabels.targets import (
    DenseTargets,
    SampledTargets,
    TopKTargets,
    concatenate,
    make_targets,
    move,
    position_uniforms,
    reduce_logits,
    split,
)

DENSE = Dense(kind="dense")


def random_logits(num: int, columns: int, *, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(num, columns, generator=torch.Generator().manual_seed(seed))


def make(logits_NV: torch.Tensor, policy, uniform_N: torch.Tensor | None = None):
    if uniform_N is None:
        uniform_N = torch.full((len(logits_NV),), 0.5, dtype=torch.float64)
    return make_targets(logits_NV, torch.zeros(len(logits_NV), dtype=torch.int64), policy, uniform_N=uniform_N)


def dense_counts(targets: SampledTargets) -> torch.Tensor:
    counts_NV = torch.zeros(len(targets.offsets_N1) - 1, targets.common.num_columns, dtype=torch.int64)
    rows_E = torch.repeat_interleave(torch.arange(len(counts_NV)), targets.offsets_N1.diff())
    return counts_NV.index_put((rows_E, targets.ids_E), targets.counts_E, accumulate=True)


def test_systematic_counts_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), four draws at (i + U) / 4: the first half of the points falls on token 0."""
    logits_NV = torch.tensor([[0.5, 0.25, 0.25]]).log()
    policy = Sampled(kind="sampled", num_draws=4, temperature=1.0)
    for offset in (0.001, 0.3, 0.999):
        targets = make(logits_NV, policy, torch.tensor([offset], dtype=torch.float64))
        assert isinstance(targets, SampledTargets)
        assert dense_counts(targets).tolist() == [[2, 1, 1]]
    policy = Sampled(kind="sampled", num_draws=1, temperature=1.0)
    found = [make(logits_NV, policy, torch.tensor([u], dtype=torch.float64)).ids_E.tolist() for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.999)]
    assert found == [[0], [0], [1], [1], [2], [2]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), draws=st.integers(1, 200), temperature=st.sampled_from([0.5, 1.0, 2.0, 8.0]), scale=st.floats(0, 12))
def test_counts_sum_to_the_draws_and_are_floor_or_ceil(seed: int, draws: int, temperature: float, scale: float) -> None:
    logits_NV = random_logits(5, 40, seed=seed, scale=scale)
    uniform_N = torch.from_numpy(np.random.default_rng(seed).random(5))
    targets = make(logits_NV, Sampled(kind="sampled", num_draws=draws, temperature=temperature), uniform_N)
    counts_NV = dense_counts(targets)
    assert counts_NV.sum(1).tolist() == [draws] * 5
    assert int(targets.counts_E.min()) >= 1
    expected_NV = draws * torch.softmax(torch.log_softmax(logits_NV, -1).double() / temperature, -1)
    assert float((counts_NV - expected_NV).abs().max()) < 1.0 + 1e-6


def test_the_offset_at_its_ends_loses_no_draw() -> None:
    logits_NV = random_logits(3, 1000, scale=6.0)
    for offset in (0.0, np.nextafter(1.0, 0.0)):
        targets = make(logits_NV, Sampled(kind="sampled", num_draws=25, temperature=2.0), torch.full((3,), offset, dtype=torch.float64))
        assert dense_counts(targets).sum(1).tolist() == [25, 25, 25]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_expectation_of_counts_is_the_teacher(temperature: float) -> None:
    """Over R independent offsets each count deviates from N p with a variance frac (1 - frac) <= 1/4: 5 standard errors."""
    repeats, draws = 20_000, 7
    logits_1V = random_logits(1, 12)
    uniform_N = torch.from_numpy(np.random.default_rng(1).random(repeats))
    targets = make(logits_1V.expand(repeats, -1), Sampled(kind="sampled", num_draws=draws, temperature=temperature), uniform_N)
    expected_V = draws * torch.softmax(logits_1V.double() / temperature, -1)[0]
    frac_V = expected_V - expected_V.floor()
    error_V = (dense_counts(targets).double().mean(0) - expected_V).abs()
    assert bool((error_V <= 5 * (frac_V * (1 - frac_V) / repeats).sqrt() + 1e-6).all())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_expectation_of_value_and_gradient_is_full_kl(temperature: float) -> None:
    """Mean over R offsets against dense KL with another student: value and every component of the gradient in 5 standard errors."""
    repeats, draws = 20_000, 5
    teacher_1V, student_1V = random_logits(1, 12, seed=2), random_logits(1, 12, seed=3)
    uniform_N = torch.from_numpy(np.random.default_rng(4).random(repeats))
    targets = make(teacher_1V.expand(repeats, -1), Sampled(kind="sampled", num_draws=draws, temperature=temperature), uniform_N)
    student_NV = student_1V.expand(repeats, -1).clone().requires_grad_()
    value_N = forward_kl(student_NV, targets, temperature=temperature)
    value_N.sum().backward()
    exact_1V = student_1V.clone().requires_grad_()
    exact = forward_kl(exact_1V, make(teacher_1V, DENSE), temperature=temperature)
    exact.sum().backward()
    value_error = abs(float(value_N.detach().double().mean() - exact.detach()[0]))
    assert value_error <= 5 * float(value_N.detach().double().std()) / repeats**0.5
    grad_NV = student_NV.grad.double()
    assert bool(((grad_NV.mean(0) - exact_1V.grad[0]).abs() <= 5 * grad_NV.std(0) / repeats**0.5 + 1e-6).all())


def test_one_in_a_hundred_thousand_is_seen_as_often_as_it_should_be() -> None:
    """A float32 CDF over 10^5 columns would lose such a token: 2,000 positions x 50 draws expect 1 hit a token, 1,000 tokens 1,000 hits."""
    columns, repeats = 100_000, 100
    logits_1V = torch.zeros(1, columns)
    uniform_N = torch.from_numpy(np.random.default_rng(5).random(repeats))
    targets = make(logits_1V.expand(repeats, -1), Sampled(kind="sampled", num_draws=1000, temperature=1.0), uniform_N)
    hits = torch.bincount(targets.ids_E, weights=targets.counts_E.double(), minlength=columns)
    tenths = hits.reshape(10, -1).sum(1)
    assert float((tenths - 10_000).abs().max()) <= repeats  # systematic: within one draw a position


def test_topk_normalisers_are_the_dense_ones_at_each_temperature() -> None:
    logits_NV = random_logits(4, 50)
    grid = (1.0, 2.0, 4.0)
    targets = make(logits_NV, TopK(kind="topk", k=5, temperatures=grid))
    assert isinstance(targets, TopKTargets)
    for g, temperature in enumerate(grid):
        dense_NV = torch.log_softmax(logits_NV.double() / temperature, -1)
        kept_NK = targets.logprobs_NK / temperature - targets.log_normalizer_NG[:, g, None]
        torch.testing.assert_close(kept_NK.double(), dense_NV.gather(-1, targets.ids_NK), atol=2e-6, rtol=0)
        assert (dense_NV.topk(5).indices == targets.ids_NK).all()


@pytest.mark.parametrize(
    "policy", [DENSE, TopK(kind="topk", k=3, temperatures=(2.0,)), Sampled(kind="sampled", num_draws=9, temperature=2.0)]
)
def test_every_policy_carries_gold_logprob_entropy_and_columns(policy) -> None:
    logits_NV, labels_N = random_logits(4, 20), torch.tensor([3, 0, 19, 7])
    common = make_targets(logits_NV, labels_N, policy, uniform_N=torch.full((4,), 0.5, dtype=torch.float64)).common
    exact_NV = torch.log_softmax(logits_NV.double(), -1)
    torch.testing.assert_close(common.gold_logprob_N.double(), exact_NV.gather(-1, labels_N[:, None])[:, 0], atol=2e-6, rtol=0)
    torch.testing.assert_close(common.entropy_N.double(), -(exact_NV.exp() * exact_NV).sum(-1), atol=5e-6, rtol=0)
    assert common.num_columns == 20


def test_half_precision_logits_are_normalised_in_float32() -> None:
    """Trap 19: the same bf16 numbers, normalised in bf16, are off by 2^-8 relative; here within 2e-6 of float64."""
    logits_NV = random_logits(4, 5000, scale=3.0).bfloat16()
    targets = make(logits_NV, DENSE)
    assert isinstance(targets, DenseTargets)
    assert float((targets.logprobs_NV.double() - torch.log_softmax(logits_NV.double(), -1)).abs().max()) < 5e-6
    assert float((torch.log_softmax(logits_NV, -1).double() - torch.log_softmax(logits_NV.double(), -1)).abs().max()) > 1e-2


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_and_counted(poison: float) -> None:
    logits_NV = random_logits(5, 8)
    logits_NV[1, 3] = logits_NV[4, 0] = poison
    with pytest.raises(SoftLabelError, match="NaN or infinite logits at 2 of 5 positions"):
        make(logits_NV, DENSE)


def test_more_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(SoftLabelError, match=r"soft_labels\.k is 9, and the vocabulary has 8 tokens"):
        make(random_logits(1, 8), TopK(kind="topk", k=9, temperatures=(1.0,)))


def test_offsets_belong_to_the_key() -> None:
    first, again, other = (position_uniforms(key * 32, 6) for key in ("a", "a", "b"))
    assert (first == again).all()
    assert not (first == other).any()
    assert (position_uniforms("a" * 32, 3) == first[:3]).all()
    assert ((first >= 0) & (first < 1)).all()


POLICIES = [DENSE, TopK(kind="topk", k=4, temperatures=(1.0, 2.0)), Sampled(kind="sampled", num_draws=6, temperature=2.0)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
def test_concatenated_rows_give_the_losses_of_each(policy, device: torch.device) -> None:
    rows = [make(random_logits(num, 15, seed=num), policy) for num in (1, 4, 2)]
    students = [random_logits(num, 15, seed=10 + num) for num in (1, 4, 2)]
    apart = torch.cat([forward_kl(z, row, temperature=2.0) for z, row in zip(students, rows, strict=True)])
    together = forward_kl(torch.cat(students).to(device), move(concatenate(rows), device), temperature=2.0)
    torch.testing.assert_close(together.cpu(), apart, atol=1e-6, rtol=1e-6)


def test_rows_of_different_policies_or_temperatures_never_mix() -> None:
    logits_NV = random_logits(2, 15)
    sampled = [make(logits_NV, Sampled(kind="sampled", num_draws=6, temperature=t)) for t in (1.0, 2.0)]
    for other in (sampled[1], make(logits_NV, DENSE), make(random_logits(2, 16), POLICIES[2])):
        with pytest.raises(SoftLabelError, match="different kinds in one batch"):
            concatenate([sampled[0], other])


# ---------------------------------------------------------------------------------------------- against plain float64


def zipf_logits(num: int, columns: int, *, exponent: float, seed: int = 0) -> torch.Tensor:
    """log of 1 / rank^exponent, each position with its own order of columns."""
    generator = torch.Generator().manual_seed(seed)
    log_p_V = -exponent * torch.arange(1, columns + 1, dtype=torch.float64).log()
    return torch.stack([log_p_V[torch.randperm(columns, generator=generator)] for _ in range(num)]).float()


def one_walk_counts(logits_NV: torch.Tensor, uniform_N: torch.Tensor, draws: int, temperature: float) -> torch.Tensor:
    """The definition: as many points (i + U) / N below cdf_v as there are, column by column in float64."""
    cdf_NV = torch.softmax(logits_NV.double() / temperature, -1).cumsum(-1)
    points_NV = torch.ceil(cdf_NV / cdf_NV[:, -1:] * draws - uniform_N[:, None]).long()
    return points_NV.diff(dim=-1, prepend=torch.zeros(len(points_NV), 1, dtype=torch.int64))


@pytest.mark.parametrize("columns", [255, 256, 257, 5000])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_walk_over_blocks_is_the_walk_over_columns(columns: int, temperature: float) -> None:
    """float32 probabilities move an edge of the CDF by up to 1e-7, so of 40 x 50 points at most one may fall beside its place."""
    logits_NV = torch.cat([random_logits(20, columns, seed=1), zipf_logits(20, columns, exponent=1.5)])
    uniform_N = torch.from_numpy(np.random.default_rng(3).random(40))
    targets = make(logits_NV, Sampled(kind="sampled", num_draws=50, temperature=temperature), uniform_N)
    moved = (dense_counts(targets) - one_walk_counts(logits_NV, uniform_N, 50, temperature)).abs().sum()
    assert int(moved) <= 2
    assert int(targets.offsets_N1[-1]) == len(targets.ids_E) == int((dense_counts(targets) > 0).sum())


@pytest.mark.parametrize("place", [0, 255, 256, 4999])
def test_all_mass_on_one_column_gets_all_draws(place: int) -> None:
    logits_NV = torch.full((2, 5000), -200.0)
    logits_NV[:, place] = 50.0
    for offset in (0.0, 0.5, np.nextafter(1.0, 0.0)):
        targets = make(logits_NV, Sampled(kind="sampled", num_draws=25, temperature=1.0), torch.full((2,), offset, dtype=torch.float64))
        assert targets.ids_E.tolist() == [place, place]
        assert targets.counts_E.tolist() == [25, 25]
        assert float(targets.common.entropy_N.abs().max()) == 0.0


@pytest.mark.parametrize("logits", [random_logits(1, 3000, scale=2.5), zipf_logits(1, 3000, exponent=1.5)], ids=["random", "peaked"])
def test_frequencies_over_many_offsets_fit_the_teacher(logits: torch.Tensor) -> None:
    """Chi-square over 50 groups of columns of like mass: 20,000 offsets x 5 draws.

    Systematic counts vary less than multinomial ones, so the multinomial bound of 49 degrees of freedom (mean 49, sd 9.9) holds with
    room; a bias of 20% in one group of ten breaks it.
    """
    repeats, draws, groups = 20_000, 5, 50
    uniform_N = torch.from_numpy(np.random.default_rng(11).random(repeats))
    p_V = torch.softmax(logits[0].double(), -1)
    group_V = ((p_V.cumsum(-1) - p_V) * groups).long().clamp(max=groups - 1)
    hits_G, mass_G = torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, dtype=torch.float64)
    mass_G.index_add_(0, group_V, p_V)
    for part_N in uniform_N.split(2000):
        targets = make(logits.expand(len(part_N), -1), Sampled(kind="sampled", num_draws=draws, temperature=1.0), part_N)
        hits_G.index_add_(0, group_V[targets.ids_E], targets.counts_E.double())
    expected_G = mass_G * repeats * draws
    used_G = expected_G > 5
    chi_square = float(((hits_G - expected_G)[used_G].square() / expected_G[used_G]).sum())
    assert chi_square < 49 + 5 * 9.9
    biased_G = expected_G * torch.where(torch.arange(groups) % 10 == 0, 1.2, 1.0)
    assert float(((hits_G - biased_G)[used_G].square() / biased_G[used_G]).sum()) > 49 + 5 * 9.9  # the test could fail


def independent(p_V: torch.Tensor, draws: int, repeats: int) -> torch.Tensor:
    """Counts of independent draws, shape (repeats, V)."""
    ids_RD = torch.multinomial(p_V.expand(repeats, -1), draws, replacement=True, generator=torch.Generator().manual_seed(5))
    return torch.zeros(repeats, len(p_V), dtype=torch.float64).scatter_add_(1, ids_RD, torch.ones(repeats, draws, dtype=torch.float64))


def test_systematic_draws_vary_less_than_independent_ones_on_a_peaked_law() -> None:
    """Zipf 2.5 over 2,000 columns, N = 25: squared error of counts / N summed over columns, systematic against as many independent
    draws. Expected from the formulas frac (1 - frac) / N^2 and p (1 - p) / N; measured 4.5 times less (2.4 times less than 50)."""
    repeats, draws = 2000, 25
    logits_1V = zipf_logits(1, 2000, exponent=2.5)
    p_V = torch.softmax(logits_1V[0].double(), -1)
    uniform_N = torch.from_numpy(np.random.default_rng(2).random(repeats))
    targets = make(logits_1V.expand(repeats, -1), Sampled(kind="sampled", num_draws=draws, temperature=1.0), uniform_N)
    error = float((dense_counts(targets).double() / draws - p_V).square().sum(-1).mean())
    frac_V = (draws * p_V).frac()
    assert error == pytest.approx(float((frac_V * (1 - frac_V)).sum()) / draws**2, rel=0.05)
    errors = {n: float((independent(p_V, n, repeats) / n - p_V).square().sum(-1).mean()) for n in (25, 50)}
    assert errors[25] == pytest.approx(float((p_V * (1 - p_V)).sum()) / 25, rel=0.1)
    assert errors[25] > 3 * error
    assert errors[50] > 1.5 * error


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_gradient_over_draws_is_the_full_vocabularys(temperature: float) -> None:
    """A peaked law over 700 columns (three blocks) against another student: 3,000 offsets, every component within 5 standard errors
    and rounding, and the whole within 4 of the error that a mean of 3,000 such gradients has."""
    repeats, draws = 3000, 12
    teacher_1V, student_1V = zipf_logits(1, 700, exponent=1.5), random_logits(1, 700, seed=3)
    uniform_N = torch.from_numpy(np.random.default_rng(4).random(repeats))
    targets = make(teacher_1V.expand(repeats, -1), Sampled(kind="sampled", num_draws=draws, temperature=temperature), uniform_N)
    student_NV = student_1V.expand(repeats, -1).clone().requires_grad_()
    forward_kl(student_NV, targets, temperature=temperature).sum().backward()
    exact_1V = student_1V.clone().requires_grad_()
    forward_kl(exact_1V, make(teacher_1V, DENSE), temperature=temperature).sum().backward()
    grad_NV = student_NV.grad.double()
    error_V = grad_NV.mean(0) - exact_1V.grad[0].double()
    standard_V = grad_NV.std(0) / repeats**0.5
    p_V = torch.softmax(teacher_1V[0].double() / temperature, -1)
    unseen_V = p_V * draws * repeats < 20  # too few hits for a standard error of its own
    assert bool((error_V.abs() <= 5 * standard_V + 1e-6)[~unseen_V].all())
    assert float(error_V.norm()) <= 4 * float(standard_V.norm())
    assert float(error_V.norm()) < 0.05 * float(exact_1V.grad.norm())


@pytest.mark.parametrize("k", [1, 7, 40, 156, 300, 5000])
def test_the_search_in_groups_finds_the_k_largest(k: int) -> None:
    logits_NV = random_logits(6, 5000, seed=8)
    logits_NV[:, :64] += 20.0  # neighbours, and more than one a group
    targets = make(logits_NV, TopK(kind="topk", k=k, temperatures=(1.0,)))
    assert isinstance(targets, TopKTargets)
    assert all(len(set(row)) == k for row in targets.ids_NK.tolist())
    found_NK = logits_NV.gather(-1, targets.ids_NK)  # by value: logits that differ by 1e-6 are equal once shifted by 24
    torch.testing.assert_close(found_NK, logits_NV.topk(k, -1).values, atol=4e-6, rtol=0)


@pytest.mark.parametrize("gap", [0.0, 14.0, 60.0])
def test_tails_keep_their_relative_precision_however_small(gap: float) -> None:
    """Tails from 0.9 down to e^-60 of the kept mass; 1 - sum(kept) would lose all below 1e-7."""
    logits_NV = random_logits(4, 3000, seed=9, scale=1.0)
    logits_NV[:, 100:105] += gap + 5.0
    grid = (1.0, 2.0, 0.5) if gap < 60.0 else (1.0, 2.0)
    targets = make(logits_NV, TopK(kind="topk", k=5, temperatures=grid))
    assert isinstance(targets, TopKTargets)
    for g, temperature in enumerate(grid):
        log_p_NV = torch.log_softmax(logits_NV.double() / temperature, -1)
        log_tail_N = torch.logsumexp(log_p_NV.scatter(-1, targets.ids_NK, -torch.inf), -1)
        torch.testing.assert_close(targets.log_tail_NG[:, g].double(), log_tail_N, atol=2e-5, rtol=1e-6)
    every = make(logits_NV, TopK(kind="topk", k=3000, temperatures=(1.0, 2.0)))
    assert isinstance(every, TopKTargets)
    assert bool((every.log_tail_NG == -torch.inf).all())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
def test_positions_do_not_feel_the_chunk_they_are_in(policy, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV = random_logits(7, 300)
    uniform_N = torch.from_numpy(np.random.default_rng(1).random(7))
    whole = make(logits_NV, policy, uniform_N)
    monkeypatch.setattr("kd_core.softlabels.targets._CACHE_BYTES", 2 * 4 * 512)
    chunked = make(logits_NV, policy, uniform_N)
    assert same(whole, chunked)


def same(one, other) -> bool:
    values = [{**vars(targets), **vars(targets.common)} for targets in (one, other)]
    return all(torch.equal(v, values[1][k]) for k, v in values[0].items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
def test_split_is_the_inverse_of_concatenate(policy) -> None:
    rows = [make(random_logits(num, 15, seed=num), policy) for num in (1, 4, 2)]
    back = split(concatenate(rows), [1, 4, 2])
    assert all(same(row, found) for row, found in zip(rows, back, strict=True))
    assert not same(rows[1], back[2])


def test_broken_positions_are_told_and_the_others_are_as_without_them() -> None:
    policy = Sampled(kind="sampled", num_draws=6, temperature=2.0)
    sound_NV = random_logits(5, 300)
    broken_NV = sound_NV.clone()
    broken_NV[2, 7] = torch.nan
    uniform_N = torch.full((5,), 0.25, dtype=torch.float64)
    targets, finite_N = reduce_logits(broken_NV, torch.zeros(5, dtype=torch.int64), policy, uniform_N=uniform_N)
    assert finite_N.tolist() == [True, True, False, True, True]
    parts, exact = (split(t, [1] * 5) for t in (targets, make(sound_NV, policy, uniform_N)))
    assert [same(a, b) for a, b in zip(parts, exact, strict=True)] == finite_N.tolist()
