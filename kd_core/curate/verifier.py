"""Is an answer right? The final answer in a text, and its comparison with the reference.

Plain numbers are compared here, exactly and without floating point; everything else goes to math-verify (symbolic.py).
"""

import re
from fractions import Fraction
from functools import lru_cache

from kd_core.curate.symbolic import symbolic_equal
from kd_core.recipe import Task

__all__ = ["final_answer", "verify"]

_NUMBER = re.compile(r"([+-]?)(?:\\?[$£€¥])?\s?([+-]?)((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)\s?(\\?%)?\.?")
_MAX_DIGITS = 400


def final_answer(text: str, task: Task) -> str | None:
    """What follows the last `task.answer_marker`, stripped; the whole text where the task has no marker.

    Args:
        text: an answer, decoded.
        task: the recipe's task.

    Returns:
        The final answer, possibly empty, or None where the marker is absent.

    >>> final_answer("7+5=12#12", Task(template="plain", answer_marker="#", verifier="math"))
    '12'
    """
    if task.answer_marker is None:
        return text.strip()
    _, marker, answer = text.rpartition(task.answer_marker)
    return answer.strip() if marker else None


def verify(answer_text: str, reference: str, task: Task) -> bool:
    """Whether an answer's final answer equals the reference; False where it has none. Safe in worker threads.

    verifier exact: equal after trimming white space. verifier math: equal as plain numbers ('016' is '16', '$1,080' is
    '1080', '50%' is both 50 and 0.5, as in math-verify), else as math-verify decides.

    Args:
        answer_text: the whole answer, decoded.
        reference: the final answer it must reach.
        task: the recipe's task: marker and verifier.
    """
    answer = final_answer(answer_text, task)
    if not answer:
        return False
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return True
    return task.verifier == "math" and _math_equal(answer, reference)


@lru_cache(maxsize=1 << 16)
def _math_equal(answer: str, reference: str) -> bool:
    left, right = _plain_number(answer), _plain_number(reference)
    if left is None or right is None:
        return symbolic_equal(answer, reference)
    (left_value, left_percent), (right_value, right_percent) = left, right
    if left_value == right_value:
        return True
    if left_percent == right_percent:
        return False
    return left_value / 100 == right_value if left_percent else left_value == right_value / 100


def _plain_number(text: str) -> tuple[Fraction, bool] | None:
    """Value and whether it carries a percent sign, or None where the text is no plain number."""
    found = _NUMBER.fullmatch(text) if len(text) <= _MAX_DIGITS else None
    if found is None or (found[1] and found[2]):
        return None
    return Fraction((found[1] or found[2]) + found[3].replace(",", "")), bool(found[4])
