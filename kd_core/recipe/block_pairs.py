"""Which block of a student learns from which block of its teacher: as the recipe names them, or evenly spaced.

Blocks are counted from 0 above the embedding, on both sides: block i is block i's output, never its input. Importable without torch:
the plan shows the same pairs that training uses.
"""

from collections.abc import Sequence

from kd_core.errors import RecipeError
from kd_core.recipe import BlockPair, Features

__all__ = ["block_pairs"]


def block_pairs(features: Features, *, student_blocks: int, teacher_blocks: int, captured: Sequence[int] | None) -> tuple[BlockPair, ...]:
    """The pairs of a recipe's features, in rising order.

    Evenly spaced means equal depth: with n the smaller number of blocks, pair k of 1..n joins the student's block
    round(k S / n) - 1 and the teacher's block round(k T / n) - 1, the last with the last. Of captured states, each captured
    block t teaches the student's block of its depth, round((t + 1) S / T) - 1.

    Args:
        features: the recipe's.
        student_blocks: S.
        teacher_blocks: T.
        captured: the teacher's blocks whose states are kept; None where the teacher runs live.

    Raises:
        RecipeError: a block that is not there, or captured blocks of which two have the depth of one student's block, or one of none.
    """
    if features.blocks is not None:
        pairs = features.blocks
    elif captured is None:
        pairs = _at_equal_depth(student_blocks, teacher_blocks)
    else:
        pairs = _of_captured(captured, student_blocks, teacher_blocks)
    for side, num_blocks in (("student", student_blocks), ("teacher", teacher_blocks)):
        highest = max(getattr(pair, side) for pair in pairs)
        if highest >= num_blocks:
            raise RecipeError(f"objective.features.blocks: the {side} has no block {highest}; its blocks are 0 to {num_blocks - 1}")
    return pairs


def _at_equal_depth(student_blocks: int, teacher_blocks: int) -> tuple[BlockPair, ...]:
    """
    >>> [(pair.student, pair.teacher) for pair in _at_equal_depth(3, 7)]
    [(0, 1), (1, 4), (2, 6)]
    """
    num = min(student_blocks, teacher_blocks)
    depths = range(1, num + 1)
    return tuple(BlockPair(student=_share(k, student_blocks, num) - 1, teacher=_share(k, teacher_blocks, num) - 1) for k in depths)


def _of_captured(captured: Sequence[int], student_blocks: int, teacher_blocks: int) -> tuple[BlockPair, ...]:
    """
    >>> [(pair.student, pair.teacher) for pair in _of_captured([2, 5, 11], 4, 12)]
    [(0, 2), (1, 5), (3, 11)]
    """
    if (highest := max(captured)) >= teacher_blocks:
        raise RecipeError(f"hidden_states.blocks: the teacher has no block {highest}; its blocks are 0 to {teacher_blocks - 1}")
    students = [_share(t + 1, student_blocks, teacher_blocks) - 1 for t in captured]
    if students != sorted(set(students)) or students[0] < 0:
        raise RecipeError(
            f"objective.features.blocks: evenly spaced, the teacher's blocks {list(captured)} of {teacher_blocks} would teach the "
            f"student's blocks {students} of {student_blocks}; name the pairs, or keep other hidden_states.blocks"
        )
    return tuple(BlockPair(student=s, teacher=t) for s, t in zip(students, captured, strict=True))


def _share(part: int, of: int, whole: int) -> int:
    """part / whole of a number, rounded half up, in whole numbers."""
    return (2 * part * of + whole) // (2 * whole)
