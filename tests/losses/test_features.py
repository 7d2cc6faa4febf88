"""Feature losses: by hand, zero at equality, gradients against float64, and no position that should not count."""

import math

import pytest
import torch

from kd_core.errors import TrainingError
from kd_core.losses.features import FeatureLoss, TeacherFeatures, hidden_state_loss, relation_loss
from kd_core.recipe import HiddenStateFeatures, RelationFeatures

LOSSES = ("mse", "normalised_mse", "cosine")
LENGTHS = (3, 1, 5)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_state_loss(student_NW: torch.Tensor, teacher_NW: torch.Tensor, loss: str) -> torch.Tensor:
    """Position by position, in whatever precision the inputs have."""
    total = student_NW.new_zeros(())
    for s_W, t_W in zip(student_NW, teacher_NW, strict=True):
        squared = ((s_W - t_W) ** 2).sum()
        match loss:
            case "mse":
                total = total + squared / len(t_W)
            case "normalised_mse":
                total = total + squared / (t_W @ t_W)
            case _:
                total = total + 1 - s_W @ t_W / (s_W.norm() * t_W.norm())
    return total


def exact_relation_loss(student_NA: torch.Tensor, teacher_NA: torch.Tensor, lengths: tuple[int, ...], num_heads: int) -> torch.Tensor:
    """Head by head and row by row, probabilities and not their logarithms."""
    total, start = student_NA.new_zeros(()), 0
    for length in lengths:
        rows = slice(start, start + length)
        for head in range(num_heads):
            sides = []
            for side_NA in (teacher_NA, student_NA):
                size = side_NA.shape[1] // num_heads
                x_nD = side_NA[rows, head * size : (head + 1) * size]
                sides.append(torch.stack([torch.softmax(x_nD @ x_D / math.sqrt(size), -1) for x_D in x_nD]))
            p_nn, q_nn = sides
            total = total + (p_nn * (p_nn / q_nn).log()).sum() / num_heads
        start += length
    return total


def gradient(loss, student: torch.Tensor) -> tuple[float, torch.Tensor]:
    leaf = student.clone().requires_grad_(True)
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad


def test_three_positions_by_hand() -> None:
    student_NW, teacher_NW = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert float(hidden_state_loss(student_NW, teacher_NW, "mse")) == pytest.approx(16 / 2 + 5 / 2 + 2 / 2)
    assert float(hidden_state_loss(student_NW, teacher_NW, "normalised_mse")) == pytest.approx(16 / 9 + 5 / 4 + 1)
    assert float(hidden_state_loss(student_NW, teacher_NW, "cosine")) == pytest.approx((1 - 0.6) + 1 + 1)


def test_two_positions_relate_as_by_hand() -> None:
    """One head, one column: the student's products are 1, 2 / 2, 4 and the teacher's 0 everywhere."""
    student_NA, teacher_NA = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    first, second = (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)) for p in (1 / (1 + math.e), 1 / (1 + math.e**2)))
    assert float(relation_loss(student_NA, teacher_NA, lengths=(2,), num_heads=1)) == pytest.approx(first + second)


@pytest.mark.parametrize("loss", LOSSES)
def test_states_agree_with_a_float64_reference(loss, device) -> None:
    student_NW, teacher_NW = drawn(9, 7), drawn(9, 7, seed=1)
    value, found = gradient(lambda s: hidden_state_loss(s, teacher_NW.to(device), loss), student_NW.to(device))
    exact, expected = gradient(lambda s: exact_state_loss(s, teacher_NW.double(), loss), student_NW.double())
    assert value == pytest.approx(exact, rel=1e-6)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_heads", [1, 2, 6])
def test_relations_of_unequal_widths_agree_with_a_float64_reference(num_heads: int, device) -> None:
    student_NA, teacher_NA = drawn(9, 12), drawn(9, 18, seed=1)
    value, found = gradient(lambda s: relation_loss(s, teacher_NA.to(device), lengths=LENGTHS, num_heads=num_heads), student_NA.to(device))
    exact, expected = gradient(lambda s: exact_relation_loss(s, teacher_NA.double(), LENGTHS, num_heads), student_NA.double())
    assert value == pytest.approx(exact, rel=1e-6)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_states_have_no_loss_and_no_gradient(loss) -> None:
    teacher_NW = drawn(9, 7)
    value, found = gradient(lambda s: hidden_state_loss(s, teacher_NW, loss), teacher_NW)
    assert abs(value) < 1e-5
    assert float(found.abs().max()) < 1e-6


