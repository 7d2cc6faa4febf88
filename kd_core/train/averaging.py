"""An exponential moving average of the weights, held beside them and put in their place for validation and at the end."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kd_core.train.sharding import slice_of

__all__ = ["Average"]


class Average:
    """avg = d avg + (1 - d) weights after each step, with d = min(decay, (1 + step) / (10 + step)): early averages forget the start."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._decay = decay
        self._average: list[Tensor] = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step (0-based)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([slice_of(a) for a in self._average], [slice_of(p.detach()) for p in self._parameters], 1.0 - decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap weights and average; twice is as before, bit for bit."""
        for parameter, average in zip(self._parameters, self._average, strict=True):
            mine, other = slice_of(parameter.detach()), slice_of(average)
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within: the model has the averaged weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    def state(self) -> list[Tensor]:
        """State for a checkpoint; sliced over ranks as the weights are."""
        return self._average

    @torch.no_grad()
    def load(self, state: Sequence[Tensor]) -> None:
        """Take this rank's slices from a checkpoint."""
        for average, saved in zip(self._average, state, strict=True):
            slice_of(average).copy_(saved)
