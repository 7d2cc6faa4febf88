"""Rows of chats: the turns in one column of a row, in the OpenAI form or in ShareGPT's.

OpenAI: ``[{"role": "user", "content": "..."}]``; ShareGPT: ``[{"from": "human", "value": "..."}]``; as a list, or as its JSON text.
Of a turn who speaks and its text are read. It refuses what would be lost: calls of tools, thoughts beside the text, pictures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_core.errors import SourceError
from kd_core.prompts.turns import Role, Turn
from kd_core.prompts.values import decode_json

__all__ = ["read_chat"]

_OPENAI: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_SHAREGPT: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
_FORMS = {"role": ("content", _OPENAI), "from": ("value", _SHAREGPT)}
_LOST = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "refusal", "audio", "images")
"""Fields of a turn that hold part of what was said."""


def read_chat(value: object, *, column: str, at: str) -> tuple[tuple[Turn, ...], str | None]:
    """The turns before the last assistant turn, and that turn's text; (all turns, None) where another one is last.

    Args:
        value: what the column holds; None is a row without turns.
        column: its name, for messages.
        at: file and line, or data set and row, for messages.

    Raises:
        SourceError: it holds no turns, or something that would be lost.
    """
    place = f"{at}: column {column!r}"
    turns = [_turn(item, f"{place}, turn {number}") for number, item in enumerate(_listed(value, place), start=1)]
    if turns and turns[-1][0].role == "system":
        raise SourceError(f"{place}: a chat that ends in a system message asks for nothing; correct or remove the row")
    if not turns or turns[-1][0].role != "assistant":
        return tuple(turn for turn, _ in turns), None
    last, weight = turns[-1]
    if weight in ("0", "0.0", 0):
        raise SourceError(f"{place}: the last assistant turn has weight 0, and it is the one that is learnt; remove the row or that turn")
    return tuple(turn for turn, _ in turns[:-1]), last.content


def _listed(value: object, place: str) -> Sequence[object]:
    if isinstance(value, str):
        try:
            value = decode_json(value) if value.strip() else []
        except ValueError as error:
            raise SourceError(f"{place}: expected a list of chat turns, found text that is not JSON: {error}") from error
    if value is None:
        return ()
    if not isinstance(value, list):
        raise SourceError(f"{place}: expected a list of chat turns such as {{role: user, content: ...}}, found a {type(value).__name__}")
    return value


def _turn(item: object, place: str) -> tuple[Turn, object]:
    """A turn, and the weight it states."""
    if not isinstance(item, Mapping):
        raise SourceError(f"{place}: expected {{role, content}} or {{from, value}}, found {str(item)[:80]!r}")
    speaker = next((name for name in _FORMS if item.get(name) is not None), None)
    if speaker is None:
        raise SourceError(f"{place}: expected {{role, content}} or {{from, value}}, found the fields {', '.join(map(repr, item))}")
    text_field, roles = _FORMS[speaker]
    if (role := roles.get(str(item[speaker]))) is None:
        raise SourceError(f"{place}: {speaker} {item[speaker]!r} is not known; there are {', '.join(roles)}: rename it, or remove the row")
    if lost := next((name for name in _LOST if item.get(name)), None):
        raise SourceError(f"{place}: it has {lost!r}, which is not read and would be lost; write it into the text, or remove the row")
    return Turn(role, _text(item.get(text_field), f"{place}, {text_field}")), item.get("weight")


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        others = {part.get("type", "text") for part in content} - {"text", "input_text", "output_text"}
        if not others:
            return "".join(part["text"] for part in content)
    what = "nothing" if content is None else f"a {type(content).__name__}"
    raise SourceError(f"{place}: expected text, or a list of parts of type text, found {what}; correct or remove the row")
