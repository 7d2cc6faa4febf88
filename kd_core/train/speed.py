"""Speed of a training run, and how near it is to what its matrix products could be.

The share of the GEMM rate counts 6 floating-point operations a weight and token (forward, and two products backward; 4 for a weight
that stands still) for matrices of the backbone over all tokens, padding included, and for the output projection over supervised
tokens. Attention scores and a live teacher are left out, so it is a lower bound.
"""

import resource
import time
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

__all__ = ["Flops", "Meter", "gemm_rate", "peak_memory_bytes", "text_flops"]

_SIZE = 512


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward and backward pass: of the backbone a token, and of the head a supervised token."""

    token: int
    supervised: int


def text_flops(model: PreTrainedModel, num_columns: int) -> Flops:
    """Operations of a causal language model's matrix products."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    backbone = [p for p in model.get_decoder().parameters() if p.ndim >= 2 and p is not embedding]
    return Flops(sum(_flops(p) * p.numel() for p in backbone), _flops(head) * num_columns * head.shape[-1])


class Meter:
    """Counts tokens between two readings."""

    def __init__(self, flops: Flops | None, *, device: torch.device, dtype: torch.dtype) -> None:
        self._flops, self._device = flops, device
        self._rate = None if flops is None else gemm_rate(device, dtype)
        self._tokens = self._supervised = 0
        self._since = time.perf_counter()

    def count(self, *, tokens: int, supervised: int) -> None:
        """Add what one forward and backward pass of this rank went over."""
        self._tokens += tokens
        self._supervised += supervised

    def read(self) -> dict[str, float]:
        """Rates of this rank since the last reading; no gemm_share where operations are not known."""
        now = time.perf_counter()
        seconds = now - self._since
        found = {
            "tokens_per_second": self._tokens / seconds,
            "supervised_tokens_per_second": self._supervised / seconds,
            "peak_memory_bytes": float(peak_memory_bytes(self._device)),
        }
        if self._flops is not None and self._rate is not None:
            flops = self._flops.token * self._tokens + self._flops.supervised * self._supervised
            found["gemm_share"] = flops / seconds / self._rate
        self._tokens, self._supervised, self._since = 0, 0, now
        return found


def _flops(weight: nn.Parameter) -> int:
    """Operations a number of a matrix and token: forward, gradient of the input, and of the weight if it learns."""
    return 6 if weight.requires_grad else 4


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square product, the best of three; some milliseconds."""
    a, b = (torch.ones(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        nn.functional.linear(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * _SIZE**3 / best


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory so far: of tensors on a CUDA device, else the largest resident set of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
