"""Tables of ``kd cache``; one function a command."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from flows.cli.console import human_bytes, human_seconds
from flows.cli.tables import table

if TYPE_CHECKING:
    from kd_core.cache.figures import Figures
    from kd_core.cache.garbage import Garbage
    from kd_core.cache.parity import Parity
    from kd_core.cache.repair import Move
    from kd_core.cache.verify import Verified

__all__ = [
    "bytes_table",
    "counts_table",
    "damage_text",
    "entropy_table",
    "garbage_text",
    "namespaces_table",
    "parity_table",
    "recipes_table",
    "repair_text",
    "rows_table",
]

_DAY = 86_400


def _age(seconds: float) -> str:
    return f"{seconds / _DAY:.1f} d" if seconds >= _DAY else human_seconds(seconds)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """The result of a query: numbers to the right, floats to six digits."""
    numeric = [all(isinstance(row[i], (int, float, type(None))) for row in rows) and bool(rows) for i in range(len(columns))]
    made = Table(box=None, header_style="dim", pad_edge=False)
    for column, right in zip(columns, numeric, strict=True):
        made.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def namespaces_table(rows: Sequence[dict[str, Any]], store: str) -> Table:
    """One row store in a few lines: the figures beside whose rows they are and which recipes use them."""
    made = table(f"Rows in {store}", ("namespace", "what"), ("rows", "tokens", "bytes", "age"))
    for row in rows:
        used = f"used by {', '.join(row['recipes'])}" if row["recipes"] else "in no report yet"
        said = "\n".join(filter(None, (row["table"], row["teacher"], row["policy"], used)))
        counts = (_number(row["rows"]), _number(row["tokens"]), human_bytes(row["bytes"]), _age(row["age_seconds"]))
        made.add_row(row["namespace"][:12], Text(said), *counts)
    return made


def recipes_table(rows: Sequence[dict[str, Any]], store: str) -> Table:
    """One line a recipe that came to a report: its newest verdict, and who is champion."""
    made = table(f"Recipes in {store}", ("recipe", "newest verdict", "champion"), ("age",))
    for row in rows:
        champion = "none" if row["champion"] is None else "this student" if row["champion"]["is_this_student"] else "another student"
        made.add_row(row["name"], Text(row["headline"]), champion, _age(row["age_seconds"]))
    return made


def bytes_table(numbers: "Figures") -> Table:
    """Where the bytes go: one line a part, largest first."""
    made = table(f"Stored bytes ({_number(numbers.tokens)} tokens, {numbers.rows:,} rows)", ("part",), ("bytes", "bytes a token", "share"))
    whole = sum(numbers.bytes_by_part.values())
    for name, size in [*sorted(numbers.bytes_by_part.items(), key=lambda item: -item[1]), ("in all", whole)]:
        made.add_row(name, human_bytes(size), f"{size / numbers.tokens:.2f}" if numbers.tokens else "-", f"{size / max(whole, 1):.1%}")
    return made


def entropy_table(numbers: "Figures") -> Table:
    """Histogram of rows by mean entropy."""
    made = table("Rows by mean entropy of the teacher", ("nats",), ("rows", "tokens"))
    made.add_column("")
    most = max(found.rows for found in numbers.entropy)
    for found in numbers.entropy:
        bar = "█" * max(1, round(40 * found.rows / most))
        made.add_row(f"{found.low:g} to {found.high:g}", f"{found.rows:,}", f"{found.tokens:,}", f"[dim]{bar}[/]")
    return made


def counts_table(title: str, counts: Mapping[str, int]) -> Table:
    """One line a name."""
    made = table(title, ("",), ("number",))
    for name, count in counts.items():
        made.add_row(Text(name), f"{count:,}")
    return made


def parity_table(parity: "Parity") -> Table:
    """One line a row that was scored again."""
    made = table(f"Live teacher against {parity.namespace[:12]}", ("row", "result"))
    for column in ("tokens", "gold error", "total variation", "same ids"):
        made.add_column(column, justify="right")
    for row in parity.rows:
        mark = "[green]ok[/]" if row.holds else "[red]differs[/]"
        made.add_row(row.key[:12], mark, f"{row.tokens:,}", f"{row.gold_error:.2g}", f"{row.total_variation:.2g}", f"{row.same_ids:.1%}")
    bounds = parity.bounds
    limits = (f"<= {bounds.gold_error:g}", f"<= {bounds.total_variation:g}", f">= {bounds.same_ids:.0%}")
    made.add_row("[dim]allowed[/]", "", "", *(f"[dim]{limit}[/]" for limit in limits))
    for key, reason in parity.refused.items():
        made.add_row(key[:12], Text(f"refused: {reason}", style="red"))
    return made


def damage_text(found: "Verified", store: str) -> str:
    """Each damaged object with what is wrong. Keys are whole, however long: they are to be copied."""
    return "\n".join([f"Damaged in {store}", *(f"{damage.key}\n  {damage.reason}" for damage in found.damage)])


def repair_text(moves: "Sequence[Move]", store: str, *, done: bool) -> str:
    """Each object that is put aside, with the reason."""
    title = f"{'Moved' if done else 'To be moved'} to quarantine/ in {store}"
    return "\n".join([title, *(f"{move.key}\n  {move.reason}" for move in moves)])


def garbage_text(found: "Sequence[Garbage]", store: str, *, done: bool) -> str:
    """Each object that nothing reaches, with the reason, its bytes and its age."""
    lines = [f"{item.key}\n  {item.reason}; {human_bytes(item.size_bytes)}, {_age(item.age_seconds)} old" for item in found]
    return "\n".join([f"{'Deleted' if done else 'To be deleted'} in {store}", *lines])
