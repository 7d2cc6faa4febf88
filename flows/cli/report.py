"""A finished run on a terminal: the report's JSON as tables that fit 80 columns, the verdict first.

Metrics and models are those that the report has: nothing here knows which there are.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flows.cli.console import human_bytes, human_seconds
from flows.cli.tables import table
from kd_core.evaluate.statistics import metric_of

__all__ = ["measured", "report_screen", "sizes", "verdict"]

_METRICS_ABREAST = 2
_NUM_SAMPLES = 3
_SHOWN_CHARACTERS = 300


def report_screen(data: bytes) -> Group:
    """The report from its JSON file."""
    report = json.loads(data)
    parts = (verdict(report), measured(report), sizes(report), _differences(report), _counts(report), _samples(report), _stages(report))
    return Group(*(piece for part in parts for piece in part))


def verdict(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What was asked, found and decided, in the report's own words, and what each rule found."""
    said, finding = report["verdict"], report["finding"]
    yield Text(f"{finding['asked']} {finding['found']}\n")
    if said["promote"] and finding["claim"] != "shown":
        yield Text(f"{finding['title']}.", style="bold yellow")
    yield Text(finding["decided"], style="bold")
    rules = Table.grid(padding=(0, 2))
    for reason in said["reasons"]:
        mark = Text("holds", style="green") if reason["holds"] else Text("FAILS", style="bold red")
        rules.add_row(mark, Text(f"{reason['rule']}: {reason['detail']}", overflow="fold"))
    yield Padding(rules, (0, 0, 0, 2))


def measured(report: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> Iterator[RenderableType]:
    """Each suite's metrics with their intervals, some abreast.

    Args:
        report: the report.
        without: metrics that are left out.
    """
    for suite in report["suites"]:
        prefix = "" if suite == report["suite"] else f"{suite}/"
        names = dict.fromkeys(
            name.removeprefix(prefix)
            for model in report["models"].values()
            for name in model["metrics"]
            if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
        )
        shown = [name for name in names if name not in without]
        yield Text(f"\nOn {suite}, {report['confidence']:.0%} intervals about {_about(report)}", style="bold")
        for start in range(0, len(shown), _METRICS_ABREAST):
            abreast = shown[start : start + _METRICS_ABREAST]
            found = table(None, ("", *abreast))
            for model, about in report["models"].items():
                cells = [_estimate(about["metrics"].get(prefix + name)) for name in abreast]
                if any(cells):
                    found.add_row(model, *cells)
            yield Padding(found, (0, 0, 0, 2))


def _about(report: Mapping[str, Any]) -> str:
    """What the student's intervals are about, in words."""
    num_seeds = len(report["seeds"])
    if num_seeds == 1:
        return "these checkpoints on new items (1 seed: nothing about the recipe)"
    return f"the recipe on new items and seeds ({num_seeds} seeds; seed {report['published_seed']} would be published)"


def _estimate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    items = f"\non {found['n']} of {found['n'] + found['left_out']} items" if found["left_out"] else ""
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{items}"


def sizes(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Parameters, weights and speed of each model, as far as they are known."""
    found = table(None, ("",), ("parameters", "weights", "a second"))
    for name, model in report["models"].items():
        speed = model["tokens_per_second"]
        if model["params"]:
            found.add_row(name, f"{model['params']:,}", human_bytes(model["bytes"]), "-" if speed is None else f"{speed:,.0f}")
    if found.rows:
        yield Text("\nSizes", style="bold")
        yield Padding(found, (0, 0, 0, 2))


def _differences(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    if not report["comparisons"]:
        return
    yield Text("\nPaired differences, the same items for both", style="bold")
    found = table(None, ("metric", "student -"), ("difference", "interval"))
    found.add_column("the student is")
    for pair in report["comparisons"]:
        sign = 1 if metric_of(pair["metric"]).higher_is_better else -1
        low, high = sorted((sign * pair["low"], sign * pair["high"]))
        is_ = "better" if low > 0 else "worse" if high < 0 else "not told apart"
        other = pair["b"] if pair["a"] == "student" else f"{pair['a']} - {pair['b']}"
        found.add_row(pair["metric"], other, f"{pair['difference']:+.4f}", f"[{pair['low']:+.4f}, {pair['high']:+.4f}]", is_)
    yield Padding(found, (0, 0, 0, 2))


def _counts(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    counted = {title: ", ".join(f"{number:,} {name}" for name, number in own.items() if number) for title, own in report["counts"].items()}
    grid = Table.grid(padding=(0, 2))
    for title, text in counted.items():
        if text:
            grid.add_row(Text(title), Text(text))
    if grid.rows:
        yield Text("\nCounts", style="bold")
        yield Padding(grid, (0, 0, 0, 2))


def _samples(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    if not report["samples"]:
        return
    rest = len(report["samples"]) - _NUM_SAMPLES
    yield Text("\nSample answers" + (f" ({rest} more in report.html)" if rest > 0 else ""), style="bold")
    for sample in report["samples"][:_NUM_SAMPLES]:
        reference = "" if sample["reference"] is None else f"   (reference: {_cut(sample['reference'])})"
        yield Padding(Text(_cut(sample["prompt"]) + reference), (0, 0, 0, 2))
        answers = Table.grid(padding=(0, 2))
        for answer in sample["answers"]:
            mark = {True: "[green]right[/]", False: "[red]wrong[/]", None: ""}[answer["right"]]
            answers.add_row(answer["model"], mark, Text(_cut(answer["text"]), overflow="fold"))
        yield Padding(answers, (0, 0, 0, 4))


def _cut(text: str) -> str:
    """A text as one line, or its beginning."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS].rstrip() + " ..."


def _stages(report: Mapping[str, Any]) -> Iterator[RenderableType]:
    found = table(None, ("stage", "fingerprint"), ("took",))
    for stage in report["stages"]:
        found.add_row(stage["name"], stage["fingerprint"][:12], human_seconds(stage["seconds"]))
    yield Text("\nStages", style="bold")
    yield Padding(found, (0, 0, 0, 2))
