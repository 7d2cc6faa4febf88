"""All measurements, one table: ``python -m benchmarks [--json] [--quick]``."""

from typing import Annotated

import typer

from benchmarks import kernel, policies, softlabels, training
from benchmarks.measure import machine, show


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes.")] = False,
) -> None:
    """Measure beside peers, in this process, now."""
    parts = (softlabels, kernel, training, policies)
    show([*machine(), *(found for part in parts for found in part.run(quick=quick))], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
