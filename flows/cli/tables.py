"""Tables and short texts for people; one function a command."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from flows.cli.console import CleanConsole, human_bytes, human_seconds
from flows.cli.terminal import say
from kd_core.recipe.core_yaml import write_value

if TYPE_CHECKING:
    from infra.stack import StackInfo
    from kd_core.doctor import Finding
    from kd_core.planning.plan import Plan
    from kd_core.planning.soft_labels import SoftLabelOption

__all__ = ["doctor_table", "plan_table", "show", "show_markdown", "stack_json", "stack_text", "status_table"]

_MARKS = {
    "hit": "[green]hit[/]",
    "partial": "[yellow]partial[/]",
    "miss": "miss",
    "done": "[green]done[/]",
    "started": "[yellow]started[/]",
}
_FINDINGS = {"ok": "[green]ok[/]", "failed": "[red]failed[/]", "skipped": "[dim]skipped[/]"}


def show(table: RenderableType) -> None:
    """Print a table, or several to standard output; wide enough not to fold when it is no terminal."""
    console = CleanConsole(width=None if sys.stdout.isatty() else 160)
    console.print(table)


def show_markdown(text: str) -> None:
    """Print Markdown to standard output: set on a terminal, as it is elsewhere."""
    if sys.stdout.isatty():
        CleanConsole().print(Markdown(text))
    else:
        say(text)


def _quoted(text: str) -> Text:
    """Text that quotes models, templates and rows: square brackets in it are no markup, and control characters are shown as they are spelt.

    >>> _quoted("ends with '[/INST]'\\x1b[2J").plain
    "ends with '[/INST]'\\\\x1b[2J"
    """
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right", overflow="fold")
    return table


def plan_table(plan: "Plan", filled_in: Mapping[str, Any]) -> Group:
    """What the recipe leaves to its defaults; one line a stage, with what the rest costs; other target policies; what figures rest on."""
    columns = ("stage", "fingerprint", "status", "rows", "cached", "tokens", "to store", "requests", "time", "price")
    table = _table("Plan (nothing has been run)", *columns)
    for s in plan.stages:
        counts = map(_number, (s.rows, s.rows_cached, s.tokens))
        costs = _costs(s.bytes, (s.requests,), s.seconds, s.price)
        table.add_row(s.name, s.fingerprint[:12], _MARKS[s.status], *counts, *costs)
    table.add_section()
    total = plan.total
    least = "at least" if total.unknown else ""
    table.add_row("in all", least, "", "", "", "", *_costs(total.bytes, (total.requests,), total.seconds, total.price))
    parts: list[RenderableType] = [table]
    if filled_in:
        lines = [_quoted(f"  {path} = {write_value(value)}") for path, value in filled_in.items()]
        parts = ["Filled in, as the recipe does not say it:", *lines, "", table]
    if total.price_a_month is not None:
        parts.append(f"Keeping what is added costs {total.price_a_month:.4f} a month.")
    if plan.soft_label_options:
        parts += ["", _options_table(plan.soft_label_options)]
    return Group(*parts, *(_quoted(f"- {note}") for note in plan.notes))


def _options_table(options: "Sequence[SoftLabelOption]") -> Table:
    columns = ("policy", "", "cached", "tokens", "bytes a token", "to store", "writes", "reads an epoch", "time", "price", "a month")
    table = _table("Soft labels under other policies", *columns)
    for o in options:
        each = "-" if o.bytes_a_token is None else f"{o.bytes_a_token:,.1f}"
        costs = _costs(o.bytes, (o.write_requests, o.epoch_requests), o.seconds, o.price)
        month = "-" if o.price_a_month is None else f"{o.price_a_month:.4f}"
        mark = "this recipe" if o.chosen else ""
        table.add_row(_policy_name(o.policy), mark, _number(o.rows_cached), _number(o.tokens), each, *costs, month)
    return table


def _policy_name(policy: dict[str, Any]) -> str:
    match policy["kind"]:
        case "sampled":
            return f"sampled, {policy['num_draws']} draws at T {policy['temperature']:g}"
        case "topk":
            return f"topk, k {policy['k']}, T {' '.join(f'{t:g}' for t in policy['temperatures'])}"
    return str(policy["kind"])


def _costs(size: int | None, requests: tuple[int | None, ...], seconds: float | None, price: float | None) -> list[str]:
    bytes_text = "-" if size is None else human_bytes(size)
    time = "-" if seconds is None else human_seconds(seconds)
    return [bytes_text, *map(_number, requests), time, "-" if price is None else f"{price:.4f}"]


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
        table.add_row(finding.name, _FINDINGS[finding.status], _quoted(finding.detail))
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
            f"Prefect's pages ask for:   PREFECT_API_AUTH_STRING, which is in {info.env_file}",
            f"Run from here:             kd run recipes/quickstart.yaml --set {store}",
            f"Run as the UI would:       prefect deployment run distill/on-demand --watch --param 'overrides=[\"{store}\"]'",
            "Stop:                      kd down",
        ]
    )
