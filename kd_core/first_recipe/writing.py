"""A first recipe as text: what only its author knows, each with the reason for it; what is left out has defaults."""

from collections.abc import Mapping
from typing import Any

from kd_core.first_recipe.data import Sample
from kd_core.first_recipe.recognise import Recognised
from kd_core.recipe.core_yaml import write_value

__all__ = ["SCHEMA_FILE", "write_recipe"]

_TASK = {
    "system": "makes answers end as the gold ones do",
    "answer_marker": "stands before the final answer",
    "verifier": "equal as numbers or formulas: math; as text: exact",
    "kind": "which of some classes",
    "input": "what is classified",
}
_COLUMN, _WIDTH = 40, 100
SCHEMA_FILE = ".kd/recipe.schema.json"
"""Where a first recipe tells editors to find the schema, beside it."""


def write_recipe(sample: Sample, found: Recognised, *, teacher: Mapping[str, Any], student: Mapping[str, Any], file: str) -> str:
    """The YAML of a first recipe.

    Args:
        sample: the data.
        found: what its columns are.
        teacher: fields of the teacher, with ``url`` of a server.
        student: fields of the student.
        file: what the recipe's file will be called.
    """
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# A first recipe, written by kd init. Read it, change it, then:  kd run {file}",
        f"# What it leaves out is filled in:  kd plan {file}  shows with what.",
        f"name: {write_value(sample.name)}",
    ]
    if found.task:
        lines += ["task:", *(_line(1, name, value, _TASK[name]) for name, value in found.task.items())]
    lines += ["prompts:", "  sources:"]
    place = {name: value for name, value in sample.source.items() if value is not None}
    source = [_line(3, name, value) for name, value in place.items()]
    source += [_line(3, name, value, found.why.get(name, "")) for name, value in found.fields.items()]
    lines += [source[0].replace("      ", "    - ", 1), *source[1:]]
    named = {name: value for name, value in teacher.items() if name != "url"}
    lines += ["teacher:", *(_line(1, name, value) for name, value in named.items())]
    if teacher["kind"] == "trained_classifier":
        lines[-len(named)] += "  # trained first, on the rows that are not held out"
    if teacher["kind"] == "server":
        lines[-1] += "  # which weights it runs, as you know them: a version or a date"
    lines += ["student:", *(_line(1, name, value, _student(student) if name == "kind" else "") for name, value in student.items())]
    if "url" in teacher:
        lines += ["run:", _line(1, "teacher_url", teacher["url"], "its key, if it wants one, comes from KD_TEACHER_API_KEY")]
    return "\n".join(lines) + "\n"


def _line(depth: int, name: str, value: Any, why: str = "") -> str:
    indent = "  " * depth
    text = f"{indent}{name}: {_quoted(value)}"
    beside = f"{text:<{_COLUMN}}  # {why}"
    return text if not why else beside if len(beside) <= _WIDTH else f"{indent}# {why}\n{text}"


def _quoted(value: Any) -> str:
    r"""A value in a line; templates always in quotes, as they begin with a brace."""
    if isinstance(value, str) and ("{" in value or "#" in value or "\n" in value):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    return write_value(value)


def _student(student: Mapping[str, Any]) -> str:
    if student["kind"] == "new_classifier":
        return "a small model with random weights"
    if student["kind"] == "from_teacher":
        return f"blocks of the teacher: one in {student['every_nth_block']}"
    return "goes on learning; with soft labels it must share the teacher's tokenizer"
