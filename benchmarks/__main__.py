"""All measurements, one table: ``python -m benchmarks [--json] [--quick]``."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import softlabels
from benchmarks.measure import Figure, copy_rate, gemm_rate


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes; under a minute.")] = False,
) -> None:
    """Measure beside peers, in this process, now."""
    figures = [*softlabels.run(quick=quick), gemm_rate(), copy_rate()]
    if as_json:
        print(json.dumps([asdict(figure) for figure in figures], indent=1))
    else:
        Console(width=150).print(_table(figures))


def _table(figures: list[Figure]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("what", "ours", "peer", "times better", "goal", "numerics"):
        table.add_column(column)
    for f in figures:
        peer = "" if f.peer_value is None else f"{f.peer_value:,.4g} {f.unit} ({f.peer})"
        ratio, goal = ("" if value is None else f"{value:,.2f}" for value in (f.ratio, f.goal))
        met = "" if f.holds is None else (" holds" if f.holds else " missed")
        table.add_row(f.name, f"{f.ours:,.4g} {f.unit}", peer, ratio, goal + met, f.numerics)
    return table


if __name__ == "__main__":
    typer.run(main)
