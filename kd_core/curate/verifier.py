"""Is an answer right? The final answer in a text (thoughts.py, extraction.py), and its comparison with the reference."""

from functools import lru_cache

from kd_core.curate.equality import Verdict, same
from kd_core.curate.extraction import read_final, read_marked
from kd_core.curate.thoughts import final_answer, is_run_on, is_thought_tag
from kd_core.recipe import Task

__all__ = ["GRADER_VERSION", "Verdict", "judge", "verify"]

GRADER_VERSION = 1
"""Raised when a verdict changes for any text: it is part of the identity of curated rows and of evaluations, so no old verdict is taken
for one of today."""


def judge(answer_text: str, reference: str, task: Task) -> Verdict:
    """Whether an answer's final answer equals the reference. Safe in worker threads.

    verifier exact: equal after trimming white space. verifier math: equal as mathematics; plain numbers exactly, with
    '016' for '16' and '50%' for both 50 and 0.5.

    Args:
        answer_text: the whole answer, decoded.
        reference: the final answer it must reach.
        task: the recipe's task: marker and verifier.

    Returns:
        right. wrong: another answer, none, an open thought, or one that runs on to another question. undecided: one of
        the two cannot be read, or they could not be compared within the limits.
    """
    answer, reference = final_answer(answer_text, task), reference.strip()
    if not answer or is_run_on(answer_text, task):
        return "wrong"
    if answer == reference:
        return "right"
    if task.verifier == "exact":
        return "wrong"
    is_marked = task.answer_marker is not None and not is_thought_tag(task.answer_marker)
    return _compare(answer, reference, is_marked)


def verify(answer_text: str, reference: str, task: Task) -> bool:
    """Whether ``judge`` finds the answer right; what is undecided is not."""
    return judge(answer_text, reference, task) == "right"


@lru_cache(maxsize=1 << 16)
def _compare(answer: str, reference: str, is_marked: bool) -> Verdict:
    left, right = read_marked(answer) if is_marked else read_final(answer), read_final(reference)
    return "undecided" if left is None or right is None else same(left, right)
