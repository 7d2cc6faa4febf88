"""Which rows a model can learn from: those within training.max_tokens and the positions of both models. The rest is counted and said.

Importable without torch: the plan needs it too.
"""

from collections.abc import Mapping

import numpy as np

from kd_core.errors import TrainingError
from kd_core.recipe import AnyTraining
from kd_core.summaries import RowLimit, UsedRows

__all__ = ["expect_enough", "row_limit", "used_rows"]


def row_limit(training: AnyTraining, *, positions: Mapping[str, int | None], field: str = "training") -> RowLimit:
    """The smallest of training.max_tokens and the models' positions.

    Args:
        training: of the model that learns.
        positions: 'student' or 'teacher' -> positions that it was made for; None where it has no such number.
        field: where ``training`` stands in the recipe.

    >>> training = AnyTraining(batch_rows=1, learning_rate=0.1, max_tokens=100)
    >>> row_limit(training, positions={"student": 64, "teacher": None})
    RowLimit(tokens=64, by="the student's positions")
    """
    limits = [RowLimit(training.max_tokens, f"{field}.max_tokens")]
    limits += [RowLimit(number, f"the {side}'s positions") for side, number in positions.items() if number is not None]
    return min(limits, key=lambda limit: limit.tokens)


def used_rows(num_tokens: np.ndarray, num_supervised: np.ndarray, limit: RowLimit) -> UsedRows:
    """Count rows of so many tokens, and their supervised ones, within a limit."""
    fits = num_tokens <= limit.tokens
    return UsedRows(len(num_tokens), int(fits.sum()), int(num_supervised.sum()), int(num_supervised[fits].sum()), limit)


def expect_enough(used: UsedRows, training: AnyTraining, *, field: str = "training") -> None:
    """Refuse a training that could use too few of its rows.

    Args:
        used: its rows.
        training: of the model that learns.
        field: where ``training`` stands in the recipe.

    Raises:
        TrainingError: less than training.least_rows_share of the rows can be used.
    """
    if used.share < training.least_rows_share:
        cure = f"raise {used.limit.by}" if used.limit.by.endswith("max_tokens") else "take a model with more positions"
        raise TrainingError(
            f"{used}; {field}.least_rows_share asks for {training.least_rows_share:.1%}: {cure}, remove long prompts and answers, or "
            "lower least_rows_share"
        )
