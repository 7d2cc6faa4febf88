"""Tables and short texts for people, each within 80 columns; one function a command."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.cli.console import CleanConsole, human_bytes, human_seconds
from kd_core.recipe.core_yaml import write_value

if TYPE_CHECKING:
    from infra.stack import StackInfo
    from kd_core.doctor import Finding
    from kd_core.planning.plan import Plan
    from kd_core.planning.soft_labels import SoftLabelOption

__all__ = ["doctor_table", "plan_table", "show", "stack_json", "stack_text", "status_table", "table"]

_MARKS = {
    "hit": "[green]hit[/]",
    "partial": "[yellow]partial[/]",
    "miss": "miss",
    "done": "[green]done[/]",
    "started": "[yellow]started[/]",
}
_FINDINGS = {"ok": "[green]ok[/]", "failed": "[red]failed[/]", "skipped": "[dim]skipped[/]"}


def show(what: RenderableType, *, columns_in_pipe: int | None = None) -> None:
    """Print a table, or several, to standard output: as wide as the terminal or COLUMNS says, 80 columns where neither does.

    Args:
        what: to print.
        columns_in_pipe: columns where no terminal reads it, for tables whose columns are not ours; None: as above.
    """
    CleanConsole(highlight=False, width=None if sys.stdout.isatty() else columns_in_pipe).print(what)


def table(title: str | None, left: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table without lines: columns of text to the left, then numbers to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    for column in left:
        made.add_column(Text(column), overflow="fold")
    for column in right:
        made.add_column(Text(column), justify="right", overflow="fold")
    return made


def _quoted(text: str) -> Text:
    """Text that quotes models, templates and rows: square brackets in it are no markup, and control characters are shown as they are spelt.

    >>> _quoted("ends with '[/INST]'\\x1b[2J").plain
    "ends with '[/INST]'\\\\x1b[2J"
    """
    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


def _options(columns: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[str, Sequence[str]]]:
    """Columns in which something stands: a price that no recipe states takes no room."""
    return [(name, cells) for name, cells in columns if any(cell not in ("", "-") for cell in cells)]


def _columns(title: str, texts: Sequence[tuple[str, Sequence[str]]], numbers: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """A table from its columns."""
    made = table(title, [name for name, _ in texts], [name for name, _ in numbers])
    for row in zip(*(cells for _, cells in (*texts, *numbers)), strict=True):
        made.add_row(*row)
    return made


def plan_table(plan: "Plan", filled_in: Mapping[str, Any]) -> Group:
    """What the recipe leaves to its defaults; one line a stage, with what the rest costs; other target policies; what figures rest on."""
    total = plan.total
    lines = [(s.name, _MARKS[s.status], s.rows, s.rows_cached, s.tokens, s.bytes, s.seconds, s.price) for s in plan.stages]
    lines.append(("in all", "at least" if total.unknown else "", None, None, None, total.bytes, total.seconds, total.price))
    names, marks, rows, cached, tokens, sizes, seconds, prices = map(list, zip(*lines, strict=True))
    counts = [(name, [*map(_number, cells[:-1]), ""]) for name, cells in (("rows", rows), ("cached", cached), ("tokens", tokens))]
    costs = [("to store", [*map(_size, sizes)]), ("time", [*map(_time, seconds)]), *_options([("price", [*map(_price, prices)])])]
    title = "Plan (nothing has been run)"
    parts: list[RenderableType] = [_columns(title, [("stage", names), ("status", marks)], [*counts, *costs])]
    if filled_in:
        defaults = [_quoted(f"  {path} = {write_value(value)}") for path, value in filled_in.items()]
        parts = ["Filled in, as the recipe does not say it:", *defaults, "", *parts]
    if total.price_a_month is not None:
        parts.append(f"Keeping what is added costs {total.price_a_month:.4f} a month.")
    if plan.soft_label_options:
        parts += ["", _options_table(plan.soft_label_options)]
    return Group(*parts, *(_quoted(f"- {note}") for note in plan.notes))


def _options_table(options: "Sequence[SoftLabelOption]") -> Table:
    numbers = [
        ("cached", [_number(o.rows_cached) for o in options]),
        ("bytes/token", ["-" if o.bytes_a_token is None else f"{o.bytes_a_token:,.1f}" for o in options]),
        ("to store", [_size(o.bytes) for o in options]),
        ("time", [_time(o.seconds) for o in options]),
        *_options([("price", [_price(o.price) for o in options]), ("a month", [_price(o.price_a_month) for o in options])]),
    ]
    names = [f"{'[bold]' if o.chosen else ''}{_policy_name(o.policy)}" for o in options]
    mine = ["*" if o.chosen else "" for o in options]
    return _columns("Soft labels under other policies (*: this recipe)", [("policy", names), ("", mine)], numbers)


def _policy_name(policy: dict[str, Any]) -> str:
    match policy["kind"]:
        case "sampled":
            return f"sampled, {policy['num_draws']} draws at T {policy['temperature']:g}"
        case "topk":
            return f"topk, k {policy['k']}, T {' '.join(f'{t:g}' for t in policy['temperatures'])}"
    return str(policy["kind"])


def _number(value: int | None) -> str:
    """A count; in millions where its digits would take the room of other columns."""
    return "-" if value is None else f"{value:,}" if value < 10_000_000 else f"{value / 1e6:,.1f} M"


def _size(value: int | None) -> str:
    return "-" if value is None else human_bytes(value)


def _time(value: float | None) -> str:
    return "-" if value is None else human_seconds(value)


def _price(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value >= 10 else f"{value:.4f}"


def status_table(rows: Sequence[dict[str, Any]], store: str) -> Table:
    """One line a node."""
    made = table(f"Status in {store}", ("node", "fingerprint", "status"), ("took", "resumes at step"))
    for row in rows:
        step = _number(row["resumes_at_step"])
        made.add_row(row["name"], row["fingerprint"][:12], _MARKS.get(row["status"], row["status"]), _time(row["seconds"]), step)
    return made


def doctor_table(findings: "Sequence[Finding]") -> Table:
    """One line a check."""
    made = table("Doctor", ("check", "result", "found"))
    for finding in findings:
        made.add_row(finding.name, _FINDINGS[finding.status], _quoted(finding.detail))
    return made


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
