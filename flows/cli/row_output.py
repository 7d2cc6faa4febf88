"""Rows of a query to standard output: a table for people, CSV or JSON of any length for machines.

A reader that stops early (``| head``) ends the output without an error.
"""

import csv
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any, Literal

from flows.cli.terminal import printable

__all__ = ["print_rows"]

_SHOWN_ROWS, _COLUMNS_IN_PIPE = 100, 160


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], form: Literal["table", "json", "csv"]) -> None:
    """Print rows as they come: CSV and JSON to their end, a table of the first ones.

    Raises:
        ValueError: two columns of one name, of which a JSON object would hold one.
    """
    if form == "json" and len(set(columns)) < len(columns):
        twice = ", ".join(sorted({name for name in columns if columns.count(name) > 1}))
        raise ValueError(
            f"a JSON object holds one value a name, and these name several columns: {twice}; rename them with AS, or use --csv"
        )
    try:
        {"csv": _print_csv, "json": _print_json, "table": _print_table}[form](columns, iter(rows))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it ends


def _print_csv(columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(columns)
    shown = printable if sys.stdout.isatty() else str  # a file gets what is there
    writer.writerows([shown(value) if isinstance(value, str) else value for value in map(_plain, row)] for row in rows)


def _print_json(columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    separator = "[\n"
    for row in rows:
        print(separator + json.dumps(dict(zip(columns, map(_plain, row), strict=True)), allow_nan=False), end="")
        separator = ",\n"
    print("[]" if separator == "[\n" else "\n]")


def _print_table(columns: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    from flows.cli.cache_tables import rows_table
    from flows.cli.tables import show

    table = rows_table(columns, [list(map(_plain, row)) for row in islice(rows, _SHOWN_ROWS)])
    show(table, columns_in_pipe=_COLUMNS_IN_PIPE)
    if next(rows, None) is not None:
        print(f"... these are the first {_SHOWN_ROWS} rows; --csv or --json prints all")


def _plain(value: Any) -> Any:
    """A value as JSON and CSV have it: bytes as hex, times as ISO 8601, decimals as numbers, no NaN."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
