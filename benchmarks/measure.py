"""How a figure is made: ours and its peers in turn, in one process, process time beside wall time, numerics before ratios.

A ratio counts only if both sides were shown to compute the same thing in the same run: a ``Check`` that fails takes the
ratio away and the goal is not held. A peer that could not be run is named with the reason and has no value.
"""

import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from kd_core.errors import KDError

__all__ = [
    "Check",
    "Figure",
    "Goal",
    "Timing",
    "at_least",
    "at_most",
    "figure",
    "fork_server",
    "in_turn",
    "machine",
    "matmul_flops",
    "number",
    "peak_memory",
    "show",
    "tell",
    "times_better",
    "timing",
    "timings",
]


@dataclass(frozen=True)
class Figure:
    """One measured comparison.

    Attributes:
        name: what was done.
        ours: our value, in ``unit``; None where it was not run.
        unit: of both values.
        peer: what it is compared with, and why it was not run if it was not; empty for a machine's own rate.
        peer_value: the peer's value in the same run; None where there is none.
        ratio: how many times better we are, above 1 is better; None without a peer's value or with failed numerics.
        goal: what is aimed at, in words; None where there is no goal.
        holds: whether the goal is met; None where there is no goal, or no value to hold against it.
        numerics: what was checked to be equal in the same run, and the times that were measured.
    """

    name: str
    ours: float | None
    unit: str
    peer: str
    peer_value: float | None
    ratio: float | None
    goal: str | None
    holds: bool | None
    numerics: str


@dataclass(frozen=True)
class Check:
    """What was compared in the same run, and whether it came out as it must."""

    text: str
    ok: bool = True


@dataclass(frozen=True)
class Goal:
    """A bound on our value or on the ratio."""

    on: Literal["ours", "ratio"]
    bound: float
    at_least: bool

    @property
    def text(self) -> str:
        """'>= 20x', '<= 16'."""
        return f"{'>=' if self.at_least else '<='} {self.bound:,g}{'x' if self.on == 'ratio' else ''}"

    def met(self, ours: float | None, ratio: float | None) -> bool | None:
        """None where the bounded value is not there."""
        value = ours if self.on == "ours" else ratio
        if value is None:
            return None
        return value >= self.bound if self.at_least else value <= self.bound


def at_most(bound: float) -> Goal:
    """Our value is no larger."""
    return Goal("ours", bound, at_least=False)


def at_least(bound: float) -> Goal:
    """Our value is no smaller."""
    return Goal("ours", bound, at_least=True)


def times_better(bound: float) -> Goal:
    """The ratio is no smaller."""
    return Goal("ratio", bound, at_least=True)


def figure(
    name: str,
    ours: float | None,
    unit: str,
    check: Check,
    *,
    less_is_better: bool = False,
    peer: str = "",
    peer_value: float | None = None,
    goal: Goal | None = None,
) -> Figure:
    """A figure with its ratio and verdict."""
    ratio = None
    if ours is not None and peer_value is not None and check.ok:
        ratio = peer_value / ours if less_is_better else ours / peer_value
    holds = None if goal is None else (goal.met(ours, ratio) if check.ok else False)
    return Figure(name, ours, unit, peer, peer_value, ratio, None if goal is None else goal.text, holds, check.text)


# ---------------------------------------------------------------------------------------------- time and memory


@dataclass(frozen=True)
class Timing:
    """Seconds of one side: process time (all threads of this process) and wall time, least and median of the repetitions."""

    process_least: float
    process: float
    wall_least: float
    wall: float

    @property
    def text(self) -> str:
        """Milliseconds, least/median."""
        process, wall = f"{1e3 * self.process_least:,.4g}/{1e3 * self.process:,.4g}", f"{1e3 * self.wall_least:,.4g}/{1e3 * self.wall:,.4g}"
        return f"process {process}, wall {wall}"


