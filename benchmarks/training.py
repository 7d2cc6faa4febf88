"""What cached soft labels add to a training step: the same loop, rows and model, with and without: ``python -m benchmarks.training``.

Rows come from a soft-label cache on this disk through the training reader, so that reading and decoding count. The student has
SmolLM2's vocabulary and width; --quick makes it shallow, which weighs the head, and so the soft loss, more than a whole model does.
Times are of optimiser steps after the first one: the first also measures the gradient norm of each part.
"""

import copy
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer

from benchmarks.measure import Check, Figure, Timing, figure, machine, show, times_better, timings
from benchmarks.reading import open_rows, soft_label_table
from benchmarks.workloads import sampled_rows, synthetic_teacher, token_rows
from kd_core.progress import Tick
from kd_core.recipe import Objective, Run, Training
from kd_core.row_keys import soft_label_key
from kd_core.shards import RowCache
from kd_core.store import LocalStore
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.data import TrainingData
from kd_core.train.loop import TrainingResult, train
from kd_core.train.reader import StoredRows

__all__ = ["run"]

_COLUMNS = 49_152
_HARD = Objective(supervision="hard")
_SOFT = Objective(supervision="soft", hard_weight=0.5, soft_weight=0.5)
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class _Side:
    """One way to train the same model on the same rows.

    Attributes:
        objective: what is minimised.
        packed: documents end to end, else padded rows.
    """

    objective: Objective
    packed: bool = True


class _Clock:
    """Process and wall time between the ticks after the first and after the last step."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float, float]] = []

    def __call__(self, tick: Tick) -> None:
        self.marks.append((tick.done, time.process_time(), time.perf_counter()))

    def step_seconds(self) -> tuple[float, float]:
        """(process, wall) of a step."""
        (first, *began), (last, *ended) = self.marks[1], self.marks[-1]
        return (ended[0] - began[0]) / (last - first), (ended[1] - began[1]) / (last - first)


def _stored(scratch: Path, num_rows: int) -> StoredRows:
    """Rows with sampled labels, 25 draws a position, in a cache of their own."""
    rows = token_rows(num_rows, num_columns=_COLUMNS)
    keyed = [(soft_label_key("benchmark", row.ids, row.first_supervised), row) for row in rows]
    store = LocalStore(scratch / "store")
    table, metadata = soft_label_table(keyed, sampled_rows(rows, num_columns=_COLUMNS))
    num_tokens = sum(row.num_supervised for row in rows)
    RowCache(store, "soft_labels", "benchmark").commit(table, num_tokens=num_tokens, metadata=metadata)
    return open_rows(store, "benchmark", [(key, len(row.ids), row.first_supervised) for key, row in keyed], scratch / "copies")


def _steps(model: Any, rows: StoredRows, side: _Side, scratch: Path, training: Training) -> tuple[TrainingResult, tuple[float, float]]:
    clock = _Clock()
    reason = None if side.packed else "measured beside packing"
    with mock.patch("kd_core.train.loop.unpackable", return_value=reason):
        result = train(
            copy.deepcopy(model),
            TrainingData(rows, ()),
            num_columns=_COLUMNS,
            training=training,
            objective=side.objective,
            seed=0,
            run=Run(device="cpu", checkpoint_every_steps=10**6, micro_batch_tokens=4096),
            checkpoints=Checkpoints(LocalStore(scratch / "checkpoints"), "b" * 32),
            tick=clock,
        )
    return result, clock.step_seconds()


def _compare(num_layers: int, *, batch_rows: int, steps: int, repeats: int) -> list[Figure]:
    model = synthetic_teacher(num_layers=num_layers, hidden_size=576, num_columns=_COLUMNS).model.float().requires_grad_(True)
    training = Training(steps=steps, batch_rows=batch_rows, learning_rate=1e-4)
    sides = {"soft": _Side(_SOFT), "hard": _Side(_HARD), "padded": _Side(_HARD, packed=False)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        rows = _stored(Path(name), num_rows=max(64, batch_rows * steps))
        for _ in range(repeats):
            for side, given in sides.items():
                result, taken = _steps(model, rows, given, Path(name), training)
                seconds[side].append(taken)
                first[side] = result.metrics[0]["hard"]
    soft, hard, padded = (_timing(seconds[side]) for side in sides)
    off = {side: abs(value - first["hard"]) / first["hard"] for side, value in first.items()}
    what = f"{batch_rows} rows of 260 tokens, half supervised, SmolLM2's vocabulary and width, {num_layers} blocks, float32"
    return [
        _figure(f"training step with cached sampled labels, {what}", soft, "plain cross-entropy step", hard, off["soft"], goal=1 / 1.1),
        _figure(f"training step on packed documents, {what}", hard, "padded rows of like length", padded, off["padded"], goal=None),
    ]


def _figure(name: str, ours: Timing, peer: str, theirs: Timing, off: float, *, goal: float | None) -> Figure:
    text = f"cross-entropy of the first step within {off:.1e}; ours / peer = {ours.process / theirs.process:.3f}; {timings(ours, theirs)}"
    bound = None if goal is None else times_better(goal)
    check = Check(text, off < _TOLERANCE)
    return figure(name, ours.process, "s", check, less_is_better=True, peer=peer, peer_value=theirs.process, goal=bound)


def _timing(taken: list[tuple[float, float]]) -> Timing:
    process, wall = zip(*taken, strict=True)
    return Timing(min(process), statistics.median(process), min(wall), statistics.median(wall))


def run(*, quick: bool) -> list[Figure]:
    """All figures of this module."""
    torch.set_num_threads(1)
    if quick:
        return _compare(2, batch_rows=2, steps=3, repeats=2)
    return [*_compare(4, batch_rows=8, steps=8, repeats=5), *_compare(30, batch_rows=8, steps=4, repeats=3)]


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A shallow student, few steps; under a minute.")] = False,
) -> None:
    """Measure what soft labels add to a training step, in this process, now."""
    show([*machine(), *run(quick=quick)], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
