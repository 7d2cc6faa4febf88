"""Prompts of one or several turns, and the one text under which either is kept.

A single user turn is kept as its own text. Anything else (a system message of its own, earlier turns) is a JSON list of turns in
one spelling, in the same column, so that keys, splits and stores need not know of it. A text that happens to be such a list is
kept as a list of one turn, so nothing is ever taken for the other.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from kd_core.prompts.cleaning import normalise
from kd_core.recipe import Task

__all__ = ["Role", "Turn", "messages_of", "prompt_key", "prompt_text", "shown", "turns_of", "user_words"]

Role = Literal["system", "user", "assistant", "tool"]
_BEGINNING = '[{"role": "'


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a chat: who speaks, and what."""

    role: Role
    content: str


def prompt_text(turns: Sequence[Turn]) -> str:
    """The text under which turns are kept.

    >>> prompt_text([Turn("user", "1+1?")])
    '1+1?'
    >>> prompt_text([Turn("system", "Be brief."), Turn("user", "1+1?")])
    '[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]'
    """
    if [turn.role for turn in turns] == ["user"] and _listed(turns[0].content) is None:
        return turns[0].content
    return json.dumps([asdict(turn) for turn in turns], ensure_ascii=False)


def turns_of(prompt: str) -> tuple[Turn, ...]:
    """The turns that a text is kept for, oldest first.

    >>> turns_of("1+1?")
    (Turn(role='user', content='1+1?'),)
    """
    return _listed(prompt) or (Turn("user", prompt),)


def _listed(text: str) -> tuple[Turn, ...] | None:
    """The turns of a list in the spelling of ``prompt_text``; None for any other text."""
    if not text.startswith(_BEGINNING):
        return None
    try:
        turns = tuple(Turn(**turn) for turn in json.loads(text))
        return turns if json.dumps([asdict(turn) for turn in turns], ensure_ascii=False) == text else None
    except (TypeError, ValueError, RecursionError):
        return None


def messages_of(prompt: str, task: Task) -> list[dict[str, str]]:
    """Chat messages that ask for an answer: task.system goes first where the turns have no system message of their own."""
    turns = turns_of(prompt)
    if task.system is not None and all(turn.role != "system" for turn in turns):
        turns = (Turn("system", task.system), *turns)
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def prompt_key(prompt: str) -> str:
    """The text by which prompts are compared for equality: that of normalised turns."""
    return prompt_text([Turn(turn.role, normalise(turn.content)) for turn in turns_of(prompt)])


def user_words(prompt: str) -> str:
    """What the user says in a prompt: the words by which it is split and held apart from suites."""
    return "\n".join(turn.content for turn in turns_of(prompt) if turn.role == "user")


def shown(prompt: str) -> str:
    """A prompt for a reader: its text, or its turns, each after who speaks.

    >>> print(shown(prompt_text([Turn("system", "Be brief."), Turn("user", "1+1?")])))
    system: Be brief.
    <BLANKLINE>
    user: 1+1?
    """
    turns = turns_of(prompt)
    return turns[0].content if [turn.role for turn in turns] == ["user"] else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
