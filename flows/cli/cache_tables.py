"""Tables of ``kd cache``; one function a command."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from flows.cli.console import human_bytes, human_seconds

if TYPE_CHECKING:
    from kd_core.cache.figures import Figures
    from kd_core.cache.garbage import Garbage
    from kd_core.cache.parity import Parity
    from kd_core.cache.repair import Move
    from kd_core.cache.verify import Verified

__all__ = [
    "bytes_table",
    "counts_table",
    "damage_table",
    "entropy_table",
    "garbage_table",
    "namespaces_table",
    "parity_table",
    "repair_table",
    "rows_table",
]

_DAY = 86_400


def _table(title: str | None, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in left:
        table.add_column(column, overflow="fold")
    for column in right:
        table.add_column(column, justify="right")
    return table


def _age(seconds: float) -> str:
    return f"{seconds / _DAY:.1f} d" if seconds >= _DAY else human_seconds(seconds)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def rows_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """The result of a query: numbers to the right, floats to six digits."""
    numeric = [all(isinstance(row[i], (int, float, type(None))) for row in rows) and bool(rows) for i in range(len(columns))]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column, right in zip(columns, numeric, strict=True):
        table.add_column(Text(column), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def namespaces_table(rows: Sequence[dict[str, Any]], store: str) -> Table:
    """One line a namespace."""
    table = _table(f"Rows in {store}", ("namespace", "table", "teacher", "policy"), ("rows", "tokens", "bytes", "commits", "age"))
    for row in rows:
        said = (row["namespace"][:12], row["table"], row["teacher"] or "-", row["policy"] or "-")
        counts = (_number(row["rows"]), _number(row["tokens"]), human_bytes(row["bytes"]), _number(row["commits"]))
        table.add_row(*map(Text, said), *counts, _age(row["age_seconds"]))
    return table


def bytes_table(numbers: "Figures") -> Table:
    """Where the bytes go: one line a part, largest first."""
    table = _table(
        f"Stored bytes ({_number(numbers.tokens)} tokens, {numbers.rows:,} rows)", ("part",), ("bytes", "bytes a token", "share")
    )
    whole = sum(numbers.bytes_by_part.values())
    for name, size in [*sorted(numbers.bytes_by_part.items(), key=lambda item: -item[1]), ("in all", whole)]:
        table.add_row(name, human_bytes(size), f"{size / numbers.tokens:.2f}" if numbers.tokens else "-", f"{size / max(whole, 1):.1%}")
    return table


def entropy_table(numbers: "Figures") -> Table:
    """Histogram of rows by mean entropy."""
    table = _table("Rows by mean entropy of the teacher", ("nats",), ("rows", "tokens"))
    table.add_column("")
    most = max(found.rows for found in numbers.entropy)
    for found in numbers.entropy:
        bar = "█" * max(1, round(40 * found.rows / most))
        table.add_row(f"{found.low:g} to {found.high:g}", f"{found.rows:,}", f"{found.tokens:,}", f"[dim]{bar}[/]")
    return table


def counts_table(title: str, counts: Mapping[str, int]) -> Table:
    """One line a name."""
    table = _table(title, ("",), ("number",))
    for name, count in counts.items():
        table.add_row(Text(name), f"{count:,}")
    return table


def parity_table(parity: "Parity") -> Table:
    """One line a row that was scored again."""
    table = _table(f"Live teacher against {parity.namespace[:12]}", ("row", "result"))
    for column in ("tokens", "gold error", "total variation", "same ids"):
        table.add_column(column, justify="right")
    for row in parity.rows:
        mark = "[green]ok[/]" if row.holds else "[red]differs[/]"
        table.add_row(row.key, mark, f"{row.tokens:,}", f"{row.gold_error:.2g}", f"{row.total_variation:.2g}", f"{row.same_ids:.1%}")
    bounds = parity.bounds
    limits = (f"<= {bounds.gold_error:g}", f"<= {bounds.total_variation:g}", f">= {bounds.same_ids:.0%}")
    table.add_row("[dim]allowed[/]", "", "", *(f"[dim]{limit}[/]" for limit in limits))
    for key, reason in parity.refused.items():
        table.add_row(key, Text(f"refused: {reason}", style="red"))
    return table


def damage_table(found: "Verified", store: str) -> Table:
    """One line a damaged object."""
    table = _table(f"Damaged in {store}", ("object", "found"))
    for damage in found.damage:
        table.add_row(Text(damage.key), Text(damage.reason))
    return table


def repair_table(moves: "Sequence[Move]", store: str, *, done: bool) -> Table:
    """One line an object that is put aside."""
    table = _table(f"{'Moved' if done else 'To be moved'} to quarantine/ in {store}", ("object", "because"))
    for move in moves:
        table.add_row(Text(move.key), Text(move.reason))
    return table


def garbage_table(found: "Sequence[Garbage]", store: str, *, done: bool) -> Table:
    """One line an object that nothing reaches."""
    table = _table(f"{'Deleted' if done else 'To be deleted'} in {store}", ("object", "because"), ("bytes", "age"))
    for item in found:
        table.add_row(Text(item.key), item.reason, human_bytes(item.size_bytes), _age(item.age_seconds))
    return table
