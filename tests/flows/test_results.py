"""The terminal's tables of a finished run: every suite, what intervals are about, items without a value; whatever the metrics are."""

import io
import json
from typing import Any

from rich.console import Group

from flows.cli.console import CleanConsole
from flows.cli.report import measured, report_screen


def metric(value: float, n: int = 40, left_out: int = 0) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n, "left_out": left_out}


MODEL = {
    "params": 855_296,
    "bytes": 3_421_184,
    "tokens_per_second": None,
    "metrics": {"pass_at_1": metric(0.5), "truncated": metric(0.2), "second/pass_at_1": metric(0.3, 38, 2), "second/nll": metric(1.5)},
}
REPORT: dict[str, Any] = {
    "finding": {"asked": "Asked whether:", "found": "the student is.", "title": "T", "claim": "not_shown", "decided": "Not promoted: x."},
    "verdict": {"promote": False, "headline": "Not promoted: x.", "reasons": []},
    "suites": ["first", "second"],
    "suite": "first",
    "confidence": 0.95,
    "seeds": [0, 1, 2],
    "published_seed": 1,
    "models": {"student": MODEL, "ablation_hard": MODEL},
    "comparisons": [],
    "counts": {"Prompts": {"read": 400, "duplicate": 0}},
    "samples": [],
    "stages": [],
}


def on_80_columns(*parts: Any) -> str:
    console = CleanConsole(file=io.StringIO(), width=80)
    console.print(Group(*parts))
    return console.file.getvalue()


def test_each_suite_shows_its_own_metrics() -> None:
    first, second = on_80_columns(*measured(REPORT, without=("truncated",))).split("On second, ")
    assert "student        0.500 [0.400, 0.600]" in first
    assert "truncated" not in first
    assert "student        0.300 [0.200, 0.400]  1.500 [1.400, 1.600]" in second
    assert second.count("on 38 of 40 items") == 2


def test_what_the_intervals_are_about_is_said() -> None:
    several = " ".join(on_80_columns(*measured(REPORT)).split())
    assert "about the recipe on new items and seeds (3 seeds; seed 1 would be published)" in several
    one = " ".join(on_80_columns(*measured({**REPORT, "seeds": [0]})).split())
    assert "about these checkpoints on new items (1 seed: nothing about the recipe)" in one


def test_a_report_begins_with_its_verdict_and_fits_80_columns() -> None:
    pair = {"metric": "nll", "a": "student", "b": "ablation_hard", "difference": -0.2, "low": -0.3, "high": -0.1}
    sample = {"prompt": "p " * 300, "reference": "r", "answers": [{"model": "student", "text": "t" * 500, "right": None}]}
    report = {**REPORT, "comparisons": [pair, {**pair, "metric": "pass_at_1"}], "samples": [sample] * 4}
    lines = on_80_columns(report_screen(json.dumps(report).encode())).splitlines()
    assert [line.strip() for line in lines[:3]] == ["Asked whether: the student is.", "", "Not promoted: x."]
    assert max(map(len, lines)) <= 80
    assert [line.split()[-1] for line in lines if "ablation_hard" in line and "-0.2" in line] == ["better", "worse"]
    assert any("1 more in report.html" in line for line in lines)