def in_turn(*sides: Callable[[], object], repeats: int) -> list[Timing]:
    """Time functions A B A B ... after one warm-up of each.

    What is there before is kept out of garbage collection: a benchmark's own data, half a million objects, would be walked
    at random moments, a third of a second each time.
    """
    for side in sides:
        side()
    gc.collect()
    gc.freeze()
    found: list[list[tuple[float, float]]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, times in zip(sides, found, strict=True):
            wall, process = time.perf_counter(), time.process_time()
            side()
            times.append((time.process_time() - process, time.perf_counter() - wall))
    gc.unfreeze()
    return [timing(times) for times in found]


def timing(times: list[tuple[float, float]]) -> Timing:
    """Least and median of (process, wall) seconds of repetitions."""
    process, wall = zip(*times, strict=True)
    return Timing(min(process), statistics.median(process), min(wall), statistics.median(wall))


def timings(ours: Timing, peer: Timing | None = None) -> str:
    """Times as the text of a figure's numerics: 'ms, least/median: ours ...; peer ...'."""
    return f"ms, least/median: ours {ours.text}" + ("" if peer is None else f"; peer {peer.text}")


def fork_server(*modules: str) -> None:
    """Start, once, the bare process from which ``peak_memory`` forks; it imports these modules in the background."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


def peak_memory(function: Callable[..., None], *arguments: object) -> float:
    """MB of the largest resident set of a fresh process that calls a module's function; imports are in it, this process is not.

    Raises:
        KDError: the process failed.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_call_and_tell, args=(sender, function, arguments))
    child.start()
    sender.close()
    try:
        return float(receiver.recv())
    except EOFError as error:
        raise KDError(f"{function.__module__}.{function.__name__} failed in its own process; its traceback is above") from error
    finally:
        child.join()


def _call_and_tell(sender: Connection, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    function(*arguments)
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


# ---------------------------------------------------------------------------------------------- this machine, this run


def matmul_flops(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Measured floating-point operations a second of one product (m, k) x (k, n), process time."""
    m, k, n = shape
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return 2 * m * k * n / in_turn(lambda: torch.nn.functional.linear(a, b), repeats=3)[0].process


_SHAPES = {"square": (1024, 1024, 1024), "a block of SmolLM2": (2048, 576, 1536), "a tile of its head": (2048, 576, 8192)}


def machine() -> list[Figure]:
    """GEMM rates and copy bandwidth of this machine in this run, one thread."""
    rates = [
        figure(f"machine: {name} GEMM, {label}", matmul_flops(shape, dtype) / 1e9, "GFLOP/s", Check("x".join(map(str, shape))))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for label, shape in _SHAPES.items()
    ]
    a, b = torch.randn(1 << 24), torch.empty(1 << 24)
    seconds = in_turn(lambda: b.copy_(a), repeats=3)[0].process
    return [*rates, figure("machine: copy", a.numel() * 8 / seconds / 1e9, "GB/s", Check("64 MiB read and 64 MiB written"))]


# ---------------------------------------------------------------------------------------------- printing


def tell(figures: list[Figure]) -> list[Figure]:
    """The same figures, one line each on standard error: a run takes long, and the table comes at its end."""
    for f in figures:
        beside = f.peer if f.ratio is None else f"{f.ratio:,.2f} x {f.peer}"
        print(f"[{time.process_time():7.1f} s] {f.name}: {number(f.ours)} {f.unit}, {beside}", file=sys.stderr, flush=True)
    return figures


def show(figures: list[Figure], *, as_json: bool) -> None:
    """Print the figures: a JSON list and nothing else, or a table."""
    if as_json:
        print(json.dumps([asdict(figure) for figure in figures], indent=1))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("what", "ours", "peer", "times better", "goal", "numerics"):
        table.add_column(column, overflow="fold")
    before = None
    for f in figures:
        verdict = {True: " holds", False: " MISSED", None: ""}[f.holds]
        peer = f.peer if f.peer_value is None else f"{number(f.peer_value)} ({f.peer})"
        ratio = "" if f.ratio is None else f"{f.ratio:,.2f}"
        again = before is not None and (f.name, f.ours) == (before.name, before.ours)  # the same value beside another peer
        same_numerics = again and before is not None and f.numerics == before.numerics
        what, ours = ("", "") if again else (f.name, f"{number(f.ours)} {f.unit}")
        table.add_row(what, ours, peer, ratio, f"{f.goal or ''}{verdict}", "" if same_numerics else f.numerics)
        before = f
    Console(width=200).print(table)


def number(value: float | None) -> str:
    """A value in four digits, or whole from a thousand on; '-' where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
