"""The report of a run: one self-contained HTML page, the same in Markdown, and the same as JSON.

It shows what it is given and computes no measurement of its own, only ratios. Everything that came out of a model, a
prompt or a recipe is escaped; the page loads nothing, runs nothing, and says so to the browser.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from kd_core.evaluate import charts
from kd_core.evaluate.charts import Curve, Point, label_of
from kd_core.evaluate.gate import Verdict
from kd_core.evaluate.statistics import METRICS, Comparison, Estimate, metric_of

__all__ = ["Curve", "ModelRow", "ReportData", "Sample", "SampleAnswer", "StageRow", "render_html", "render_markdown", "report_json"]

TIMES, UNKNOWN = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
MAX_SHOWN_CHARACTERS = 420
MAX_TITLE_CHARACTERS = 4_000

ROLES = {
    "teacher": "the large model that is learned from",
    "student": "learned from the teacher; the model under decision",
    "baseline": "same size and steps, learned from gold answers alone",
    "ablation_hard": "same rows and steps, without the teacher's probabilities",
    "champion": "the student in service when this run began",
}


@dataclass(frozen=True)
class ModelRow:
    """One model: size, speed and metrics.

    Attributes:
        name: teacher, student, baseline, ablation_hard or champion.
        params: number of parameters; None where it is not known (a server's model).
        bytes: size of the weights.
        tokens_per_second: generated tokens a second; None if not measured.
        metrics: estimates by metric name; those of further suites are named '<suite>/<metric>'.
    """

    name: str
    params: int | None
    bytes: int | None
    tokens_per_second: float | None
    metrics: Mapping[str, Estimate]


@dataclass(frozen=True)
class StageRow:
    """One stage: its fingerprint, how it stands (done, in a finished run), and the seconds its computation took."""

    name: str
    fingerprint: str
    status: str
    seconds: float


@dataclass(frozen=True)
class SampleAnswer:
    """A model's answer to a sample; ``right`` is None where it was not verified."""

    model: str
    text: str
    right: bool | None


@dataclass(frozen=True)
class Sample:
    """A prompt with its reference answer and what each model said."""

    item_id: str
    prompt: str
    reference: str | None
    answers: tuple[SampleAnswer, ...]


@dataclass(frozen=True)
class ReportData:
    """Content of the report, as plain data.

    Attributes:
        recipe_name: name of the recipe.
        description: the recipe's own words.
        suites: names of all suites; metrics of the first have no prefix.
        confidence: coverage of all intervals.
        seeds: seeds of the students.
        published_seed: the one whose student would be published: floors, truncation and the champion are judged by it.
        verdict: the gate's decision.
        champion: digest (or name) of the champion compared with; None if there was none.
        models: in the order of display.
        comparisons: paired differences.
        stages: in the order of execution.
        counts: title -> what was counted -> number: prompts, answers, reasons for rejection.
        curves: losses over steps.
        samples: answers side by side.
        command: what reproduces this run.
        recipe_yaml: the resolved recipe.
        versions: package or tool -> version; the machine may stand here too.
        price_per_hour: of the machine, for the cost of stages; None shows no cost.
    """

    recipe_name: str
    description: str
    suites: tuple[str, ...]
    confidence: float
    seeds: tuple[int, ...]
    published_seed: int
    verdict: Verdict
    champion: str | None
    models: tuple[ModelRow, ...]
    comparisons: tuple[Comparison, ...]
    stages: tuple[StageRow, ...]
    command: str
    recipe_yaml: str
    versions: Mapping[str, str]
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    samples: tuple[Sample, ...] = ()
    price_per_hour: float | None = None

    @property
    def scope(self) -> str:
        """Say in whole sentences what the intervals are about."""
        if len(self.seeds) == 1:
            return (
                "Intervals are about these checkpoints on new items. There is one training seed, so they say nothing of how the recipe "
                "would do with another: give at least 2 seeds to compare recipes."
            )
        return (
            f"Intervals are about the recipes on new items and new seeds, from {len(self.seeds)} seeds each; the teacher and the champion "
            f"are one model each. The student of seed {self.published_seed}, which has the least validation loss, is the one that would be "
            "published: floors, truncation and the champion are judged by that checkpoint alone."
        )

    def model(self, name: str) -> ModelRow | None:
        """The row of a model, or None."""
        return next((row for row in self.models if row.name == name), None)


def report_json(data: ReportData) -> dict[str, Any]:
    """The report as plain data: verdict, models, comparisons, stages, then the rest. Each interval says what it is about (``scope``).

    ``speed_up`` and ``memory_ratio`` are student / teacher in generated tokens a second and in bytes of weights; null
    where either is not known.
    """
    student, teacher = data.model("student"), data.model("teacher")
    return {
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
        "speed_up": _ratio(student, teacher, "tokens_per_second"),
        "memory_ratio": _ratio(student, teacher, "bytes"),
        "counts": {title: dict(counts) for title, counts in data.counts.items()},
        "curves": [{**asdict(curve), "steps": list(curve.steps), "values": list(curve.values)} for curve in data.curves],
        "samples": [{**asdict(sample), "answers": [asdict(answer) for answer in sample.answers]} for sample in data.samples],
        "versions": dict(data.versions),
    }


def render_html(data: ReportData) -> str:
    """The report as one HTML file: inline CSS and SVG, no scripts, nothing loaded, deterministic."""
    headline = _headline_metric(data)
    points = [Point(row.name, row.params, row.metrics[headline]) for row in data.models if row.params and headline in row.metrics]
    drawings = {
        "forest": [charts.forest_plot(data.comparisons)] if data.comparisons else [],
        "size": [charts.quality_against_size(points, headline)] if len(points) > 1 else [],
        "curves": charts.loss_curves(data.curves),
    }
    return _render("report.html.jinja", data, {name: [Markup(svg) for svg in svgs] for name, svgs in drawings.items()})


def render_markdown(data: ReportData) -> str:
    """The report as Markdown, without charts, for a terminal, a model card or a pull request."""
    return _render("report.md.jinja", data, {})


# ---------------------------------------------------------------------------------------------- what templates show


def _render(template: str, data: ReportData, drawings: Mapping[str, list[Markup]]) -> str:
    environment = _environment()
    return environment.get_template(template).render(
        data=data,
        drawings=drawings,
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
    environment.globals |= {"metric_of": metric_of, "metric_label": _metric_label}
    return environment


def _metric_names(data: ReportData) -> list[str]:
    """Metrics that any model has: those of the headline suite first, each suite in the order of ``METRICS``."""
    names = {name for row in data.models for name in row.metrics}
    return sorted(names, key=lambda name: (name.rpartition("/")[0], list(METRICS).index(metric_of(name).name)))


def _headline_metric(data: ReportData) -> str:
    student = data.model("student")
    measured = student.metrics if student else {}
    return next((name for name in ("pass_at_1", "agreement", "nll") if name in measured), "nll")


def _metric_label(name: str) -> str:
    return metric_of(name).label


def _key_numbers(data: ReportData) -> list[tuple[str, str]]:
    """The numbers for the top of the page, each with its words: one a suite, then the baseline, size and speed."""
    student, teacher = data.model("student"), data.model("teacher")
    found: list[tuple[str, str]] = []
    headline = _headline_metric(data)
    for i, suite in enumerate(data.suites):
        name = headline if i == 0 else f"{suite}/{headline}"
        if student and name in student.metrics:
            found.append((f"{student.metrics[name].value:.3f}", f"{_metric_label(name)} of the student on {suite}"))
    pair = next((p for p in data.comparisons if (p.metric, p.a, p.b) == (headline, "student", "baseline")), None)
    if pair is not None:
        word = "better" if pair.improvement >= 0 else "worse"
        found.append((f"{pair.improvement:+.3f}", f"{word} than the baseline [{pair.improvement_low:+.3f}, {pair.improvement_high:+.3f}]"))
    size = _ratio(teacher, student, "params")
    if size is not None:
        found.append((f"{size:.3g}{TIMES}", "fewer parameters than the teacher"))
    speed = _ratio(student, teacher, "tokens_per_second")
    if speed is not None:
        found.append((f"{speed:.3g}{TIMES}", "the teacher's speed"))
    return found


def _ratio(above: ModelRow | None, below: ModelRow | None, name: str) -> float | None:
    if above is None or below is None:
        return None
    numerator, denominator = getattr(above, name), getattr(below, name)
    return numerator / denominator if numerator is not None and denominator else None


def _of_teacher(name: str, row: ModelRow, teacher: ModelRow | None) -> str:
    ratio = _ratio(row, teacher, name)
    return UNKNOWN if ratio is None else f"{ratio:.3g}{TIMES}"


_SIZES: tuple[tuple[str, str, Callable[[ModelRow, ModelRow | None], str]], ...] = (
    ("Parameters", "Numbers that were learned.", lambda row, teacher: _count(row.params)),
    ("Weights", "Size of the weights' files.", lambda row, teacher: _bytes(row.bytes)),
    ("Memory ratio", "Weights against the teacher's; lower is smaller.", lambda row, teacher: _of_teacher("bytes", row, teacher)),
    ("Tokens/s", "Generated tokens a second; higher is faster.", lambda row, teacher: _speed(row.tokens_per_second)),
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
