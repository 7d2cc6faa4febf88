"""The fused objective is the readable one, to rounding: value, parts, and every gradient."""

import itertools

import pytest
import torch

from kd_core.errors import SoftLabelError
from kd_core.losses import Projection, StepWeights, fused_loss, supervised_loss
from kd_core.losses import fused as fused_module
from kd_core.recipe import Dense, Divergence, ForwardKL, JensenShannon, ReverseKL, Sampled, SkewKL, SoftLabels, TopK, TotalVariation
from kd_core.softlabels.targets import Targets, make_targets, move

COLUMNS, HIDDEN, POSITIONS = 60, 8, 23
FORWARD = ForwardKL(kind="forward_kl")
DIVERGENCES: list[Divergence] = [
    FORWARD,
    ReverseKL(kind="reverse_kl"),
    JensenShannon(kind="jsd", beta=0.3),
    SkewKL(kind="skew_kl", alpha=0.1),
    TotalVariation(kind="total_variation"),
]
GRID = (1.0, 2.0)
POLICIES: list[SoftLabels] = [
    TopK(kind="topk", k=5, temperatures=GRID),
    TopK(kind="topk", k=COLUMNS, temperatures=GRID),
    Dense(kind="dense"),
]


def example(
    policy: SoftLabels, device: torch.device, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Targets]:
    """Hidden states, a projection with three padded rows, a bias, labels, targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(POSITIONS, HIDDEN, generator=generator)
    weight_VH = torch.randn(COLUMNS + 3, HIDDEN, generator=generator)
    bias_V = torch.randn(COLUMNS + 3, generator=generator)
    labels_N = torch.randint(0, COLUMNS, (POSITIONS,), generator=generator)
    teacher_NV = 2.0 * torch.randn(POSITIONS, COLUMNS, generator=generator)
    uniform_N = torch.rand(POSITIONS, generator=generator, dtype=torch.float64)
    targets = make_targets(teacher_NV, labels_N, policy, uniform_N=uniform_N)
    return hidden_NH.to(device), weight_VH.to(device), bias_V.to(device), labels_N.to(device), move(targets, device)


def results(
    policy: SoftLabels, divergence: Divergence, weights: StepWeights, device: torch.device, *, fused: bool, **form
) -> list[torch.Tensor]:
    """Loss, parts, and gradients to hidden states, projection and bias; ``form``: bias, scale, softcap."""
    hidden_NH, weight_VH, bias_V, labels_N, targets = example(policy, device)
    leaves = [hidden_NH.requires_grad_(), weight_VH.requires_grad_()]
    bias = bias_V.requires_grad_() if form.pop("bias", False) else None
    projection = Projection(weight_VH, bias, COLUMNS, **form)
    if fused:
        loss, parts = fused_loss(hidden_NH, projection, labels_N, targets, weights, divergence)
    else:
        loss, parts = supervised_loss(projection.logits(hidden_NH), labels_N, targets, weights, divergence)
    (loss / 7.0).backward()
    assert not any(value.requires_grad for value in parts.values())
    return [loss.detach(), *parts.values(), *(leaf.grad for leaf in [*leaves, *([] if bias is None else [bias])])]


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor], rtol: float = 5e-6) -> None:
    for a, b in zip(one, other, strict=True):
        assert float((a - b).abs().max()) <= rtol * float(b.abs().max())


@pytest.mark.parametrize("temperature", GRID)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda divergence: divergence.kind)
@pytest.mark.parametrize("policy", POLICIES, ids=["topk", "topk_all", "dense"])
def test_fused_is_the_reference(policy: SoftLabels, divergence: Divergence, temperature: float, device: torch.device) -> None:
    weights = StepWeights(hard=0.3, soft=0.7, temperature=temperature)
    assert_same(*(results(policy, divergence, weights, device, fused=fused) for fused in (True, False)))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sampled_labels(temperature: float, device: torch.device) -> None:
    policy, weights = Sampled(kind="sampled", num_draws=9, temperature=temperature), StepWeights(0.2, 0.8, temperature)
    assert_same(*(results(policy, FORWARD, weights, device, fused=fused) for fused in (True, False)))


@pytest.mark.parametrize(("bias", "scale", "softcap"), [(True, 1.0, None), (False, 0.5, None), (False, 1.0, 4.0), (True, 0.25, 3.0)])
def test_heads_with_a_bias_a_scale_and_a_cap(bias: bool, scale: float, softcap: float | None, device: torch.device) -> None:
    for policy, temperature in itertools.product([POLICIES[0], Sampled(kind="sampled", num_draws=9, temperature=2.0)], GRID):
        if isinstance(policy, Sampled) and temperature != policy.temperature:
            continue
        weights = StepWeights(0.3, 0.7, temperature)
        assert_same(
            *(results(policy, FORWARD, weights, device, fused=fused, bias=bias, scale=scale, softcap=softcap) for fused in (True, False))
        )


def test_hard_labels_alone(device: torch.device) -> None:
    weights = StepWeights(hard=1.0, soft=0.0, temperature=1.0)
    found, wanted = (results(POLICIES[0], FORWARD, weights, device, fused=fused) for fused in (True, False))
    assert len(found) == 4, "loss, its one part, two gradients"
    assert_same(found, wanted)


@pytest.mark.parametrize("size", [COLUMNS * 4, COLUMNS * 4 * 5, 1 << 30])
def test_chunks_and_blocks_do_not_change_it(size: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    weights = StepWeights(0.5, 0.5, 2.0)
    wanted = results(POLICIES[0], FORWARD, weights, device, fused=True)
    monkeypatch.setattr(fused_module, "_CHUNK_BYTES", 3 * size)
    monkeypatch.setattr(fused_module, "_CACHE_BYTES", size)
    assert_same(results(POLICIES[0], FORWARD, weights, device, fused=True), wanted)


def test_a_tied_projection_adds_to_the_embeddings_gradient() -> None:
    """The weight is used twice: below as embedding, above as projection."""
    hidden_NH, weight_VH, _, labels_N, targets = example(POLICIES[0], torch.device("cpu"))
    gradients = []
    for fused in (True, False):
        weight = weight_VH.clone().requires_grad_()
        states_NH = hidden_NH + weight[labels_N]
        projection = Projection(weight, None, COLUMNS)
        weights = StepWeights(0.5, 0.5, 1.0)
        if fused:
            loss, _ = fused_loss(states_NH, projection, labels_N, targets, weights, FORWARD)
        else:
            loss, _ = supervised_loss(projection.logits(states_NH), labels_N, targets, weights, FORWARD)
        loss.backward()
        gradients.append(weight.grad)
    assert_same(gradients[:1], gradients[1:])


def test_a_frozen_projection_passes_the_gradient_on_and_gets_none() -> None:
    hidden_NH, weight_VH, _, labels_N, targets = example(POLICIES[0], torch.device("cpu"))
    hidden_NH.requires_grad_()
    gradients = []
    for learns in (False, True):
        hidden_NH.grad = None
        weight = weight_VH.clone().requires_grad_(learns)
        loss, _ = fused_loss(hidden_NH, Projection(weight, None, COLUMNS), labels_N, targets, StepWeights(0.5, 0.5, 1.0), FORWARD)
        loss.backward()
        assert (weight.grad is not None) == learns
        gradients.append(hidden_NH.grad)
    assert torch.equal(*gradients)


def test_bfloat16_products_stay_within_a_bound(device: torch.device) -> None:
    """bf16 inputs, float32 sums: the gradient is within 5% of the float32 one in norm."""
    hidden_NH, weight_VH, _, labels_N, targets = example(POLICIES[0], device)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        states_NH, weight = hidden_NH.to(dtype, copy=True).requires_grad_(), weight_VH.clone().requires_grad_()
        loss, _ = fused_loss(states_NH, Projection(weight, None, COLUMNS), labels_N, targets, StepWeights(0.5, 0.5, 1.0), FORWARD)
        loss.backward()
        assert states_NH.grad.dtype == dtype
        assert weight.grad.dtype == torch.float32
        gradients.append((states_NH.grad.float(), weight.grad))
    for exact, rounded in zip(*gradients, strict=True):
        assert float((exact - rounded).norm()) < 0.05 * float(exact.norm())


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda divergence: divergence.kind)
@pytest.mark.parametrize("temperature", GRID)
def test_zero_value_and_gradient_where_the_student_is_the_teacher(divergence: Divergence, temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden_NH, weight_VH = torch.randn(9, HIDDEN, generator=generator), torch.randn(COLUMNS, HIDDEN, generator=generator)
    labels_N = torch.zeros(9, dtype=torch.int64)
    targets = make_targets(hidden_NH @ weight_VH.t(), labels_N, POLICIES[0], uniform_N=torch.zeros(9, dtype=torch.float64))
    hidden_NH.requires_grad_()
    _, parts = fused_loss(
        hidden_NH, Projection(weight_VH.requires_grad_(), None, COLUMNS), labels_N, targets, StepWeights(0.0, 1.0, temperature), divergence
    )
    loss, _ = fused_loss(hidden_NH, Projection(weight_VH, None, COLUMNS), labels_N, targets, StepWeights(0.0, 1.0, temperature), divergence)
    loss.backward()
    assert abs(float(parts["soft"])) < 1e-5
    assert float(hidden_NH.grad.abs().max()) < 2e-5
    assert float(weight_VH.grad.abs().max()) < 2e-5


def test_what_is_not_valid_is_refused_by_name() -> None:
    hidden_NH, weight_VH, _, labels_N, targets = example(POLICIES[0], torch.device("cpu"))
    projection, soft = Projection(weight_VH, None, COLUMNS), StepWeights(0.5, 0.5, 1.0)
    with pytest.raises(SoftLabelError, match="these rows have no soft labels"):
        fused_loss(hidden_NH, projection, labels_N, None, soft, FORWARD)
    with pytest.raises(SoftLabelError, match="temperature 3 is not on the grid"):
        fused_loss(hidden_NH, projection, labels_N, targets, StepWeights(0.5, 0.5, 3.0), FORWARD)
    with pytest.raises(SoftLabelError, match="63 columns, the soft labels 60"):
        fused_loss(hidden_NH, Projection(weight_VH, None, COLUMNS + 3), labels_N, targets, soft, FORWARD)
    drawn = example(Sampled(kind="sampled", num_draws=9, temperature=2.0), torch.device("cpu"))[-1]
    with pytest.raises(SoftLabelError, match="drawn at temperature 2"):
        fused_loss(hidden_NH, projection, labels_N, drawn, soft, FORWARD)
    with pytest.raises(SoftLabelError, match="reverse_kl over sampled soft labels would be biased"):
        fused_loss(hidden_NH, projection, labels_N, drawn, StepWeights(0.5, 0.5, 2.0), ReverseKL(kind="reverse_kl"))
