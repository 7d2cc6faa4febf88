"""What somebody's rows are: a prompt and its answer, the turns of a chat, or a text and its class; and how an answer can be verified.

Names decide first, then the values. Whatever is found comes with its reason, and nothing is guessed where several readings are
possible.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd_core.curate.forms import Text
from kd_core.curate.reading import read_form
from kd_core.errors import SourceError
from kd_core.first_recipe.data import Sample
from kd_core.prompts.images import ENDINGS
from kd_core.prompts.values import decode_json

__all__ = ["Recognised", "recognise"]

_PROMPTS = ("question", "problem", "prompt", "instruction", "query", "user", "q", "input", "text", "sentence", "document", "article")
_WORKED = ("solution", "rationale", "reasoning", "explanation", "worked_solution", "chain_of_thought")
_ANSWERS = ("answer", "final_answer", "response", "output", "completion", "target", "gold", "assistant", "a", "summary", "translation")
_LABELS = ("label_text", "label_name", "label", "category", "class", "intent", "sentiment", "topic", "emotion", "species")
_BEFORE = {"body": " ", "context": "\n\n", "passage": "\n\n", "story": "\n\n"}
"""Columns that go before a question, and what stands between them."""
_MARKERS = {"####": "Work it out step by step. End with a line that holds #### and the final answer alone."}
"""Marks of a final answer, and what makes a teacher write them."""
_MOST = 0.9
_SHORT = 60

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Recognised:
    """What rows are.

    Attributes:
        fields: of the recipe's source: prompt, gold and reference, or messages.
        task: of the recipe's task: answer_marker, verifier, system, or kind and input of classes; empty where no answer can be verified.
        why: field -> the reason for it, a few words.
        unused: columns that no field names.
    """

    fields: Mapping[str, str]
    task: Mapping[str, str] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def recognise(sample: Sample) -> Recognised:
    """Recognise what rows are by the names and values of their columns; a folder of folders of images is classes.

    Raises:
        SourceError: the prompts cannot be told; it names the columns.

    >>> rows = [{"question": "1+1?", "answer": "1 and 1 is 2\\n#### 2"}] * 3
    >>> found = recognise(Sample({"kind": "file", "path": "x.jsonl"}, rows, "x"))
    >>> dict(found.fields), found.task["answer_marker"], found.task["verifier"]
    ({'prompt': '{question}', 'gold': '{answer}'}, '####', 'math')
    """
    if sample.image_edge is not None:
        return Recognised({}, {"kind": "classification", "input": "image"}, {"kind": "a folder of images is a class"})
    rows = sample.rows
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if (chats := next((name for name in columns if _is_chat(rows, name)), None)) is not None:
        why = {"messages": "lists of turns; of each the last assistant turn is learnt, what stands before it is the prompt"}
        return Recognised({"messages": chats}, why=why, unused=tuple(name for name in columns if name != chats))
    texts = [name for name in columns if _is_text(rows, name)]
    if (classes := _classes(rows, texts, columns)) is not None:
        return classes
    prompt, used, reason = _prompt(texts, columns)
    answers = [name for name in texts if name not in used]
    found = _answer(rows, answers, lone=len(answers) == 1 and reason != _NAMED)
    fields = {"prompt": prompt, **found.fields}
    unused = tuple(name for name in columns if not any(f"{{{name}}}" in template for template in fields.values()))
    return Recognised(fields, found.task, {"prompt": reason, **found.why}, unused)


_NAMED = "by its name"


def _is_text(rows: Rows, column: str) -> bool:
    values = [value for row in rows if (value := row.get(column)) is not None]
    return all(isinstance(value, str) for value in values) and any(value.strip() for value in values)


def _is_chat(rows: Rows, column: str) -> bool:
    value = next((value for row in rows if (value := row.get(column))), None)
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            value = decode_json(value)
        except ValueError:
            return False
    return isinstance(value, list) and isinstance(value[0], Mapping) and bool({"role", "from"} & value[0].keys())


def _by_name(columns: Sequence[str], names: Sequence[str]) -> str | None:
    plain = {column.lower().replace(" ", "_").replace("-", "_"): column for column in reversed(columns)}
    return next((plain[name] for name in names if name in plain), None)


def _classes(rows: Rows, texts: Sequence[str], columns: Sequence[str]) -> Recognised | None:
    """A text and its class; None where no column is called one, or another is called an answer."""
    label = _by_name(texts, _LABELS)
    others = [name for name in texts if _by_name([name], _LABELS) is None]
    text = _by_name(others, _PROMPTS) or (others[0] if len(others) == 1 else None)
    if label is None or text is None or _by_name([name for name in others if name != text], (*_WORKED, *_ANSWERS)) is not None:
        return None
    if _share(_values(rows, label), lambda value: len(value) <= _SHORT and "\n" not in value.strip()) < _MOST:
        return None
    if _share(_values(rows, text), lambda value: value.lower().endswith(ENDINGS)) >= _MOST:
        raise SourceError(
            f"--data: column {text!r} names images, and how large they are is not looked at; put them into a folder a class, and name the "
            "folder above these"
        )
    unused = tuple(name for name in columns if name not in (text, label))
    why = {"prompt": "what is classified", "gold": f"{_NAMED}: its class"}
    return Recognised({"prompt": f"{{{text}}}", "gold": f"{{{label}}}"}, {"kind": "classification", "input": "text"}, why, unused)


def _prompt(texts: Sequence[str], columns: Sequence[str]) -> tuple[str, list[str], str]:
    """(template, columns in it, reason)."""
    asked = _by_name(texts, _PROMPTS)
    if asked is None and 1 <= len(texts) <= 2:
        return f"{{{texts[0]}}}", [texts[0]], "the first of the two columns of text" if len(texts) == 2 else "the only column of text"
    if asked is None:
        listed = ", ".join(map(repr, columns))
        raise SourceError(
            f"--data: which of the columns {listed} is the prompt? None has a name such as question, prompt or messages; rename one, or "
            "write the recipe's source by hand: prompt: '{COLUMN}', gold: '{COLUMN}'"
        )
    if asked.lower() == "instruction" and (more := _by_name(texts, ("input",))) is not None:
        return f"{{{asked}}}\n\n{{{more}}}", [asked, more], _NAMED
    before = _by_name([name for name in texts if name != asked], tuple(_BEFORE))
    if before is not None:
        return f"{{{before}}}{_BEFORE[before.lower()]}{{{asked}}}", [before, asked], _NAMED
    return f"{{{asked}}}", [asked], _NAMED


def _answer(rows: Rows, columns: Sequence[str], *, lone: bool) -> Recognised:
    """Gold, reference and task, from the columns beside the prompt."""
    worked, final = _by_name(columns, _WORKED), _by_name(columns, _ANSWERS)
    if worked is not None and final is not None:
        return _verified(rows, f"{{{worked}}}", final, {"gold": f"{_NAMED}: worked out", "reference": f"{_NAMED}: the final answer"})
    column = worked or final or (columns[0] if lone else None)
    if column is None:
        return Recognised({}, why={})
    gold, reason = f"{{{column}}}", "the other column of text" if worked is None and final is None else _NAMED
    values = _values(rows, column)
    for marker, system in _MARKERS.items():
        if _share(values, lambda value, mark=marker: mark in value) >= _MOST:  # type: ignore[misc]
            verifier = _verifier([value.rpartition(marker)[2] for value in values])
            task = {"system": system, "answer_marker": marker, "verifier": verifier}
            return Recognised({"gold": gold}, task, {"gold": reason, "answer_marker": "it is in nearly all of them"})
    if _share(values, lambda value: len(value) <= _SHORT and "\n" not in value.strip()) >= _MOST:
        return _verified(rows, gold, column, {"gold": reason, "reference": "short enough to verify answers by"})
    return Recognised({"gold": gold}, why={"gold": reason})


def _verified(rows: Rows, gold: str, column: str, why: Mapping[str, str]) -> Recognised:
    return Recognised({"gold": gold, "reference": f"{{{column}}}"}, {"verifier": _verifier(_values(rows, column))}, why)


def _values(rows: Rows, column: str) -> list[str]:
    return [value for row in rows if isinstance(value := row.get(column), str) and value.strip()]


def _share(values: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, values)) / max(1, len(values))


def _verifier(finals: Sequence[str]) -> str:
    """math where nearly all final answers are read as numbers or formulas."""

    def is_math(text: str) -> bool:
        form = read_form(text.strip())
        return form is not None and not isinstance(form, Text)

    return "math" if _share(finals, is_math) >= _MOST else "exact"
