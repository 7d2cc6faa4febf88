"""Tables and short texts for people; one function a command."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from flows.console import human_bytes, human_seconds

if TYPE_CHECKING:
    from infra.stack import StackInfo
    from kd_core.doctor import Finding
    from kd_core.plan import Plan

__all__ = ["doctor_table", "plan_table", "show", "show_markdown", "stack_json", "stack_text", "status_table"]

_MARKS = {
    "hit": "[green]hit[/]",
    "partial": "[yellow]partial[/]",
    "miss": "miss",
    "done": "[green]done[/]",
    "started": "[yellow]started[/]",
}
_FINDINGS = {"ok": "[green]ok[/]", "failed": "[red]failed[/]", "skipped": "[dim]skipped[/]"}


def show(table: Table) -> None:
    """Print a table to standard output; wide enough not to fold when it is no terminal."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)


def show_markdown(text: str) -> None:
    """Print Markdown to standard output: set on a terminal, as it is elsewhere."""
    if sys.stdout.isatty():
        Console().print(Markdown(text))
    else:
        print(text)


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right", overflow="fold")
    return table


def plan_table(plan: "Plan") -> Table:
    """One line a stage: what is there, and what the rest would cost."""
    table = _table("Plan (nothing has been run)", "stage", "fingerprint", "status", "rows", "cached", "tokens", "to store", "time", "price")
    for s in plan.stages:
        size = "-" if s.bytes is None else human_bytes(s.bytes)
        time = "-" if s.seconds is None else human_seconds(s.seconds)
        price = "-" if s.price is None else f"{s.price:.4f}"
        table.add_row(
            s.name, s.fingerprint[:12], _MARKS[s.status], _number(s.rows), _number(s.rows_cached), _number(s.tokens), size, time, price
        )
    known = [s.seconds for s in plan.stages if s.seconds is not None]
    table.add_section()
    table.add_row("in all", "", "", "", "", "", "", human_seconds(sum(known)), "")
    return table


def status_table(rows: Sequence[dict[str, Any]], store: str) -> Table:
    """One line a node."""
    table = _table(f"Status in {store}", "node", "fingerprint", "status", "took", "resumes at step")
    for row in rows:
        took = "-" if row["seconds"] is None else human_seconds(row["seconds"])
        table.add_row(row["name"], row["fingerprint"][:12], _MARKS.get(row["status"], row["status"]), took, _number(row["resumes_at_step"]))
    return table


def doctor_table(findings: "Sequence[Finding]") -> Table:
    """One line a check."""
    table = _table("Doctor", "check", "result", "found")
    for finding in findings:
        table.add_row(finding.name, _FINDINGS[finding.status], finding.detail)
    return table


def stack_json(info: "StackInfo") -> dict[str, Any]:
    """Addresses, ports and process ids; never the secret."""
    return {
        "home": str(info.home),
        "urls": dict(info.urls),
        "ports": dict(info.ports),
        "pids": dict(info.pids),
        "bucket": info.bucket,
        "env_file": str(info.env_file),
    }


def stack_text(info: "StackInfo") -> str:
    """Where everything is, and what to type next."""
    lines = [f"  {name:<10} {url}" for name, url in info.urls.items()]
    store = f"run.store=s3://{info.bucket}/kd"
    return "\n".join(
        [
            *lines,
            f"\nLet this shell use them:   set -a; . {info.env_file}; set +a",
            f"Run from here:             kd run recipes/quickstart.yaml --set {store}",
            f"Run as the UI would:       prefect deployment run distill/on-demand --watch --param 'overrides=[\"{store}\"]'",
            "Stop:                      kd down",
        ]
    )
