"""Templates over columns: ``'{question}'`` or ``'{Body} {Question}'``.

Owns the one small language in which a recipe says which columns make a prompt, a gold answer or a reference. It refuses
attribute and index access, conversions and format specs: a template names columns and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from kd_core.errors import SourceError

__all__ = ["MAX_CHARACTERS", "Template", "compile_template", "expect_column", "fill"]


MAX_CHARACTERS = 10_000_000


@dataclass(frozen=True)
class Template:
    """A checked template: (literal text, column that follows it or None) pairs, and where the recipe states it."""

    where: str
    parts: tuple[tuple[str, str | None], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it needs, in order of use."""
        return tuple(column for _, column in self.parts if column is not None)


def compile_template(text: str, *, where: str) -> Template:
    """Check a template once, before any row is read.

    Args:
        text: literal text with ``{column}`` places; ``{{`` and ``}}`` stand for braces.
        where: the recipe's path to this field, for messages.

    Raises:
        SourceError: it names no column, or uses anything but plain column names.

    >>> compile_template("{Body} {Question}", where="prompts.sources.0.prompt").columns
    ('Body', 'Question')
    """
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, column, spec, conversion in Formatter().parse(text):
            if column is not None and (not column or spec or conversion or set(column) & set(".[]")):
                raise ValueError(
                    f"{{{column}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}} is more than a column's name"
                )
            parts.append((literal, column))
    except ValueError as error:
        raise SourceError(
            f"{where}: template {text!r}: {error}; write column names in braces, such as '{{question}}'; "
            "the turns of a chat are read by `messages: COLUMN` in place of prompt and gold"
        ) from error
    template = Template(where, tuple(parts))
    if not template.columns:
        raise SourceError(
            f"{where}: template {text!r} names no column; write '{{{text.strip() or 'question'}}}' for the column of that name"
        )
    return template


def fill(template: Template | None, row: Mapping[str, object], *, at: str) -> str | None:
    """The template's text for one row; None where one of its columns is null, or there is no template.

    Args:
        template: a compiled template, or None.
        row: column name -> text as the file has it, or None; anything else is refused.
        at: file and line, or data set and row, for messages.

    Raises:
        SourceError: a column is missing, is longer than `MAX_CHARACTERS`, or holds a list, a mapping or bytes.
    """
    if template is None:
        return None
    pieces: list[str] = []
    for literal, column in template.parts:
        pieces.append(literal)
        if column is None:
            continue
        expect_column(column, row, at=at, needed_by=template.where)
        value = row[column]
        if value is None:
            return None
        if not isinstance(value, str):
            raise SourceError(
                f"{at}: column {column!r}, which {template.where} needs, holds {_kind(value)}; "
                "templates take text and numbers, so prepare a column of text"
            )
        if len(value) > MAX_CHARACTERS:
            raise SourceError(f"{at}: column {column!r} holds {len(value):,} characters; at most {MAX_CHARACTERS:,} are read")
        pieces.append(value)
    return "".join(pieces)


def expect_column(column: str, row: Mapping[str, object], *, at: str, needed_by: str) -> None:
    """Refuse a row without a column.

    Raises:
        SourceError: it names the columns that there are.
    """
    if column not in row:
        raise SourceError(f"{at}: no column {column!r}, which {needed_by} needs; there are: {', '.join(map(repr, row)) or 'none'}")


def _kind(value: object) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and first.keys() & {"role", "from"}:
        return "a list of chat turns, which `messages: COLUMN` reads in place of prompt and gold"
    return f"a {type(value).__name__}"
