"""The comparison of target policies: its estimators and its measures, on numbers small enough to work out."""

import math

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import policies
from benchmarks.policies import DENSE, POLICIES, SYSTEMATIC, _degrees, _independent, _norm, _renormalized

LABELS_N = torch.tensor([0])


def _gradient(policy: policies.Policy, teacher_NV: Tensor, student_NV: Tensor, seed: int = 0) -> Tensor:
    logits_NV = student_NV.clone().requires_grad_(True)
    loss = policy(teacher_NV, LABELS_N.expand(len(teacher_NV)), torch.Generator().manual_seed(seed))(logits_NV)
    (found,) = torch.autograd.grad(loss.mean(), logits_NV)
    return found


def test_independent_draws_are_dense_on_average_and_noisier_than_systematic_ones() -> None:
    """At student logits z the gradient is softmax(z) - weights; 4,000 positions with the same teacher are as many samples."""
    teacher_NV, student_NV = (torch.randn(1, 9, generator=torch.Generator().manual_seed(i)).expand(4000, -1) for i in (0, 1))
    dense_NV = _gradient(POLICIES[DENSE], teacher_NV, student_NV)
    errors = {}
    for name, policy in (("independent", _independent(25)), ("systematic", POLICIES[SYSTEMATIC])):
        off_NV = (_gradient(policy, teacher_NV, student_NV) - dense_NV) * 4000
        assert off_NV.mean(0).abs().max() < 4 * 0.5 / math.sqrt(25 * 4000), "four standard errors"
        errors[name] = float(off_NV.square().sum(-1).mean())
    p_V = torch.softmax(teacher_NV[0], -1)
    assert errors["independent"] == pytest.approx(float((p_V * (1 - p_V)).sum()) / 25, rel=0.1)
    assert errors["systematic"] < errors["independent"] / 3


def test_renormalised_top_k_is_dense_only_if_it_keeps_everything() -> None:
    teacher_NV, student_NV = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 6)
    dense_NV = _gradient(POLICIES[DENSE], teacher_NV, student_NV)
    torch.testing.assert_close(_gradient(_renormalized(6), teacher_NV, student_NV), dense_NV)
    p_NV = torch.softmax(teacher_NV, -1)
    kept_NV = torch.where(p_NV >= p_NV.topk(2, -1).values[:, -1:], p_NV, 0.0)
    by_hand_NV = (torch.full((3, 6), 1 / 6) - kept_NV / kept_NV.sum(-1, keepdim=True)) / 3
    torch.testing.assert_close(_gradient(_renormalized(2), teacher_NV, student_NV), by_hand_NV)


@pytest.mark.parametrize("degrees", [0.0, 0.01, 30.0, 90.0, 180.0])
def test_angles_are_exact_where_a_cosine_is_not(degrees: float) -> None:
    angle = math.radians(degrees)
    a, b = [torch.tensor([3.0]), torch.tensor([0.0])], [torch.tensor([math.cos(angle)]), torch.tensor([math.sin(angle)])]
    assert _degrees(a, b) == pytest.approx(degrees, abs=1e-4)
    assert _norm(a) == 3.0


def test_without_text_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KD_TEST_DATA", raising=False)
    monkeypatch.setattr(policies, "real_teacher", lambda *, quick: object())
    app = typer.Typer()
    app.command()(policies.main)
    shown = CliRunner().invoke(app, [])
    assert shown.exit_code == 0
    assert shown.output == "target policies are not measured: KD_TEST_DATA names no directory of real data\n"
    (figure,) = policies.run(quick=True)
    assert (figure.ours, figure.ratio, figure.numerics) == (None, None, "not run: KD_TEST_DATA names no directory of real data")
