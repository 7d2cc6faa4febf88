"""Which rows are short enough: by the recipe and by both models' positions, counted, and a condition."""

import numpy as np
import pytest

from kd_core.errors import TrainingError
from kd_core.recipe import Training
from kd_core.summaries import RowLimit
from kd_core.tokens.lengths import expect_enough, row_limit, used_rows

TRAINING = Training(steps=1, batch_rows=1, learning_rate=0.1, max_tokens=100)
TOKENS, SUPERVISED = np.array([10, 60, 100, 101]), np.array([1, 20, 30, 40])


@pytest.mark.parametrize(
    ("student", "teacher", "limit"),
    [
        (None, None, RowLimit(100, "training.max_tokens")),
        (200, 100, RowLimit(100, "training.max_tokens")),
        (64, 80, RowLimit(64, "the student's positions")),
        (None, 10, RowLimit(10, "the teacher's positions")),
    ],
)
def test_the_smallest_limit_counts(student: int | None, teacher: int | None, limit: RowLimit) -> None:
    assert row_limit(TRAINING, positions={"student": student, "teacher": teacher}) == limit


def test_rows_and_supervised_tokens_are_counted() -> None:
    used = used_rows(TOKENS, SUPERVISED, RowLimit(100, "training.max_tokens"))
    assert (used.rows, used.used, used.positions, used.used_positions, used.share) == (4, 3, 91, 51, 0.75)
    assert str(used) == (
        "3 of 4 rows (75.0%) are learnt from, with 51 of 91 supervised tokens; 1 rows are left out, longer than training.max_tokens = 100"
    )
    whole = used_rows(TOKENS, SUPERVISED, RowLimit(101, "training.max_tokens"))
    assert str(whole) == "4 of 4 rows (100.0%) are learnt from, with 91 of 91 supervised tokens"


def test_too_few_rows_are_an_error_that_says_what_to_do() -> None:
    used = used_rows(TOKENS, SUPERVISED, RowLimit(100, "training.max_tokens"))
    expect_enough(used, TRAINING.model_copy(update={"least_rows_share": 0.75}))
    with pytest.raises(TrainingError, match=r"3 of 4 rows .*; training\.least_rows_share asks for 90\.0%: raise training\.max_tokens, "):
        expect_enough(used, TRAINING)
    short = used_rows(TOKENS, SUPERVISED, RowLimit(20, "the student's positions"))
    with pytest.raises(TrainingError, match=r"longer than the student's positions = 20; .*: take a model with more positions"):
        expect_enough(short, TRAINING)
