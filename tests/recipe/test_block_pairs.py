"""Layer maps: equal depth, last to last, named blocks as they are, and nothing that is not there (trap 23)."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_core.errors import RecipeError
from kd_core.recipe import BlockPair, HiddenStateFeatures
from kd_core.recipe.block_pairs import block_pairs

UNIFORM = HiddenStateFeatures(kind="hidden_states", source="live")
NAMED = HiddenStateFeatures(kind="hidden_states", source="live", blocks=(BlockPair(student=1, teacher=4),))


def pairs(features: HiddenStateFeatures, student: int, teacher: int, captured: tuple[int, ...] | None = None) -> list[tuple[int, int]]:
    found = block_pairs(features, student_blocks=student, teacher_blocks=teacher, captured=captured)
    return [(pair.student, pair.teacher) for pair in found]


def test_every_third_block_learns_what_stands_before_the_next_kept_one() -> None:
    """A student of blocks 0, 3, 6 ... : its block i takes the place of the teacher's blocks 3 i to 3 i + 2."""
    assert pairs(UNIFORM, 10, 30) == [(i, 3 * i + 2) for i in range(10)]


def test_captured_blocks_teach_the_block_of_their_depth() -> None:
    assert pairs(UNIFORM, 10, 30, (8, 17, 29)) == [(2, 8), (5, 17), (9, 29)]


def test_named_pairs_are_taken_as_they_are() -> None:
    assert pairs(NAMED, 2, 5) == [(1, 4)]


@given(student=st.integers(1, 60), teacher=st.integers(1, 60))
def test_pairs_rise_end_at_the_last_blocks_and_are_of_equal_depth(student: int, teacher: int) -> None:
    found = pairs(UNIFORM, student, teacher)
    assert len(found) == min(student, teacher)
    assert found[-1] == (student - 1, teacher - 1)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(found))
    assert all(0 <= s < student and 0 <= t < teacher for s, t in found)
    if student <= teacher:
        assert all(abs((s + 1) * teacher / student - (t + 1)) <= 0.5 for s, t in found)


@pytest.mark.parametrize(
    ("features", "student", "teacher", "captured", "line"),
    [
        (NAMED, 1, 5, None, "the student has no block 1; its blocks are 0 to 0"),
        (NAMED, 2, 4, None, "the teacher has no block 4; its blocks are 0 to 3"),
        (UNIFORM, 2, 8, (2, 3), r"the teacher's blocks \[2, 3\] of 8 would teach the student's blocks \[0, 0\] of 2; name the pairs"),
        (UNIFORM, 2, 8, (0,), r"would teach the student's blocks \[-1\] of 2"),
        (UNIFORM, 2, 8, (3, 9), "hidden_states.blocks: the teacher has no block 9; its blocks are 0 to 7"),
    ],
)
def test_what_is_not_there_is_refused(features, student: int, teacher: int, captured, line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        pairs(features, student, teacher, captured)
