"""The weighted objective: parts by hand, T^2 in the gradient, schedules, and no fallback."""

import math

import pytest
import torch

from kd_core.errors import SoftLabelError
from kd_core.losses import StepWeights, forward_kl, step_weights, supervised_loss
from kd_core.recipe import Dense, Objective, Piecewise, Ramp
from kd_core.softlabels.targets import Targets, make_targets


def dense(logits_NV: torch.Tensor) -> Targets:
    num = len(logits_NV)
    return make_targets(
        logits_NV,
        torch.zeros(num, dtype=torch.int64, device=logits_NV.device),
        Dense(kind="dense"),
        uniform_N=torch.zeros(num, dtype=torch.float64),
    )


def test_three_tokens_by_hand() -> None:
    """CE = ln 4 for label 0 under q = (1/4, 1/4, 1/2); KL(p || q) = 1/4 ln 2: 0.3 ln 4 + 0.7 * 1/4 ln 2."""
    teacher_1V, student_1V = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    loss, parts = supervised_loss(student_1V, torch.tensor([0]), dense(teacher_1V), StepWeights(hard=0.3, soft=0.7, temperature=1.0))
    assert float(loss) == pytest.approx(0.3 * math.log(4) + 0.7 * 0.25 * math.log(2), abs=1e-6)
    assert {name: float(value) for name, value in parts.items()} == pytest.approx({"hard": math.log(4), "soft": 0.25 * math.log(2)})


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_squared_temperature_is_in_value_and_gradient(temperature: float, device: torch.device) -> None:
    """Trap 9, against a dense float64 autograd reference; the logged part carries no T^2."""
    generator = torch.Generator().manual_seed(0)
    teacher_NV = torch.randn(5, 9, generator=generator).to(device)
    student_NV = torch.randn(5, 9, generator=generator).to(device).requires_grad_()
    labels_N = torch.tensor([0, 3, 8, 8, 1], device=device)
    loss, parts = supervised_loss(student_NV, labels_N, dense(teacher_NV), StepWeights(hard=0.25, soft=0.5, temperature=temperature))
    loss.backward()
    exact_NV = student_NV.detach().double().requires_grad_()
    p_NV = torch.softmax(teacher_NV.double() / temperature, -1)
    kl = (p_NV * (p_NV.log() - torch.log_softmax(exact_NV / temperature, -1))).sum()
    ce = -torch.log_softmax(exact_NV, -1).gather(-1, labels_N[:, None]).sum()
    exact = 0.25 * ce + 0.5 * temperature**2 * kl
    exact.backward()
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
    assert float(parts["soft"]) == pytest.approx(float(kl.detach()), abs=1e-5)
    torch.testing.assert_close(student_NV.grad.double(), exact_NV.grad, atol=2e-6, rtol=0)


def test_soft_gradients_keep_their_size_as_the_temperature_rises() -> None:
    """What T^2 is for (Hinton et al. 2015): without it the norm at T = 4 would be about 1/16 of that at T = 1."""
    generator = torch.Generator().manual_seed(0)
    teacher_NV, student_NV = (0.3 * torch.randn(20, 9, generator=generator) for _ in range(2))
    norms = []
    for temperature in (1.0, 4.0):
        logits_NV = student_NV.clone().requires_grad_()
        weights = StepWeights(hard=0.0, soft=1.0, temperature=temperature)
        loss, _ = supervised_loss(logits_NV, torch.zeros(20, dtype=torch.int64), dense(teacher_NV), weights)
        loss.backward()
        norms.append(float(logits_NV.grad.norm()))
    assert 0.8 < norms[1] / norms[0] < 1.25


def test_the_loss_is_a_sum_over_positions() -> None:
    teacher_NV, student_NV = torch.randn(4, 6), torch.randn(4, 6)
    labels_N = torch.tensor([0, 1, 2, 3])
    weights = StepWeights(hard=0.4, soft=0.6, temperature=2.0)
    whole, _ = supervised_loss(student_NV, labels_N, dense(teacher_NV), weights)
    halves = [supervised_loss(student_NV[s], labels_N[s], dense(teacher_NV[s]), weights)[0] for s in (slice(0, 1), slice(1, 4))]
    assert float(whole) == pytest.approx(float(sum(halves)), rel=1e-6)


def test_missing_soft_labels_raise_and_hard_labels_need_none() -> None:
    """Trap 13: there is no plain-LM fallback."""
    logits_NV, labels_N = torch.randn(2, 5), torch.tensor([0, 1])
    with pytest.raises(SoftLabelError, match="these rows have no soft labels"):
        supervised_loss(logits_NV, labels_N, None, StepWeights(hard=1.0, soft=0.1, temperature=1.0))
    loss, parts = supervised_loss(logits_NV, labels_N, None, StepWeights(hard=1.0, soft=0.0, temperature=1.0))
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")))
    assert list(parts) == ["hard"]


def test_weights_follow_their_schedules() -> None:
    objective = Objective(
        supervision="soft",
        hard_weight=Ramp(kind="linear", start=1.0, end=0.0),
        soft_weight=0.5,
        temperature=Piecewise(kind="piecewise", values=(4.0, 2.0), at=(0.5,)),
    )
    assert step_weights(objective, step=0, steps=5) == StepWeights(1.0, 0.5, 4.0)
    assert step_weights(objective, step=2, steps=5) == StepWeights(0.5, 0.5, 2.0)
    assert step_weights(objective, step=4, steps=5) == StepWeights(0.0, 0.5, 2.0)
    assert step_weights(objective, step=0, steps=1) == StepWeights(1.0, 0.5, 4.0)


@pytest.mark.parametrize("supervision", ["hard", "gold"])
def test_baselines_are_cross_entropy_alone(supervision: str) -> None:
    """Trap 27: the compared models take the same recipe with supervision changed; its weights must not leak in."""
    objective = Objective(supervision=supervision, hard_weight=0.1, soft_weight=0.9, temperature=2.0)
    assert step_weights(objective, step=3, steps=9) == StepWeights(1.0, 0.0, 1.0)


def test_the_soft_part_is_the_divergence() -> None:
    teacher_NV, student_NV = torch.randn(3, 7), torch.randn(3, 7)
    _, parts = supervised_loss(student_NV, torch.tensor([0, 1, 2]), dense(teacher_NV), StepWeights(0.0, 1.0, 3.0))
    assert float(parts["soft"]) == pytest.approx(float(forward_kl(student_NV, dense(teacher_NV), temperature=3.0).sum()))
