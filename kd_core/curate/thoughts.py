"""What a reasoning model says aloud: its text without the thought, and whether it went on to a second question.

A thought is never an answer. An open one ('<think>' without its end) leaves nothing that was said; where the template
has opened it, the text holds the end only.
"""

import re

from kd_core.recipe import Task

__all__ = [
    "continue_thought",
    "final_answer",
    "is_run_on",
    "is_thought_tag",
    "leaves_thought_open",
    "opens_thought",
    "without_opening",
    "without_thought",
]

_TAG = re.compile(r"<(/?)think(?:ing)?>|\[(/?)THINK\]")
_TURN = re.compile(
    r"^[ \t#*]*(?:Question|Q|Problem|Exercise|Example|Instruction|Task|Input|Human|User)\b[ \t]*[0-9]*[ \t]*(?:[:.]|\*\*)"
    r"|<\|(?:im_start|user|start_header_id)",
    re.MULTILINE | re.IGNORECASE,
)
_BOX = re.compile(r"\\(?:boxed|fbox)\b")


def without_thought(text: str) -> str | None:
    """The text after the last thought; None where a thought is still open at its end.

    >>> without_thought("<think>4? no, 5</think>5"), without_thought("so 5</think>5"), without_thought("<think>5")
    ('5', '5', None)
    """
    tags = list(_TAG.finditer(text))
    if not tags:
        return text
    last = tags[-1]
    return text[last.end() :] if last[1] or last[2] else None


def leaves_thought_open(text: str) -> bool:
    """Whether a text ends inside a thought, so that nothing was answered."""
    return without_thought(text) is None


def is_thought_tag(token: str) -> bool:
    """Whether a token is nothing but the beginning or the end of a thought."""
    return _TAG.fullmatch(token.strip()) is not None


def opens_thought(prompt: str) -> bool:
    """Whether the answer to a prompt (template applied) begins inside a thought."""
    return re.search(r"(?:<think(?:ing)?>|\[THINK\])\s*\Z", prompt) is not None


def without_opening(text: str, *, opened: bool) -> str:
    r"""An answer as it is written after its prompt: a thought that the prompt has opened is not opened again.

    >>> without_opening("<think>\n2+2\n</think>4", opened=True)
    '2+2\n</think>4'
    """
    first = _TAG.match(text.lstrip()) if opened else None
    return text if first is None or first[1] or first[2] else text.lstrip()[first.end() :].lstrip()


def continue_thought(text: str, *, opened: bool) -> str:
    """An answer as it reads without its prompt, with its thought opened exactly once.

    Args:
        text: the generated text.
        opened: whether the prompt ends in an open thought. Then a text that does not open one itself begins inside it.

    >>> continue_thought("2+2</think>4", opened=True), continue_thought("<think>2+2</think>4", opened=True)
    ('<think>2+2</think>4', '<think>2+2</think>4')
    """
    first = _TAG.match(text.lstrip())
    return f"<think>{text}" if opened and (first is None or first[1] or first[2]) else text


def final_answer(text: str, task: Task) -> str | None:
    """What follows the last `task.answer_marker` outside of thoughts, stripped; all that was said where there is no marker.

    Args:
        text: an answer, decoded.
        task: the recipe's task. A marker that ends a thought ('</think>') asks for one, and for all that follows it.

    Returns:
        The final answer, possibly empty, or None where the marker is absent or a thought is left open.

    >>> final_answer("7+5=12#12", Task(template="plain", answer_marker="#", verifier="math"))
    '12'
    """
    said = without_thought(text)
    if said is None or task.answer_marker is None:
        return said and said.strip()
    if _TAG.fullmatch(task.answer_marker.strip()):
        return said.strip() if task.answer_marker.strip() in text else None
    _, marker, answer = said.rpartition(task.answer_marker)
    return answer.strip() if marker else None


def is_run_on(text: str, task: Task) -> bool:
    r"""Whether a text answers its question and then goes on to another one.

    Another question is a line that begins with 'Question:' or its like, or, before a second marker, a question mark.

    >>> is_run_on("#### 42\n\nQuestion: 9+8?\n#### 17", Task(template="plain", answer_marker="####", verifier="math"))
    True
    """
    said = without_thought(text) or ""
    if task.answer_marker is not None and not _TAG.fullmatch(task.answer_marker.strip()):
        _, marker, rest = said.partition(task.answer_marker)
        between, again, _ = rest.lstrip().rpartition(task.answer_marker)
        return bool(marker) and (_TURN.search(rest) is not None or (bool(again) and "?" in between))
    box = _BOX.search(said)
    return box is not None and _TURN.search(said, box.end()) is not None
