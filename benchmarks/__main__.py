"""All measurements, one table: ``python -m benchmarks [--json FILE] [--quick]``.

Each module runs in a process of its own: none begins in memory that another one left behind, each says how fast the machine was
while it ran, and one that fails costs its own figures alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.measure import Check, Figure, figure, show
from benchmarks.table import append_rows, rows_of

__all__ = ["measured"]

_MODULES = ("softlabels", "kernel", "training", "policies", "coverage")


def measured(module: str, *, quick: bool) -> list[Figure]:
    """A module's figures, the machine's own before them; or one that says that it failed."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--json", *(["--quick"] if quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        reason = f"not run: it ended with status {done.returncode} and said why above; run python -m benchmarks.{module} alone"
        return [figure(f"benchmarks.{module}", None, "", Check(reason, ok=False))]
    return [Figure(**found) for found in json.loads(done.stdout)]


def main(
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also append every figure to this JSON list.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes.")] = False,
) -> None:
    """Measure beside peers, now."""
    figures = []
    for module in _MODULES:
        found = measured(module, quick=quick)
        if file is not None:
            append_rows(file, rows_of(module, found, quick=quick))  # after each module: all of them take an hour and a half
        figures += found
    show(figures, as_json=False)


if __name__ == "__main__":
    typer.run(main)
