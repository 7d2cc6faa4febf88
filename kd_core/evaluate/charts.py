"""The report's charts as SVG text: paired differences, loss curves, quality against size.

matplotlib draws them (imported at the first chart, never at import), and they are then made part of a page: no size of
their own, no metadata, no links, ids prefixed, and colours replaced by the page's CSS variables, so that one drawing is
readable on light and dark. The same data gives the same text.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from kd_core.evaluate.statistics import Comparison, Estimate, metric_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "Point", "forest_plot", "label_of", "loss_curves", "quality_against_size"]

P = ParamSpec("P")

LABELS = {"teacher": "Teacher", "student": "Student", "baseline": "Baseline", "ablation_hard": "Hard labels only", "champion": "Champion"}

# Stand-ins that matplotlib writes into the SVG, and the CSS each becomes there. No other part of a drawing has these values.
_CSS_OF = {
    "#0a0b01": "currentColor",
    "#0a0b02": "var(--muted)",
    "#0a0b03": "var(--rule)",
    "#0a0b04": "var(--good)",
    "#0a0b05": "var(--bad)",
    "#0a0c01": "var(--teacher)",
    "#0a0c02": "var(--student)",
    "#0a0c03": "var(--baseline)",
    "#0a0c04": "var(--ablation)",
    "#0a0c05": "var(--champion)",
}
INK, MUTED, RULE, GOOD, BAD = list(_CSS_OF)[:5]
_MODEL_COLOR = dict(zip(LABELS, list(_CSS_OF)[5:], strict=True))

WIDTH_INCHES = 4.8
MAX_CURVE_POINTS = 80

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kd",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "axes.titlecolor": INK,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "figure.frameon": False,
    "axes.facecolor": "none",
    "text.parse_math": False,
}


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """A chart drawn with this module's style, which is gone afterwards."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@dataclass(frozen=True)
class Curve:
    """One quantity over one training run: ``values[i]`` at optimiser step ``steps[i]``.

    Attributes:
        model: name of the compared model, for example student.
        seed: seed of the run.
        part: what is drawn, for example 'train loss', 'soft part', 'validation nll'; curves of one part share a panel.
        steps: optimiser steps, rising.
        values: one value a step.
    """

    model: str
    seed: int
    part: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """One model in the chart of quality against size."""

    model: str
    params: int
    quality: Estimate


def label_of(model: str) -> str:
    """A model's name for people; a name that is not known stays as it is.

    >>> label_of("ablation_hard")
    'Hard labels only'
    """
    return LABELS.get(model, model)


