"""Forward KL by hand, at equality, against a float64 autograd reference, and where truncated losses go wrong."""

import math

import pytest
import torch

from kd_core.errors import SoftLabelError
from kd_core.losses import forward_kl, soft_divergence
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK, TotalVariation
from kd_core.softlabels.targets import Targets, make_targets, move

GRID = (1.0, 2.0, 4.0)
DENSE = Dense(kind="dense")
TOTAL_VARIATION = TotalVariation(kind="total_variation")
FULL = TopK(kind="topk", k=30, temperatures=GRID)
TOP = TopK(kind="topk", k=4, temperatures=GRID)


def targets_of(logits_NV: torch.Tensor, policy: SoftLabels) -> Targets:
    num = len(logits_NV)
    uniform_N = torch.full((num,), 0.5, dtype=torch.float64)
    return make_targets(logits_NV, torch.zeros(num, dtype=torch.int64, device=logits_NV.device), policy, uniform_N=uniform_N)


def pair(device: torch.device | str = "cpu", *, num: int = 6, columns: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher_NV, student_NV = (2.0 * torch.randn(num, columns, generator=generator) for _ in range(2))
    return teacher_NV.to(device), student_NV.to(device).requires_grad_()


def reference_kl(teacher_NV: torch.Tensor, student_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Textbook definition, float64, dense."""
    log_p_NV = torch.log_softmax(teacher_NV.double() / temperature, -1)
    log_q_NV = torch.log_softmax(student_NV.double() / temperature, -1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def merged(p_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Probabilities of kept ids, and of all the rest as one."""
    p_NK = p_NV.gather(-1, ids_NK)
    return torch.cat([p_NK, 1 - p_NK.sum(-1, keepdim=True)], -1)


def reference_bucketed_kl(teacher_NV: torch.Tensor, student_NV: torch.Tensor, temperature: float, k: int) -> torch.Tensor:
    """KL after all but the teacher's k largest are merged to one outcome, float64."""
    p_NV = torch.softmax(teacher_NV.double() / temperature, -1)
    q_NV = torch.softmax(student_NV.double() / temperature, -1)
    ids_NK = teacher_NV.topk(k, -1).indices
    p_NB, q_NB = merged(p_NV, ids_NK), merged(q_NV, ids_NK)
    return (p_NB * (p_NB.log() - q_NB.log())).sum(-1)


def test_three_tokens_by_hand(device: torch.device) -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2."""
    teacher_1V = torch.tensor([[0.5, 0.25, 0.25]], device=device).log()
    student_1V = torch.tensor([[0.25, 0.25, 0.5]], device=device).log()
    assert float(forward_kl(student_1V, targets_of(teacher_1V, DENSE), temperature=1.0)) == pytest.approx(0.25 * math.log(2), abs=1e-6)
    one = TopK(kind="topk", k=1, temperatures=(1.0,))
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = forward_kl(student_1V, move(targets_of(teacher_1V.cpu(), one), device), temperature=1.0)
    assert float(found) == pytest.approx(by_hand, abs=1e-6)
    four = Sampled(kind="sampled", num_draws=4, temperature=1.0)
    found = forward_kl(student_1V, move(targets_of(teacher_1V.cpu(), four), device), temperature=1.0)
    assert float(found) == pytest.approx(0.25 * math.log(2), abs=1e-6)  # 2, 1, 1 draws of 4 are p itself


def test_temperature_by_hand() -> None:
    """At T = 2, p is proportional to the square roots: (2, 1) / 3 for logits (ln 16, ln 4)."""
    teacher_1V, student_1V = torch.tensor([[16.0, 4.0]]).log(), torch.zeros(1, 2)
    by_hand = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    for policy in (DENSE, TopK(kind="topk", k=2, temperatures=(2.0,)), TopK(kind="topk", k=1, temperatures=(2.0,))):
        assert float(forward_kl(student_1V, targets_of(teacher_1V, policy), temperature=2.0)) == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("policy", [DENSE, FULL, TOP], ids=["dense", "topk_all", "topk"])
def test_zero_value_and_gradient_at_equality(policy: SoftLabels, temperature: float, device: torch.device) -> None:
    teacher_NV, _ = pair(device)
    student_NV = (teacher_NV + 3.0).requires_grad_()  # logits are equal up to a constant
    value_N = forward_kl(student_NV, targets_of(teacher_NV, policy), temperature=temperature)
    value_N.sum().backward()
    assert float(value_N.detach().abs().max()) < 2e-6
    assert float(student_NV.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("policy", [DENSE, FULL], ids=["dense", "topk_all"])
def test_value_and_gradient_equal_the_dense_reference(policy: SoftLabels, temperature: float, device: torch.device) -> None:
    teacher_NV, student_NV = pair(device)
    value_N = forward_kl(student_NV, targets_of(teacher_NV, policy), temperature=temperature)
    value_N.sum().backward()
    exact_NV = student_NV.detach().double().requires_grad_()
    exact_N = reference_kl(teacher_NV, exact_NV, temperature)
    exact_N.sum().backward()
    torch.testing.assert_close(value_N.detach().double(), exact_N.detach(), atol=5e-6, rtol=0)
    torch.testing.assert_close(student_NV.grad.double(), exact_NV.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", GRID)
def test_topk_equals_the_bucketed_reference(temperature: float, device: torch.device) -> None:
    teacher_NV, student_NV = pair(device)
    value_N = forward_kl(student_NV, targets_of(teacher_NV, TOP), temperature=temperature)
    value_N.sum().backward()
    exact_NV = student_NV.detach().double().requires_grad_()
    exact_N = reference_bucketed_kl(teacher_NV, exact_NV, temperature, TOP.k)
    exact_N.sum().backward()
    torch.testing.assert_close(value_N.detach().double(), exact_N.detach(), atol=5e-6, rtol=0)
    torch.testing.assert_close(student_NV.grad.double(), exact_NV.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("noise", "bound"), [(1.0, 0.01), (0.1, 0.03)])
@pytest.mark.parametrize("policy", [DENSE, TopK(kind="topk", k=20_000, temperatures=GRID)], ids=["dense", "topk"])
def test_total_variation_keeps_its_gradient_in_a_large_vocabulary(policy: SoftLabels, noise: float, bound: float) -> None:
    """V = 50,000 and T = 4: a probability is 2e-5. Off by the few whose sign is rounding, the more the nearer the student is."""
    columns, temperature = 50_000, 4.0
    generator = torch.Generator().manual_seed(0)
    teacher_NV = 2.0 * torch.randn(2, columns, generator=generator)
    student_NV = (teacher_NV + noise * torch.randn(2, columns, generator=generator)).requires_grad_()
    targets = targets_of(teacher_NV, policy)
    value_N = soft_divergence(student_NV, targets, TOTAL_VARIATION, temperature=temperature)
    value_N.sum().backward()
    exact_NV = student_NV.detach().double().requires_grad_()
    p_NV, q_NV = (torch.softmax(logits_NV.double() / temperature, -1) for logits_NV in (teacher_NV, exact_NV))
    if isinstance(policy, TopK):
        p_NV, q_NV = (merged(probability_NV, teacher_NV.topk(policy.k, -1).indices) for probability_NV in (p_NV, q_NV))
    exact_N = 0.5 * (p_NV - q_NV).abs().sum(-1)
    exact_N.sum().backward()
    torch.testing.assert_close(value_N.detach().double(), exact_N.detach(), atol=1e-5, rtol=1e-4)
    assert float((student_NV.grad.double() - exact_NV.grad).norm()) < bound * float(exact_NV.grad.norm())
    same_NV = (teacher_NV + 3.0).requires_grad_()
    soft_divergence(same_NV, targets, TOTAL_VARIATION, temperature=temperature).sum().backward()
    assert float(same_NV.grad.norm()) < 1e-3 * float(exact_NV.grad.norm())


def test_gradients_pass_gradcheck_in_the_limits_of_float32() -> None:
    teacher_NV, student_NV = pair(num=2, columns=6)
    direction_NV = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    small = TopK(kind="topk", k=2, temperatures=(2.0,))
    sampled = Sampled(kind="sampled", num_draws=5, temperature=2.0)
    for policy in (DENSE, small, sampled):
        targets = targets_of(teacher_NV, policy)
        value = forward_kl(student_NV, targets, temperature=2.0).sum()
        (grad_NV,) = torch.autograd.grad(value, student_NV)
        step = 1e-2
        with torch.no_grad():
            ahead, behind = (forward_kl(student_NV + s * direction_NV, targets, temperature=2.0).sum() for s in (step, -step))
        assert float((ahead - behind) / (2 * step)) == pytest.approx(float((grad_NV * direction_NV).sum().detach()), abs=1e-3)


def test_student_mass_outside_k_is_never_free() -> None:
    """Trap 10: the student keeps its ratios inside the top k and moves mass outside; a renormalised loss would not see it."""
    teacher_1V = torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0]])
    policy = TopK(kind="topk", k=2, temperatures=(1.0,))
    losses = []
    for outside in (0.0, 1.0, 2.0, 4.0):
        student_1V = torch.tensor([[4.0, 3.0, outside, outside, outside]])
        losses.append(float(forward_kl(student_1V, targets_of(teacher_1V, policy), temperature=1.0)))
    assert losses[0] == pytest.approx(0.0, abs=1e-6)
    assert losses == sorted(losses)
    assert losses[1] > 0.02
    assert losses[-1] > 0.9


def test_mass_moved_within_the_tail_costs_nothing() -> None:
    teacher_1V = torch.tensor([[4.0, 3.0, 1.0, 0.0]])
    student_1V = torch.tensor([[4.0, 3.0, 0.0, 1.0]])
    policy = TopK(kind="topk", k=2, temperatures=(1.0,))
    assert float(forward_kl(student_1V, targets_of(teacher_1V, policy), temperature=1.0)) == pytest.approx(0.0, abs=1e-6)


def test_negative_estimates_are_not_clamped() -> None:
    """Trap 11: a sampled estimate below zero keeps its value and its gradient."""
    teacher_1V = torch.tensor([[0.6, 0.4]]).log()
    targets = targets_of(teacher_1V, Sampled(kind="sampled", num_draws=1, temperature=1.0))
    student_1V = torch.tensor([[2.0, 0.0]], requires_grad=True)
    value_1 = forward_kl(student_1V, targets, temperature=1.0)
    value_1.sum().backward()
    q = 1 / (1 + math.exp(-2))
    assert float(value_1.detach()) == pytest.approx(0.6 * math.log(0.6) + 0.4 * math.log(0.4) - math.log(q), abs=1e-6)
    assert float(value_1.detach()) < 0.0
    assert student_1V.grad[0].tolist() == pytest.approx([q - 1, 1 - q], abs=1e-6)


def test_a_kept_sum_below_zero_has_gradient_where_the_student_is_above_the_teacher() -> None:
    """The k kept terms alone sum to less than zero here; with the tail bucket the loss is positive and pulls back."""
    teacher_1V = torch.tensor([[1.0, 0.0, 0.0]])
    student_1V = torch.tensor([[3.0, 0.0, 0.0]], requires_grad=True)
    policy = TopK(kind="topk", k=1, temperatures=(1.0,))
    value_1 = forward_kl(student_1V, targets_of(teacher_1V, policy), temperature=1.0)
    value_1.sum().backward()
    p, q = (math.exp(x) / (math.exp(x) + 2) for x in (1.0, 3.0))
    assert p * math.log(p / q) < 0.0
    assert float(value_1.detach()) == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=1e-6)
    assert student_1V.grad[0].tolist() == pytest.approx([q - p, (p - q) / 2, (p - q) / 2], abs=1e-6)


def test_an_extreme_student_gives_finite_numbers() -> None:
    """All student mass on one id, far outside: log-probabilities near -2,000 survive, in value and gradient."""
    teacher_NV, _ = pair()
    for policy in (DENSE, TOP, Sampled(kind="sampled", num_draws=3, temperature=1.0)):
        student_NV = torch.zeros(6, 30)
        student_NV[:, 7] = 2000.0
        student_NV.requires_grad_()
        value_N = forward_kl(student_NV, targets_of(teacher_NV, policy), temperature=1.0)
        value_N.sum().backward()
        assert torch.isfinite(value_N).all()
        assert torch.isfinite(student_NV.grad).all()


def test_sampled_labels_refuse_any_other_temperature() -> None:
    teacher_NV, student_NV = pair()
    targets = targets_of(teacher_NV, Sampled(kind="sampled", num_draws=5, temperature=2.0))
    with pytest.raises(SoftLabelError, match=r"drawn at temperature 2 and are valid only there, not at 1\.5"):
        forward_kl(student_NV, targets, temperature=1.5)


def test_topk_labels_refuse_a_temperature_off_the_grid() -> None:
    teacher_NV, student_NV = pair()
    with pytest.raises(SoftLabelError, match=r"temperature 3 is not on the grid .*\(1\.0, 2\.0, 4\.0\)"):
        forward_kl(student_NV, targets_of(teacher_NV, TOP), temperature=3.0)


def test_another_vocabulary_is_refused() -> None:
    teacher_NV, student_NV = pair()
    with pytest.raises(SoftLabelError, match="student logits have 29 columns, the soft labels 30"):
        forward_kl(student_NV[:, :29], targets_of(teacher_NV, DENSE), temperature=1.0)


def test_bfloat16_students_are_computed_in_float32() -> None:
    teacher_NV, student_NV = pair()
    half_NV = student_NV.detach().bfloat16()
    found_N = forward_kl(half_NV, targets_of(teacher_NV, DENSE), temperature=1.0)
    assert found_N.dtype == torch.float32
    torch.testing.assert_close(found_N.double(), reference_kl(teacher_NV, half_NV, 1.0), atol=5e-6, rtol=0)
