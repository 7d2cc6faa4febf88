"""Which rows a model can learn from: those within training.max_tokens and the positions of both models. The rest is counted and said.

Importable without torch: the plan needs it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_core.errors import TrainingError
from kd_core.recipe import Training

__all__ = ["RowLimit", "UsedRows", "row_limit", "used_rows"]


@dataclass(frozen=True)
class RowLimit:
    """The longest row that is learnt from.

    Attributes:
        tokens: prompt and answer together.
        by: what sets it: a field of the recipe, or a model's positions.
    """

    tokens: int
    by: str


def row_limit(training: Training, *, positions: Mapping[str, int | None], field: str = "training") -> RowLimit:
    """The smallest of training.max_tokens and the models' positions.

    Args:
        training: of the model that learns.
        positions: 'student' or 'teacher' -> positions that it was made for; None where it has no such number.
        field: where ``training`` stands in the recipe.

    >>> training = Training(steps=1, batch_rows=1, learning_rate=0.1, max_tokens=100)
    >>> row_limit(training, positions={"student": 64, "teacher": None})
    RowLimit(tokens=64, by="the student's positions")
    """
    limits = [RowLimit(training.max_tokens, f"{field}.max_tokens")]
    limits += [RowLimit(number, f"the {side}'s positions") for side, number in positions.items() if number is not None]
    return min(limits, key=lambda limit: limit.tokens)


@dataclass(frozen=True)
class UsedRows:
    """What of some rows is within a limit.

    Attributes:
        rows, used: number of rows, and of those within it.
        positions, used_positions: their supervised tokens.
        limit: the limit.
    """

    rows: int
    used: int
    positions: int
    used_positions: int
    limit: RowLimit

    @property
    def share(self) -> float:
        """Of the rows; 1 where there are none."""
        return self.used / self.rows if self.rows else 1.0

    def __str__(self) -> str:
        left_out = f"; {self.rows - self.used:,} rows are left out, longer than {self.limit.by} = {self.limit.tokens:,}"
        return (
            f"{self.used:,} of {self.rows:,} rows ({self.share:.1%}) are learnt from, with {self.used_positions:,} of "
            f"{self.positions:,} supervised tokens{left_out if self.used < self.rows else ''}"
        )

    def require(self, training: Training, *, field: str = "training") -> "UsedRows":
        """These rows, if they are enough.

        Raises:
            TrainingError: less than training.least_rows_share of the rows can be used.
        """
        if self.share < training.least_rows_share:
            cure = f"raise {self.limit.by}" if self.limit.by.endswith("max_tokens") else "take a model with more positions"
            raise TrainingError(
                f"{self}; {field}.least_rows_share asks for {training.least_rows_share:.1%}: {cure}, remove long prompts and answers, or "
                "lower least_rows_share"
            )
        return self

    def summary(self) -> dict[str, Any]:
        """The same as plain data, for a record."""
        counts = {"rows": self.rows, "used": self.used, "positions": self.positions, "used_positions": self.used_positions}
        return {**counts, "limit": self.limit.tokens, "limited_by": self.limit.by}

    @classmethod
    def of_summary(cls, summary: Mapping[str, Any]) -> "UsedRows":
        """From a record."""
        rows, used, positions, used_positions = (int(summary[name]) for name in ("rows", "used", "positions", "used_positions"))
        return cls(rows, used, positions, used_positions, RowLimit(int(summary["limit"]), str(summary["limited_by"])))


def used_rows(num_tokens: np.ndarray, num_supervised: np.ndarray, limit: RowLimit) -> UsedRows:
    """Count rows of so many tokens, and their supervised ones, within a limit."""
    fits = num_tokens <= limit.tokens
    return UsedRows(len(num_tokens), int(fits.sum()), int(num_supervised.sum()), int(num_supervised[fits].sum()), limit)
