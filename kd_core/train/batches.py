"""Batches that the forward passes of a step read: rows of this rank, cut to a token budget, laid out as the model can take them.

A model that can be packed (``kd_core.tokens.packing``) gets documents end to end on one buffer; another one, and a compiled one,
whose code depends on shapes, gets padded batches of like lengths. Both give the same sums up to rounding. Which rows a step
holds depends on (seed, step) alone; ranks deal them out in turn, and every rank makes the same number of passes, because the
passes of a sharded model talk to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from kd_core.errors import SoftLabelError, TrainingError
from kd_core.losses.features import TeacherFeatures
from kd_core.recipe import Training
from kd_core.softlabels.targets import Targets, move
from kd_core.tokens.batches import TokenRow, collate, padded_batches, sent
from kd_core.tokens.packing import pack_batches, pack_rows
from kd_core.train.row_order import BLOCK_ROWS, BUFFER_BLOCKS, Rows, step_rows

__all__ = ["EXPECTED_ROWS", "PREFETCH_STEPS", "FeatureSource", "Feed", "Layout", "MicroBatch", "StepPlan", "dealt_batches"]

PREFETCH_STEPS = 4
"""A batch is decoded while so many are trained on."""
EXPECTED_ROWS = BLOCK_ROWS * BUFFER_BLOCKS // 2
"""Rows are fetched while so many are trained on: half a shuffle buffer, since the first batch of the next one needs most of its groups."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        inputs: keyword arguments of the model's backbone.
        predict_at: rows and positions whose output predicts a supervised token, two int64 tensors of shape (N,): a mask would have to
            be counted on the device, and the host to wait for it.
        labels_N: those tokens, int64, in the same order.
        num_tokens: tokens that are run, padding included.
        targets: soft labels of the same positions; None without soft supervision.
        share: 1, or 0 for a batch that is repeated so that all ranks make as many passes.
        features: the teacher's inner states at those positions; None without feature distillation.
    """

    inputs: dict[str, Any]
    predict_at: tuple[Tensor, Tensor]
    labels_N: Tensor
    num_tokens: int
    targets: Targets | None = None
    share: float = 1.0
    features: TeacherFeatures | None = None


class FeatureSource(Protocol):
    """Source of the teacher's inner states (``train.features``)."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of each place."""
        ...

    @property
    def packable(self) -> bool:
        """Tell whether batches of packed documents can be answered."""
        ...

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch what these rows will need soon; returns at once."""
        ...

    def expect(self, numbers: Sequence[int]) -> None:
        """Hear of rows that will be read in a while; returns at once."""
        ...

    def read(self, numbers: Sequence[int], rows: Sequence[TokenRow], batch: MicroBatch) -> TeacherFeatures:
        """The teacher's features of a batch, on its device; ``numbers`` and ``rows`` say what it holds.

        Raises:
            SoftLabelError: a row has none.
        """
        ...


@dataclass(frozen=True)
class Layout:
    """Way in which rows become a batch.

    Attributes:
        packed: end to end on one buffer; else padded on the right.
        budget_tokens: tokens a batch, padding included; a longer row has a batch of its own.
        device: where it is run.
    """

    packed: bool
    budget_tokens: int
    device: torch.device

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Numbers of the rows of each batch."""
        return list((pack_batches if self.packed else padded_batches)(lengths, self.budget_tokens))

    def batch(self, rows: Sequence[TokenRow], targets: Targets | None = None, *, share: float = 1.0) -> MicroBatch:
        """Rows, in this order, as one batch."""
        picked = [(row.ids, row.first_supervised) for row in rows]
        if self.packed:
            pack = pack_rows(picked)
            predict_BT, pack = pack.batch.predict_BT, pack.to(self.device)
            batch, inputs = pack.batch, pack.inputs()
        else:
            batch = collate(picked)
            predict_BT, batch = batch.predict_BT, batch.to(self.device)
            inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.attention_BT, "use_cache": False}
        rows_N, positions_N = (sent(at_N, self.device) for at_N in predict_BT.nonzero(as_tuple=True))
        found = None if targets is None else move(targets, self.device)
        return MicroBatch(inputs, (rows_N, positions_N), batch.labels_N, batch.ids_BT.numel(), found, share)


@dataclass(frozen=True)
class StepPlan:
    """The rows of one optimiser step.

    Attributes:
        num_supervised: supervised tokens of the whole step, all ranks together: what the loss is divided by.
        num_tokens: all tokens of its rows, all ranks together.
        batches: row numbers of this rank's batches, at least one.
        num_passes: forward passes of every rank; above ``len(batches)`` the first batch is run again with share 0.
        seed: of the step's random numbers.
    """

    num_supervised: int
    num_tokens: int
    batches: tuple[tuple[int, ...], ...]
    num_passes: int
    seed: int


