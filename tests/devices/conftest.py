"""Runs on the device of a test, and the waits of the pretended one."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.state import AcceleratorState

from kd_core.recipe import Run
from tests.devices import pretended


@pytest.fixture
def waits(device: torch.device) -> Counter[str]:
    """How often the host waits for the pretended device in this test, by 'operator at file:line'."""
    assert device.type == pretended.NAME, "no other one counts"
    return pretended.waits


@pytest.fixture
def runs_on(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Run]]:
    """``runs_on("device")`` and ``runs_on("cpu")``: settings of a run there; call it before each run.

    accelerate holds on to the first device that it meets in a process, and no recipe can name the pretended one.
    """
    if device.type == pretended.NAME:
        for module in [module for name, module in sys.modules.items() if name.startswith("kd_core") and hasattr(module, "pick_device")]:
            monkeypatch.setattr(module, "pick_device", lambda wanted: device if wanted == "auto" else torch.device(wanted))

    def settings(where: str) -> Run:
        AcceleratorState._reset_state(reset_partial_state=True)
        if where == "cpu":
            return Run(device="cpu", micro_batch_tokens=64)
        if device.type == pretended.NAME:
            monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(device))
            return Run(device="auto", micro_batch_tokens=64)
        return Run(device=device.type, micro_batch_tokens=64)

    yield settings
    AcceleratorState._reset_state(reset_partial_state=True)
