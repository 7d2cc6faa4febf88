"""Content of a run's report as plain data: what the renderers show and what the finding is drawn from.

Filled by the report stage; computes no measurement.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kd_core.evaluate.certainty import Certainty
from kd_core.evaluate.charts import Curve
from kd_core.evaluate.gate import Verdict
from kd_core.evaluate.statistics import Comparison, Estimate

__all__ = [
    "HEADLINE_METRICS",
    "ClassGuess",
    "ClassSample",
    "Confusion",
    "ModelRow",
    "ReportData",
    "Sample",
    "SampleAnswer",
    "StageRow",
    "ratio",
]

HEADLINE_METRICS = ("pass_at_1", "accuracy", "agreement", "nll")
"""Metrics that a report may begin with, the first that was measured."""


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
class ClassGuess:
    """What a model makes of one sample: its likeliest classes with their probabilities, by falling probability."""

    model: str
    probabilities: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ClassSample:
    """A picture or a text with its true class, and what each model makes of it.

    Attributes:
        item_id: of the item.
        picture_png: a small picture, at most some hundred pixels a side, as PNG; None for a text.
        text: a text; None for a picture.
        true_class: name of the class it is of.
        note: a few words beside it, for example 'no row of this class was learnt from'; None for none.
        models: in the order of display.
    """

    item_id: str
    picture_png: bytes | None
    text: str | None
    true_class: str
    note: str | None
    models: tuple[ClassGuess, ...]


@dataclass(frozen=True)
class Confusion:
    """Confusion matrix of a model.

    Attributes:
        model: its name.
        classes: names of all classes.
        counts: items of a true class (row) that were taken for a class (column).
    """

    model: str
    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


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
        samples_scored: whether the samples' answers are among those that were scored; if not, they were made for this report alone.
        class_samples: pictures or texts with the models' class probabilities.
        confusions: confusion matrices.
        certainty: how sure the teacher was where it gave soft labels; None where it gave none.
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
    samples_scored: bool = True
    class_samples: tuple[ClassSample, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    certainty: Certainty | None = None
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

    def comparison(self, metric: str, other: str) -> Comparison | None:
        """The paired difference of the student to another model in a metric, or None."""
        return next((pair for pair in self.comparisons if (pair.metric, pair.a, pair.b) == (metric, "student", other)), None)

    @property
    def headline_metric(self) -> str:
        """The metric that the report begins with: of those that the student was measured by, the one nearest to its use."""
        student = self.model("student")
        measured = student.metrics if student else {}
        return next((name for name in HEADLINE_METRICS if name in measured), "nll")


def ratio(above: ModelRow | None, below: ModelRow | None, name: str) -> float | None:
    """Divide a number of one model by another's: params, bytes or tokens_per_second; None where either is not known."""
    if above is None or below is None:
        return None
    numerator, denominator = getattr(above, name), getattr(below, name)
    return numerator / denominator if numerator is not None and denominator else None