class Feed:
    """The batches of a training run."""

    def __init__(
        self,
        rows: Rows,
        training: Training,
        layout: Layout,
        *,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
        features: FeatureSource | None = None,
    ) -> None:
        """Leave out rows that are too long.

        Raises:
            TrainingError: no row is left, or a step has fewer rows than there are ranks.
        """
        lengths = rows.num_tokens
        self._rows, self._layout, self._seed = rows, layout, seed
        self._steps, self._batch_rows = training.steps, training.batch_rows
        self._rank, self._num_ranks, self._features = rank, num_ranks, features
        self._lengths, self._supervised = lengths, lengths - rows.first_supervised
        self._kept = np.flatnonzero(lengths <= training.max_tokens)
        if not len(self._kept):
            raise TrainingError(
                f"no rows to train on: {len(lengths)} rows, none within training.max_tokens = {training.max_tokens}; "
                "check the curate counts"
            )
        if training.batch_rows < num_ranks:
            raise TrainingError(f"training.batch_rows: {training.batch_rows} rows for {num_ranks} ranks; start at most that many ranks")

    def plan(self, step: int, *, soft: bool, features: bool = False) -> StepPlan:
        """Plan what a step (0-based) reads; rows of later steps begin to be fetched, as asked with their soft labels and features."""
        later = step + PREFETCH_STEPS
        expected = step + EXPECTED_ROWS // self._batch_rows
        if later < expected < self._steps and len(self._kept) > 2 * EXPECTED_ROWS:  # one buffer is fetched whole by its first steps
            numbers = self._dealt(expected)[self._rank].tolist()
            self._rows.expect(numbers)
            if features and self._features is not None:
                self._features.expect(numbers)
        for batch in self._cut(self._dealt(later)[self._rank]) if later < self._steps else ():
            self._rows.prefetch(batch, soft=soft)
            if features and self._features is not None:
                self._features.prefetch(batch)
        dealt = self._dealt(step)
        cuts = [self._cut(numbers) for numbers in dealt]
        num_supervised, num_tokens = (int(sum(counts[numbers].sum() for numbers in dealt)) for counts in (self._supervised, self._lengths))
        return StepPlan(num_supervised, num_tokens, cuts[self._rank], max(map(len, cuts)), (self._seed << 32) + step)

    def read(self, plan: StepPlan, number: int, *, soft: bool, features: bool = False) -> MicroBatch:
        """The batch of a pass (0-based) of a step.

        Raises:
            SoftLabelError: soft labels or features are asked for, and these rows have none.
        """
        own = number < len(plan.batches)
        numbers = plan.batches[number if own else 0]
        targets = self._rows.targets(numbers) if soft else None
        rows = self._rows.read(numbers)
        batch = self._layout.batch(rows, targets, share=1.0 if own else 0.0)
        if not features:
            return batch
        if self._features is None:
            raise SoftLabelError("the objective has features and there is no teacher to take them from")
        return replace(batch, features=self._features.read(numbers, rows, batch))

    def first_rows(self, step: int, num_rows: int) -> list[TokenRow]:
        """Rows with which a step begins; the same on every rank."""
        return self._rows.read(self._picked(step)[:num_rows].tolist())

    def _cut(self, numbers: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Row numbers of each batch."""
        return tuple(tuple(numbers[part].tolist()) for part in self._layout.cut(self._lengths[numbers].tolist()))

    def _dealt(self, step: int) -> list[np.ndarray]:
        """Row numbers of each rank."""
        picked = self._picked(step)
        return [picked[rank :: self._num_ranks] for rank in range(self._num_ranks)]

    def _picked(self, step: int) -> np.ndarray:
        return self._kept[step_rows(len(self._kept), self._batch_rows, seed=self._seed, step=step)]


def dealt_batches(rows: Sequence[TokenRow], layout: Layout, *, rank: int, num_ranks: int) -> list[tuple[list[TokenRow], float]]:
    """A rank's batches of rows that are dealt out in turn, and 1, or 0 for one that is there for an equal number of passes only."""
    shares = [rows[first::num_ranks] for first in range(num_ranks)]
    cuts = [layout.cut([len(row.ids) for row in share]) for share in shares]
    mine = [([shares[rank][i] for i in part], 1.0) for part in cuts[rank]]
    return mine + [(list(rows[:1]), 0.0)] * (max(len(cut) for cut in cuts) - len(mine))
