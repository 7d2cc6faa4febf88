"""What cached soft labels add to a training step, and what they save: ``python -m benchmarks.training``.

The same loop, rows and model with and without them; then (``live_teacher``) the same rows and models through a live teacher's trainer.

Rows come from a soft-label cache on this disk through the training reader, so that reading and decoding count. The student has
SmolLM2's vocabulary and width; --quick makes it shallow, which weighs the head, and so the soft loss, more than a whole model does.
Times are of optimiser steps after the first one: the first also measures the gradient norm of each part.
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks import live_teacher
from benchmarks.loop import clocked_steps, store_rows
from benchmarks.measure import Check, Figure, Timing, figure, machine, show, tell, times_better, timing, timings
from benchmarks.workloads import sampled_rows, synthetic_teacher, token_rows
from kd_core.recipe import Objective
from kd_core.rows.keys import soft_label_key
from kd_core.train.stored_rows import StoredRows

__all__ = ["run"]

_COLUMNS = 49_152
_HARD = Objective(supervision="hard")
_SOFT = Objective(supervision="soft", hard_weight=0.5, soft_weight=0.5)
_TOLERANCE = 1e-5
_LIVE = live_teacher.Sizes(student_blocks=10, teacher_blocks=30, num_rows=4, steps=3, repeats=3, memory=True)
_LIVE_QUICK = live_teacher.Sizes(student_blocks=1, teacher_blocks=3, num_rows=2, steps=2, repeats=1, memory=False)


@dataclass(frozen=True)
class _Side:
    """One way to train the same model on the same rows.

    Attributes:
        objective: what is minimised.
        packed: documents end to end, else padded rows.
    """

    objective: Objective
    packed: bool = True


def _stored(scratch: Path, num_rows: int) -> StoredRows:
    """Rows with sampled labels, 25 draws a position, in a cache of their own."""
    rows = token_rows(num_rows, num_columns=_COLUMNS)
    keyed = [(soft_label_key("benchmark", row.ids, row.first_supervised), row) for row in rows]
    return store_rows(keyed, sampled_rows(rows, num_columns=_COLUMNS), scratch)


def _compare(num_layers: int, *, batch_rows: int, steps: int, repeats: int) -> list[Figure]:
    model = synthetic_teacher(num_layers=num_layers, hidden_size=576, num_columns=_COLUMNS).model.float().requires_grad_(True)
    sides = {"soft": _Side(_SOFT), "hard": _Side(_HARD), "padded": _Side(_HARD, packed=False)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        rows = _stored(Path(name), num_rows=max(64, batch_rows * steps))
        for _ in range(repeats):
            for side, given in sides.items():
                learner = copy.deepcopy(model)
                result, taken = clocked_steps(
                    learner, rows, given.objective, Path(name), batch_rows=batch_rows, steps=steps, packed=given.packed
                )
                seconds[side].append(taken)
                first[side] = result.metrics[0]["hard"]
    soft, hard, padded = (timing(seconds[side]) for side in sides)
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


def run(*, quick: bool) -> list[Figure]:
    """All figures of this module."""
    torch.set_num_threads(1)
    if quick:
        return [*tell(_compare(1, batch_rows=2, steps=2, repeats=1)), *tell(live_teacher.run(_LIVE_QUICK))]
    steps = [*tell(_compare(4, batch_rows=8, steps=8, repeats=5)), *tell(_compare(30, batch_rows=8, steps=4, repeats=3))]
    return [*steps, *tell(live_teacher.run(_LIVE))]


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A shallow student, few steps, no memory; under 50 seconds.")] = False,
) -> None:
    """Measure what soft labels add to a training step, in this process, now."""
    show([*machine(), *run(quick=quick)], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
