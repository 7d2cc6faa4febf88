"""The pretended device itself: it refuses and counts what CUDA would."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kd_core.losses import StepWeights
from kd_core.losses.divergences import FORWARD_KL
from kd_core.tokens.batches import TokenRow
from kd_core.train.batches import TokenLayout
from kd_core.train.objective_model import ObjectiveModel

DEVICE = "pretended"
pytestmark = [pytest.mark.pretended, pytest.mark.parametrize("device", [DEVICE], indirect=True)]


def test_tensors_compute_and_learn_on_it(waits: Counter[str]) -> None:
    weight = torch.nn.Linear(3, 2).to(DEVICE)
    assert weight.weight.device.type == DEVICE
    weight(torch.ones(4, 3, device=DEVICE)).square().sum().backward()
    assert weight.weight.grad.device.type == DEVICE
    assert weight.weight.grad.cpu().abs().sum() > 0.0


def test_a_tied_weight_stays_tied(waits: Counter[str]) -> None:
    one, other = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    other.weight = one.weight
    moved = torch.nn.Sequential(one, other).to(DEVICE)
    assert moved[0].weight is moved[1].weight


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.stack([here.sum(), there.sum()]),
        lambda here, there: here.gather(0, there.long()),
        lambda here, there: there[here.long()],
        lambda here, there: here.index_put_((here[0].long(),), there),
        lambda here, there: torch.where(there > 0, here, 0.0),
        lambda here, there: torch.nn.functional.linear(here, there),
        lambda here, there: torch.mm(here, here, out=there),
        lambda here, there: here.numpy(),
        lambda here, there: np.asarray(here),
    ],
)
def test_what_meets_across_devices_raises(waits: Counter[str], mix: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    here, there = torch.eye(2, device=DEVICE), torch.eye(2)
    with pytest.raises((RuntimeError, TypeError), match=DEVICE):
        mix(here, there)


def test_what_cuda_allows_does_not_raise(waits: Counter[str]) -> None:
    here = torch.arange(4.0, device=DEVICE)
    assert (here * torch.tensor(2.0)).tolist() == [0.0, 2.0, 4.0, 6.0]
    assert here[torch.tensor([3, 0])].cpu().tolist() == [3.0, 0.0]
    here.copy_(torch.ones(4))
    here[torch.tensor([1])] = torch.tensor(7.0)
    assert here.tolist() == [1.0, 7.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("does", "operator", "number"),
    [
        (lambda here: float(here[0]), "_local_scalar_dense", 1),
        (lambda here: here.tolist(), "tolist", 1),
        (lambda here: here.cpu(), "_to_copy", 1),
        (lambda here: here[here > 1.0], "index", 1),
        (lambda here: (here > 1.0).nonzero(), "nonzero", 1),
        (lambda here: torch.ones(3).to(DEVICE), "_to_copy", 1),
        (lambda here: torch.ones(3).to(DEVICE, non_blocking=True), "_to_copy", 0),
        (lambda here: torch.tensor([1, 2], device=DEVICE), "_to_copy", 1),
        (lambda here: here.exp().sum() * torch.zeros((), device=DEVICE), "", 0),
    ],
)
def test_what_waits_is_counted_by_its_line(waits: Counter[str], does: Callable[[torch.Tensor], object], operator: str, number: int) -> None:
    here = torch.arange(4.0).to(DEVICE, non_blocking=True)
    does(here)
    assert sum(waits.values()) == number, waits
    assert all(name.startswith(f"{operator} at tests/devices/test_pretended.py:") for name in waits)


def test_labels_that_are_left_on_the_cpu_are_found(waits: Counter[str], tiny_model: Callable[..., Any]) -> None:
    """The fault that this device was made for, planted."""
    model = tiny_model().model.requires_grad_(True).to(DEVICE)
    batch = TokenLayout(packed=False, budget_tokens=64, device=torch.device(DEVICE)).batch([TokenRow((9, 12, 7, 14, 3, 1), 3)])
    objective, weights = ObjectiveModel(model, num_columns=17, divergence=FORWARD_KL), StepWeights(1.0, 0.0, 1.0)
    objective(batch, weights)
    with pytest.raises(RuntimeError, match="is on cpu, and another one on pretended"):
        objective(replace(batch, labels_N=batch.labels_N.cpu()), weights)
