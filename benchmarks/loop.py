"""Steps of the project's own training loop under a clock, over rows from a soft-label cache on this disk."""

import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from transformers import PreTrainedModel

from benchmarks.reading import open_rows, soft_label_table
from kd_core.progress import Tick
from kd_core.recipe import Objective, Run, Training
from kd_core.rows.table import RowCache
from kd_core.softlabels import Targets
from kd_core.store import LocalStore
from kd_core.tokens.batches import TokenRow
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.loop import TrainingResult, train
from kd_core.train.row_order import TrainingData
from kd_core.train.stored_rows import StoredRows

__all__ = ["clocked_steps", "store_rows"]


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


def store_rows(keyed: list[tuple[str, TokenRow]], targets: Sequence[Targets] | None, scratch: Path) -> StoredRows:
    """A training reader over rows and their labels in a cache below ``scratch``; without labels: over the cache that is there."""
    store = LocalStore(scratch / "store")
    if targets is not None:
        table, metadata = soft_label_table(keyed, targets)
        num_tokens = sum(row.num_supervised for _, row in keyed)
        RowCache(store, "soft_labels", "benchmark").commit(table, num_tokens=num_tokens, metadata=metadata)
    return open_rows(store, "benchmark", [(key, len(row.ids), row.first_supervised) for key, row in keyed], scratch / "copies")


def clocked_steps(
    model: PreTrainedModel, rows: StoredRows, objective: Objective, scratch: Path, *, batch_rows: int, steps: int, packed: bool = True
) -> tuple[TrainingResult, tuple[float, float]]:
    """Train ``model`` in place; (process, wall) seconds of a step, the first one left out: it also measures each part's gradient norm."""
    clock = _Clock()
    with mock.patch("kd_core.train.loop.unpackable", return_value=None if packed else "measured beside packing"):
        result = train(
            model,
            TrainingData(rows, ()),
            num_columns=model.config.vocab_size,
            training=Training(steps=steps, batch_rows=batch_rows, learning_rate=1e-4),
            objective=objective,
            seed=0,
            run=Run(device="cpu", checkpoint_every_steps=10**6, micro_batch_tokens=4096),
            checkpoints=Checkpoints(LocalStore(scratch / "checkpoints"), "b" * 32),
            tick=clock,
        )
    return result, clock.step_seconds()