@_styled
def forest_plot(comparisons: Sequence[Comparison]) -> str:
    """Improvements with their intervals, one row a comparison, one panel (with its own scale) a metric.

    Numbers are turned so that right of the line is better, also where less of the metric is better.
    """
    metrics = list(dict.fromkeys(pair.metric for pair in comparisons))
    rows = [[pair for pair in comparisons if pair.metric == metric] for metric in metrics]
    figure = _figure(sum(0.55 + 0.24 * len(group) for group in rows) + 0.1)
    panels = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"height_ratios": [0.6 + len(group) for group in rows]})
    for panel, metric, group in zip(panels[:, 0], metrics, rows, strict=True):
        panel.axvline(0.0, color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
        for y, pair in enumerate(group):
            color = GOOD if pair.improvement_low > 0 else BAD if pair.improvement_high < 0 else MUTED
            panel.plot([pair.improvement_low, pair.improvement_high], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
            panel.plot([pair.improvement], [y], marker="s", markersize=4.5, color=color, markeredgewidth=0)
            shown = f"{pair.improvement:+.3f}"
            panel.annotate(
                shown, (1.0, y), (4, 0), ("axes fraction", "data"), "offset points", va="center", color=color, annotation_clip=False
            )
        panel.set_ylim(len(group) - 0.4, -0.6)
        panel.set_yticks(range(len(group)), [f"{label_of(pair.a)} over {label_of(pair.b).lower()}" for pair in group])
        panel.tick_params(axis="y", length=0, labelcolor=INK)
        panel.spines["left"].set_visible(False)
        panel.set_title(_metric_label(metric), loc="left")
        panel.margins(x=0.12)
    panels[-1, 0].set_xlabel("improvement: right of the line is better")
    return _svg(figure, "forest", "Paired differences between models with their intervals")


def loss_curves(curves: Sequence[Curve]) -> list[str]:
    """One drawing a part, in it one thin line a run, coloured by model; long curves are averaged down to 80 points."""
    parts = list(dict.fromkeys(curve.part for curve in curves))
    return [_loss_panel([curve for curve in curves if curve.part == part], f"curves{i}") for i, part in enumerate(parts)]


@_styled
def _loss_panel(curves: Sequence[Curve], name: str) -> str:
    figure = _figure(1.9)
    panel = figure.subplots()
    for curve in curves:
        steps, values = _averaged(curve)
        panel.plot(steps, values, color=_color_of(curve.model), linewidth=0.9, alpha=0.85)
    values = [value for curve in curves for value in curve.values]
    if min(values) > 0 and max(values) > 20 * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(lambda value, _: "")
    panel.set_title(curves[0].part, loc="left")
    panel.set_xlabel("optimiser step")
    return _svg(figure, name, f"{curves[0].part} over optimiser steps")


@_styled
def quality_against_size(points: Sequence[Point], metric: str) -> str:
    """A metric with its interval over the number of parameters (logarithmic), one point a model."""
    figure = _figure(2.6)
    panel = figure.subplots()
    for point in points:
        quality, color = point.quality, _color_of(point.model)
        panel.plot([point.params, point.params], [quality.low, quality.high], color=color, linewidth=1.4)
        panel.plot([point.params], [quality.value], marker="o", markersize=6, color=color, markeredgewidth=0)
    panel.set_xscale("log")
    panel.margins(x=0.35, y=0.15)
    for point, y in _spread(points, panel):
        panel.annotate(
            label_of(point.model), (point.params, y), (8, 0), textcoords="offset points", va="center", color=_color_of(point.model)
        )
    panel.set_xlabel("parameters")
    panel.set_title(_metric_label(metric), loc="left")
    panel.xaxis.set_major_formatter(lambda value, _: _short(value))
    panel.xaxis.set_minor_formatter(lambda value, _: _short(value) if f"{value:.0e}"[0] in "25" else "")
    panel.tick_params(axis="x", which="both", length=3, pad=3)
    return _svg(figure, "size", f"{_metric_label(metric)} of each model over its number of parameters")


def _spread(points: Sequence[Point], panel: "Axes") -> list[tuple[Point, float]]:
    """Heights of labels: their points' own, moved up where two models of like size would write over each other."""
    low, high = panel.get_ylim()
    step = 0.085 * (high - low)
    placed: list[tuple[Point, float]] = []
    for point in sorted(points, key=lambda p: p.quality.value):
        near = [y for other, y in placed if 0.5 < other.params / point.params < 2.0]
        placed.append((point, max([point.quality.value, *(y + step for y in near)])))
    return placed


def _averaged(curve: Curve) -> tuple[list[float], list[float]]:
    """The curve in at most 80 points, each the mean of a run of neighbours."""
    width = math.ceil(len(curve.steps) / MAX_CURVE_POINTS)
    starts = range(0, len(curve.steps), width)

    def means(numbers: Sequence[float]) -> list[float]:
        return [math.fsum(numbers[i : i + width]) / len(numbers[i : i + width]) for i in starts]

    return means(curve.steps), means(curve.values)


def _color_of(model: str) -> str:
    return _MODEL_COLOR.get(model, MUTED)


def _metric_label(name: str) -> str:
    suite, _, _ = name.rpartition("/")
    return f"{metric_of(name).label} on {suite}" if suite else metric_of(name).label


def _short(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _figure(height_inches: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")


def _svg(figure: "Figure", name: str, title: str) -> str:
    """The figure as an SVG element for a page; ``name`` makes its ids unique there, ``title`` is read aloud."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{html.escape(title)}">', text, count=1
    )
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    for color, css in _CSS_OF.items():
        text = text.replace(color, css)
    return text
