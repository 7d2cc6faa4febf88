"""All measurements, one table: ``python -m benchmarks [--json] [--quick]``.

Each module runs in a process of its own: none begins in memory that another one left behind, each says how fast the machine was
while it ran, and one that fails costs its own figures alone.
"""

import json
import subprocess
import sys
from typing import Annotated

import typer

from benchmarks.measure import Check, Figure, figure, show

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
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes.")] = False,
) -> None:
    """Measure beside peers, now."""
    show([found for module in _MODULES for found in measured(module, quick=quick)], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
