"""The report of a run: one self-contained HTML page, the same in Markdown, and the same as JSON.

It shows what it is given and computes no measurement of its own, only ratios. Everything that came out of a model, a
prompt or a recipe is escaped; the page loads nothing, runs nothing, and says so to the browser.
"""

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kd_core.evaluate import charts, class_charts
from kd_core.evaluate.charts import Point, label_of
from kd_core.evaluate.class_charts import MAX_CLASSES, MAX_MODELS, confused_pairs, likeliest, percent
from kd_core.evaluate.finding import certainty_words, find
from kd_core.evaluate.report_data import ClassSample, ModelRow, ReportData, ratio
from kd_core.evaluate.statistics import METRICS, metric_of

__all__ = ["render_html", "render_markdown", "report_json"]

TIMES, UNKNOWN = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
MAX_SHOWN_CHARACTERS = 420
MAX_TITLE_CHARACTERS = 4_000
MAX_CLASS_SAMPLES = 12

ROLES = {
    "teacher": "the large model that is learned from",
    "student": "learned from the teacher; the model under decision",
    "baseline": "same size and steps, learned from gold answers alone",
    "ablation_hard": "same rows and steps, without the teacher's probabilities",
    "champion": "the student in service when this run began",
}


def report_json(data: ReportData) -> dict[str, Any]:
    """The report as plain data: finding, verdict, models, comparisons, stages, the rest. An interval says what it is about (``scope``).

    ``speed_up`` and ``memory_ratio`` are student / teacher in generated tokens a second and in bytes of weights; null
    where either is not known.
    """
    student, teacher, found = data.model("student"), data.model("teacher"), find(data)
    return {
        "finding": {**asdict(found), "text": found.text},
        "verdict": {
            "promote": data.verdict.promote,
            "headline": data.verdict.headline,
            "reasons": [asdict(reason) for reason in data.verdict.reasons],
            "champion": data.champion,
        },
        "models": {
            row.name: {
                "params": row.params,
                "bytes": row.bytes,
                "tokens_per_second": row.tokens_per_second,
                "metrics": {name: {**asdict(found), "scope": found.scope} for name, found in row.metrics.items()},
            }
            for row in data.models
        },
        "comparisons": [{**asdict(pair), "num_seeds": list(pair.num_seeds), "scope": pair.scope} for pair in data.comparisons],
        "stages": [asdict(stage) for stage in data.stages],
        "recipe": data.recipe_name,
        "suite": data.suites[0],
        "suites": list(data.suites),
        "confidence": data.confidence,
        "seeds": list(data.seeds),
        "published_seed": data.published_seed,
        "speed_up": ratio(student, teacher, "tokens_per_second"),
        "memory_ratio": ratio(student, teacher, "bytes"),
        "counts": {title: dict(counts) for title, counts in data.counts.items()},
        "curves": [{**asdict(curve), "steps": list(curve.steps), "values": list(curve.values)} for curve in data.curves],
        "samples": [{**asdict(sample), "answers": [asdict(answer) for answer in sample.answers]} for sample in data.samples],
        "samples_scored": data.samples_scored,
        "class_samples": [_class_sample_json(sample) for sample in data.class_samples],
        "confusions": [{"model": c.model, "classes": list(c.classes), "counts": [list(row) for row in c.counts]} for c in data.confusions],
        "certainty": None if data.certainty is None else {**asdict(data.certainty), "meaning": certainty_words(data)},
        "versions": dict(data.versions),
    }


def _class_sample_json(sample: ClassSample) -> dict[str, Any]:
    """A sample as plain data, its picture in base64."""
    return {
        "item_id": sample.item_id,
        "picture_png": None if sample.picture_png is None else base64.b64encode(sample.picture_png).decode(),
        "text": sample.text,
        "true_class": sample.true_class,
        "note": sample.note,
        "models": {guess.model: [list(pair) for pair in guess.probabilities] for guess in sample.models},
    }


def render_html(data: ReportData) -> str:
    """The report as one HTML file: inline CSS and SVG, no scripts, nothing loaded, deterministic."""
    headline = data.headline_metric
    points = [Point(row.name, row.params, row.metrics[headline]) for row in data.models if row.params and headline in row.metrics]
    drawings = {
        "forest": [charts.forest_plot(data.comparisons)] if data.comparisons else [],
        "size": [charts.quality_against_size(points, headline)] if len(points) > 1 else [],
        "curves": charts.loss_curves(data.curves),
        "pictures": [
            class_charts.picture(sample.picture_png, sample.true_class) if sample.picture_png else ""
            for sample in data.class_samples[:MAX_CLASS_SAMPLES]
        ],
        "bars": [class_charts.class_bars(sample.models, sample.true_class) for sample in data.class_samples[:MAX_CLASS_SAMPLES]],
        "confusions": [class_charts.confusion_matrix(c) if len(c.classes) <= MAX_CLASSES else "" for c in data.confusions],
    }
    return _render("report.html.jinja", data, {name: [Markup(drawing) for drawing in own] for name, own in drawings.items()})


