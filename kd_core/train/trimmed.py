"""Training data of a student with a trimmed vocabulary: stored in the teacher's ids, mapped as they are read.

Axes: B rows, T positions.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kd_core.losses.features import TeacherFeatures
from kd_core.softlabels.kept import only_kept
from kd_core.softlabels.targets import Targets
from kd_core.tokens.batches import TokenRow, sent
from kd_core.tokens.token_map import TokenMap
from kd_core.train.batches import FeatureSource, MicroBatch
from kd_core.train.row_order import Rows

__all__ = ["FullFeatures", "TrimmedRows", "trimmed_row"]


def trimmed_row(row: TokenRow, token_map: TokenMap) -> TokenRow:
    """A row in the student's ids.

    Raises:
        TrainingError: it has a token that was removed.
    """
    return TokenRow(tuple(token_map.trim(np.array(row.ids)).tolist()), row.first_supervised)


class TrimmedRows:
    """Training rows in the student's ids."""

    def __init__(self, rows: Rows, token_map: TokenMap) -> None:
        self._rows, self._token_map = rows, token_map
        self.num_tokens, self.first_supervised = rows.num_tokens, rows.first_supervised

    def prefetch(self, numbers: Sequence[int], *, soft: bool) -> None:
        """Start to fetch rows that will be read soon."""
        self._rows.prefetch(numbers, soft=soft)

    def expect(self, numbers: Sequence[int]) -> None:
        """Hear of rows that will be read in a while."""
        self._rows.expect(numbers)

    def read(self, numbers: Sequence[int]) -> list[TokenRow]:
        """Rows, in the order asked for."""
        return [trimmed_row(row, self._token_map) for row in self._rows.read(numbers)]

    def targets(self, numbers: Sequence[int]) -> Targets:
        """Soft labels of rows over the student's ids, in the order asked for."""
        return only_kept(self._rows.targets(numbers), self._token_map)


class FullFeatures:
    """A teacher's inner states for batches in the student's ids: the teacher meets its own."""

    def __init__(self, source: FeatureSource, token_map: TokenMap) -> None:
        self._source, self._token_map = source, token_map
        self.widths, self.packable = source.widths, source.packable

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch what these rows will need soon."""
        self._source.prefetch(numbers)

    def expect(self, numbers: Sequence[int]) -> None:
        """Hear of rows that will be read in a while."""
        self._source.expect(numbers)

    def read(self, numbers: Sequence[int], rows: Sequence[TokenRow], batch: MicroBatch) -> TeacherFeatures:
        """The teacher's features of a batch."""
        full = [TokenRow(tuple(self._token_map.restore(np.array(row.ids)).tolist()), row.first_supervised) for row in rows]
        ids_BT = batch.inputs["input_ids"]
        full_ids_BT = sent(torch.from_numpy(self._token_map.full_ids), ids_BT.device)[ids_BT]
        return self._source.read(numbers, full, replace(batch, inputs={**batch.inputs, "input_ids": full_ids_BT}))
