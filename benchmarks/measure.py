"""How a figure is made: our code and its peer in turn, in one process, process time, the median of the ratios."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Figure", "copy_rate", "gemm_rate", "in_turn"]


@dataclass(frozen=True)
class Figure:
    """One measured comparison.

    Attributes:
        name: what was done.
        ours: our value, in ``unit``.
        unit: of both values.
        peer: what it is compared with; empty for a machine's own rate.
        peer_value: the peer's value in the same run; None for a machine's own rate.
        ratio: how many times better we are, above 1 is better; None for a machine's own rate.
        goal: least ratio aimed at; None where there is none.
        holds: whether the goal is met; None where there is none.
        numerics: what was checked to be equal in the same run.
    """

    name: str
    ours: float
    unit: str
    peer: str
    peer_value: float | None
    ratio: float | None
    goal: float | None
    holds: bool | None
    numerics: str


def in_turn(ours: Callable[[], object], peer: Callable[[], object], *, repeats: int) -> tuple[float, float]:
    """Median process seconds of each, run A B A B after one warm-up of both."""
    ours(), peer()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for function, found in zip((ours, peer), times, strict=True):
            began = time.process_time()
            function()
            found.append(time.process_time() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def gemm_rate() -> Figure:
    """float32 matrix products of this machine, this run."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds, _ = in_turn(lambda: a @ b, lambda: None, repeats=5)
    return Figure("machine: float32 GEMM", 2 * 1024**3 / seconds / 1e9, "GFLOP/s", "", None, None, None, None, "1024 x 1024")


def copy_rate() -> Figure:
    """Memory copies of this machine, this run."""
    a, b = torch.randn(1 << 24), torch.empty(1 << 24)
    seconds, _ = in_turn(lambda: b.copy_(a), lambda: None, repeats=5)
    return Figure("machine: copy", a.numel() * 8 / seconds / 1e9, "GB/s", "", None, None, None, None, "64 MiB read and written")
