"""Figures as rows of a file, and the table of ``docs/benchmarks.md``: ``python -m benchmarks.table docs/benchmarks.json``.

Prints what stands in the document between the two markers, markers included.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measure import Figure, number
from kd_core.errors import KDError

__all__ = ["BEGIN", "END", "Row", "append_rows", "read_rows", "render", "rows_of"]

BEGIN, END = "<!-- benchmarks.table: begin -->", "<!-- benchmarks.table: end -->"


@dataclass(frozen=True)
class Row:
    """One figure as it is kept.

    Attributes:
        module: which module of benchmarks made it.
        what: what was done.
        ours: our value, in ``unit``; None where it was not run.
        unit: unit of ours.
        peer: what it is compared with; empty where there is none.
        ratio: how many times better ours is; None where there is no peer.
        date: the day, as 2026-11-22.
        machine: processor and number of cores.
        command: what makes it again.
    """

    module: str
    what: str
    ours: float | None
    unit: str
    peer: str
    ratio: float | None
    date: str
    machine: str
    command: str


def rows_of(module: str, figures: Sequence[Figure], *, quick: bool) -> list[Row]:
    """Rows of figures that a module has made here, today."""
    command = f"python -m benchmarks.{module}" + (" --quick" if quick else "")
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    date = datetime.now(UTC).date().isoformat()
    return [Row(module, f.name, f.ours, f.unit, f.peer, f.ratio, date, machine, command) for f in figures]


def read_rows(file: Path) -> list[Row]:
    """Rows of a file, in its order.

    Raises:
        KDError: it is no list of rows.
    """
    try:
        return [Row(**row) for row in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise KDError(f"{file} is no JSON list of benchmark rows: {error}; name a file that --json has written") from error


def append_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows at the end of a file, which is made where there is none."""
    kept = read_rows(file) if file.exists() else []
    file.write_text(json.dumps([asdict(row) for row in (*kept, *rows)], indent=1) + "\n")


def render(rows: Sequence[Row]) -> str:
    """The table as Markdown, one row each, between the markers."""
    lines = [BEGIN, "| what | ours | beside | times better | date | command |", "|---|---:|---|---:|---|---|"]
    for row in rows:
        ours, ratio = f"{number(row.ours)} {row.unit}", "" if row.ratio is None else f"{row.ratio:.3g}"
        lines.append(f"| {row.what} | {ours} | {row.peer} | {ratio} | {row.date} | `{row.command}` |")
    machines = sorted({row.machine for row in rows})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}.", END])


def main(file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows, as python -m benchmarks --json FILE writes them.")]) -> None:
    """Print the table of a file's rows."""
    print(render(read_rows(file)))


if __name__ == "__main__":
    typer.run(main)