def test_equal_relations_have_no_loss_and_no_gradient() -> None:
    """A rotation of all vectors keeps every product, so it is no difference."""
    teacher_NA = drawn(9, 6)
    rotation_AA = torch.linalg.qr(drawn(6, 6, seed=3)).Q
    for student_NA in (teacher_NA, teacher_NA @ rotation_AA):
        value, found = gradient(lambda s: relation_loss(s, teacher_NA, lengths=LENGTHS, num_heads=1), student_NA)
        assert abs(value) < 1e-5
        assert float(found.abs().max()) < 1e-5


def test_no_relation_crosses_documents() -> None:
    """Trap 15: what another document holds moves neither value nor gradient of this one."""
    student_NA, teacher_NA = drawn(9, 6), drawn(9, 6, seed=1)
    changed_NA = student_NA.clone()
    changed_NA[3:] = drawn(6, 6, seed=5)
    _, before = gradient(lambda s: relation_loss(s, teacher_NA, lengths=LENGTHS, num_heads=2), student_NA)
    _, after = gradient(lambda s: relation_loss(s, teacher_NA, lengths=LENGTHS, num_heads=2), changed_NA)
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[4:], after[4:])
    alone = [
        float(relation_loss(student_NA[rows], teacher_NA[rows], lengths=(rows.stop - rows.start,), num_heads=2))
        for rows in (slice(0, 3), slice(3, 4), slice(4, 9))
    ]
    assert alone[1] == 0.0
    assert float(relation_loss(student_NA, teacher_NA, lengths=LENGTHS, num_heads=2)) == pytest.approx(sum(alone), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_teacher_of_zeros_gives_a_finite_loss(loss) -> None:
    _, found = gradient(lambda s: hidden_state_loss(s, torch.zeros(2, 3), loss), torch.zeros(2, 3))
    assert bool(torch.isfinite(found).all())


def test_bfloat16_states_are_summed_in_float32() -> None:
    """Trap 19: the difference of two near states is taken after the cast."""
    teacher_NW = drawn(64, 512)
    student_NW = (teacher_NW + 0.01 * drawn(64, 512, seed=1)).bfloat16()
    expected = float(hidden_state_loss(student_NW.double(), teacher_NW.double(), "mse"))
    found = hidden_state_loss(student_NW, teacher_NW, "mse")
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------- the module


def states(**changes) -> HiddenStateFeatures:
    return HiddenStateFeatures(kind="hidden_states", source="live", **changes)


def test_pairs_are_averaged_each_through_its_own_projection() -> None:
    loss = FeatureLoss(states(loss="mse"), student_widths=[4, 4], teacher_widths=[6, 6], seed=0)
    student, teacher = (drawn(5, 4), drawn(5, 4, seed=1)), (drawn(5, 6, seed=2), drawn(5, 6, seed=3))
    found = loss(student, TeacherFeatures(teacher, (5,)))
    parts = [exact_state_loss(s @ p.weight.T, t, "mse") for s, p, t in zip(student, loss.projections, teacher, strict=True)]
    assert float(found.detach()) == pytest.approx(float(sum(parts).detach()) / 2, rel=1e-6)
    found.backward()
    assert all(p.weight.grad is not None and float(p.weight.grad.norm()) > 0 for p in loss.projections)


def test_projections_begin_as_the_identity_or_as_drawn_from_the_seed() -> None:
    same = FeatureLoss(states(), student_widths=[5], teacher_widths=[5], seed=0)
    vectors = drawn(3, 5)
    assert float(same((vectors,), TeacherFeatures((vectors,), (3,))).detach()) == 0.0
    first, again, other = (FeatureLoss(states(), student_widths=[400], teacher_widths=[300], seed=seed) for seed in (1, 1, 2))
    weights = [loss.projections[0].weight for loss in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].detach().var()) == pytest.approx(1 / 400, rel=0.05)


def test_relations_learn_no_projection_and_refuse_heads_that_do_not_divide() -> None:
    features = RelationFeatures(kind="relations", num_heads=3, between=("queries", "values"))
    loss = FeatureLoss(features, student_widths=[6, 3], teacher_widths=[9, 6], seed=0)
    assert list(loss.parameters()) == []
    student, teacher = (drawn(9, 6), drawn(9, 3)), (drawn(9, 9, seed=1), drawn(9, 6, seed=1))
    expected = sum(exact_relation_loss(s, t, LENGTHS, 3) for s, t in zip(student, teacher, strict=True)) / 2
    assert float(loss(student, TeacherFeatures(teacher, LENGTHS))) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(TrainingError, match=r"num_heads: 3 relation heads do not divide the teacher's \[8\] columns of queries, values"):
        FeatureLoss(features, student_widths=[6, 3], teacher_widths=[9, 8], seed=0)
