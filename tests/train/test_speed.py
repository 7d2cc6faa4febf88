"""The meter counts the operations of the products that are made."""

import pytest
import torch

from kd_core.recipe import Adapter
from kd_core.student.adapters import add_adapters
from kd_core.train import speed as meter
from kd_core.train.speed import Meter, text_flops


def flops(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> float:
    """What one token, which is supervised, is counted as: with a machine of 1 operation a second and a second on the clock."""
    with monkeypatch.context() as patch:
        patch.setattr(meter, "gemm_rate", lambda device, dtype: 1.0)
        patch.setattr(meter.time, "perf_counter", iter((0.0, 1.0)).__next__)
        counted = Meter(text_flops(model, 17), device=torch.device("cpu"), dtype=torch.float32)
        counted.count(tokens=1, supervised=1)
        return counted.read()["gemm_share"]


def test_weights_that_stand_still_are_multiplied_twice_and_learning_ones_three_times(tiny_model, monkeypatch) -> None:
    model = tiny_model().model.requires_grad_(True)
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    products = sum(p.numel() for p in matrices) + 17 * model.config.hidden_size
    assert flops(model, monkeypatch) == 6 * products
    add_adapters(model.requires_grad_(False), Adapter(kind="lora", rank=2, alpha=4.0), seed=0)
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learnt > 0
    assert flops(model, monkeypatch) == 4 * products + 6 * learnt