def render_markdown(data: ReportData) -> str:
    """The report as Markdown, without charts, for a terminal, a model card or a pull request."""
    return _render("report.md.jinja", data, {})


# ---------------------------------------------------------------------------------------------- what templates show


def _render(template: str, data: ReportData, drawings: Mapping[str, list[Markup]]) -> str:
    environment = _environment()
    return environment.get_template(template).render(
        data=data,
        finding=find(data),
        certainty=certainty_words(data),
        drawings=drawings,
        class_samples=data.class_samples[:MAX_CLASS_SAMPLES],
        key_numbers=_key_numbers(data),
        metric_names=_metric_names(data),
        sizes=[(label, meaning, [size(row, data.model("teacher")) for row in data.models]) for label, meaning, size in _SIZES],
        roles=ROLES,
    )


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": _md, "fence": _fence, "cut": _cut, "title_text": _title_text, "label": label_of, "duration": _duration}
    environment.globals |= {"metric_of": metric_of, "metric_label": _metric_label, "guesses": _guesses, "confused_pairs": confused_pairs}
    return environment


def _metric_names(data: ReportData) -> list[str]:
    """Metrics that any model has: those of the headline suite first, each suite in the order of ``METRICS``."""
    names = {name for row in data.models for name in row.metrics}
    return sorted(names, key=lambda name: (name.rpartition("/")[0], list(METRICS).index(metric_of(name).name)))


def _metric_label(name: str) -> str:
    return metric_of(name).label


def _guesses(sample: ClassSample) -> list[tuple[str, str]]:
    """Each model's likeliest classes of a sample in one line."""
    return [
        (guess.model, ", ".join(f"{name}: {percent(p)}" for name, p in likeliest(guess, sample.true_class)))
        for guess in sample.models[:MAX_MODELS]
    ]


def _key_numbers(data: ReportData) -> list[tuple[str, str]]:
    """The numbers for the top of the page, each with its words: one a suite, then the baseline, size and speed."""
    student, teacher = data.model("student"), data.model("teacher")
    found: list[tuple[str, str]] = []
    headline = data.headline_metric
    for i, suite in enumerate(data.suites):
        name = headline if i == 0 else f"{suite}/{headline}"
        if student and name in student.metrics:
            found.append((f"{student.metrics[name].value:.3f}", f"{_metric_label(name)} of the student on {suite}"))
    for other, words in (("baseline", "the baseline"), ("ablation_hard", "hard labels")):
        pair = data.comparison(headline, other)
        if pair is not None:
            verdict = "better than" if pair.improvement_low > 0 else "worse than" if pair.improvement_high < 0 else "not told apart from"
            found.append((f"{pair.improvement:+.3f}", f"{verdict} {words} [{pair.improvement_low:+.3f}, {pair.improvement_high:+.3f}]"))
    size = ratio(teacher, student, "params")
    if size is not None:
        found.append((f"{size:.3g}{TIMES}", "fewer parameters than the teacher"))
    speed = ratio(student, teacher, "tokens_per_second")
    if speed is not None:
        found.append((f"{speed:.3g}{TIMES}", "the teacher's speed"))
    return found


def _of_teacher(name: str, row: ModelRow, teacher: ModelRow | None) -> str:
    found = ratio(row, teacher, name)
    return UNKNOWN if found is None else f"{found:.3g}{TIMES}"


_SIZES: tuple[tuple[str, str, Callable[[ModelRow, ModelRow | None], str]], ...] = (
    ("Parameters", "Numbers that were learned.", lambda row, teacher: _count(row.params)),
    ("Weights", "Size of the weights' files.", lambda row, teacher: _bytes(row.bytes)),
    ("Memory ratio", "Weights against the teacher's; lower is smaller.", lambda row, teacher: _of_teacher("bytes", row, teacher)),
    ("Speed", "Generated tokens, or classified items, a second; higher is faster.", lambda row, teacher: _speed(row.tokens_per_second)),
    ("Speed-up", "Speed against the teacher's; higher is faster.", lambda row, teacher: _of_teacher("tokens_per_second", row, teacher)),
)


def _count(value: int | None) -> str:
    if value is None:
        return UNKNOWN
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,}"


def _bytes(value: int | None) -> str:
    if value is None:
        return UNKNOWN
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value} B"


def _speed(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _cut(text: str) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS].rstrip() + " …"


def _title_text(text: str) -> str:
    """Text that a cut one shows on hovering: all of it within reason; nothing where it is not cut."""
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return ""
    return text if len(text) <= MAX_TITLE_CHARACTERS else text[:MAX_TITLE_CHARACTERS] + " …"


def _md(text: str) -> Markup:
    """Text for a line or table cell of Markdown: no HTML, no Markdown of its own, no line breaks."""
    one_line = " ".join(str(escape(text)).split())
    return Markup(re.sub(r"([\\`*_\[\]|#~!])(?!\d+;)", r"\\\1", one_line))


def _fence(text: str, language: str) -> Markup:
    """A fenced block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text.rstrip()}\n{fence}")
