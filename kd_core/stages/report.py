"""The report stage: evidence of all stages as one HTML page, Markdown and JSON."""

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa

from kd_core.evaluate.certainty import Certainty, certainty
from kd_core.evaluate.charts import Curve
from kd_core.evaluate.gate import Verdict
from kd_core.evaluate.report import render_html, render_markdown, report_json
from kd_core.evaluate.report_data import ModelRow, ReportData, Sample, SampleAnswer, StageRow
from kd_core.evaluate.statistics import METRICS, Comparison, Estimate, compare, estimate, metric_of, num_measured
from kd_core.evaluate.suites import suite_items
from kd_core.prompts import shown
from kd_core.recipe import ARMS, Recipe
from kd_core.recipe.files import dump_recipe
from kd_core.stages.class_evidence import class_samples, confusions, tells_classes
from kd_core.stages.gate import efficiency, model_scores
from kd_core.stages.job import Job
from kd_core.stages.sharded import frozen_rows
from kd_core.summaries import (
    CurateSummary,
    EvaluateSummary,
    GateSummary,
    PromptsSummary,
    ReportSummary,
    TeacherSummary,
    TrainSummary,
    VocabularySummary,
    of,
)
from kd_core.task_kinds import kind_of
from kd_core.tokens.lengths import expect_enough
from kd_core.train.history import logged_metrics

__all__ = ["report_stage"]

_ORDER = ("teacher", *ARMS, "champion")
_NUM_SAMPLES = 8
_CURVES = {"loss": "train loss", "hard": "hard (CE)", "soft": "soft (KL)", "feature": "features"}


def report_stage(job: Job) -> ReportSummary:
    """Files: report.html, report.md, report.json, recipe.yaml."""
    data = _report_data(job)
    (job.directory / "report.html").write_text(render_html(data), encoding="utf-8")
    (job.directory / "report.md").write_text(render_markdown(data), encoding="utf-8")
    (job.directory / "report.json").write_text(json.dumps(report_json(data), indent=1), encoding="utf-8")
    (job.directory / "recipe.yaml").write_text(data.recipe_yaml, encoding="utf-8")
    return ReportSummary(data.verdict.promote, data.verdict.headline)


def _report_data(job: Job) -> ReportData:
    recipe, scores = job.recipe, model_scores(job)
    names = [name for name in _ORDER if name in scores]
    gate, classes = job.summary("gate", GateSummary), tells_classes(job)
    return ReportData(
        recipe_name=recipe.name,
        description=recipe.description,
        suites=tuple(suite.name for suite in recipe.evaluation.suites),
        confidence=recipe.evaluation.confidence,
        seeds=recipe.seeds,
        published_seed=gate.student.seed,
        verdict=Verdict(gate.promote, gate.reasons),
        champion=gate.champion.digest if gate.champion else None,
        models=tuple(_model_row(job, name, scores[name]) for name in names),
        comparisons=_comparisons(job, scores, [name for name in names if name != "student"]),
        stages=tuple(_stage_rows(job)),
        counts={**_counts(job), "Items left out": _left_out(job, scores)},
        curves=tuple(_curves(job)),
        samples=() if classes else tuple(sample for suite in recipe.evaluation.suites for sample in _samples(job, scores, suite.name)),
        samples_scored=recipe.evaluation.generate is not None,
        class_samples=tuple(class_samples(job)) if classes else (),
        confusions=tuple(confusions(job, scores)) if classes else (),
        certainty=_certainty(job),
        command=f"kd run recipes/{recipe.name}.yaml",
        recipe_yaml=dump_recipe(_without_address(recipe)),
        versions={k: str(v) for k, v in _versions(job).items()},
        price_per_hour=recipe.run.price_per_hour,
    )


def _without_address(recipe: Recipe) -> Recipe:
    """The recipe without its registry: that address may hold a password, and the report is the same wherever it is published."""
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"tracking": None})})


def _estimates(job: Job, table: pa.Table) -> dict[str, Estimate]:
    suites = [suite.name for suite in job.recipe.evaluation.suites]
    found = {}
    for position, suite in enumerate(suites):
        for metric in METRICS:
            value = estimate(table, metric, suite=suite, confidence=job.recipe.evaluation.confidence)
            if value is not None:
                found[metric if position == 0 else f"{suite}/{metric}"] = value
    return found


def _model_row(job: Job, name: str, table: pa.Table) -> ModelRow:
    cost = efficiency(job)[name]
    return ModelRow(name, cost["parameters"], cost["bytes"], cost["tokens_per_second"], _estimates(job, table))


def _comparisons(job: Job, scores: dict[str, pa.Table], others: list[str]) -> tuple[Comparison, ...]:
    student, confidence = scores["student"], job.recipe.evaluation.confidence
    found = []
    for other in others:
        for position, suite in enumerate(job.recipe.evaluation.suites):
            for metric in (name for name in METRICS if name != "truncated"):
                if other == "teacher" and metric in ("kl", "agreement"):
                    continue  # the teacher's distance to itself is zero by definition
                difference = compare(student, scores[other], metric, suite=suite.name, confidence=confidence, names=("student", other))
                if difference is not None:
                    found.append(difference if position == 0 else replace(difference, metric=f"{suite.name}/{metric}"))
    return tuple(found)


def _stage_rows(job: Job) -> list[StageRow]:
    """One line a group, in order; the seconds are those of its computation, whenever that was."""
    groups: dict[str, list[str]] = {}
    for name in job.inputs:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [
        StageRow(group, job.inputs[names[0]].fingerprint, "done", sum(job.inputs[name].seconds for name in names))
        for group, names in groups.items()
    ]


def _counts(job: Job) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {
        "Prompts": dict(job.summary("prompts", PromptsSummary).counts),
        "Curation": dict(job.summary("curate", CurateSummary).counts),
    }
    found["Rows learnt from"] = _used_rows(job)
    evaluated = {name.partition(".")[2]: of(record, EvaluateSummary) for name, record in job.inputs.items() if record.stage == "evaluate"}
    beyond: dict[str, float] = {name: own.items_beyond_positions for name, own in evaluated.items() if own.items_beyond_positions}
    if beyond:
        found["Items that may need more than a model's positions"] = beyond
    if counts := job.summary("teacher", TeacherSummary).counts:
        found["Teacher's gold data"] = dict(counts)
    if "vocabulary" in job.inputs:
        kept = [job.summary(f"student.{seed}", TrainSummary).vocabulary for seed in job.recipe.seeds]
        masses = [round(own.kept_mass, 4) for own in kept if own is not None and own.kept_mass is not None]
        sizes = job.summary("vocabulary", VocabularySummary)
        found["Vocabulary"] = {"tokens kept": sizes.tokens, "tokens of the full tokenizer": sizes.full_tokens}
        found["Vocabulary"] |= {"teacher's probability on kept tokens": min(masses)} if masses else {}
    return found


def _left_out(job: Job, scores: dict[str, pa.Table]) -> dict[str, float]:
    """Items without a value by suite, metric and model, of metrics that some model was measured on there."""
    found: dict[str, float] = {}
    for suite in job.recipe.evaluation.suites:
        for metric in METRICS:
            counts = {name: num_measured(scores[name], metric, suite=suite.name) for name in _ORDER if name in scores}
            if any(measured for measured, _ in counts.values()):
                missing = {name: total - measured for name, (measured, total) in counts.items() if measured < total}
                found |= {f"{suite.name}: {metric_of(metric).label} of {name}": number for name, number in missing.items()}
    return found


def _used_rows(job: Job) -> dict[str, float]:
    """Rows and supervised tokens that the student used; of several seeds they are the same.

    Raises:
        TrainingError: fewer than the recipe asks for; the student was trained when it asked for fewer.
    """
    used = job.summary(f"student.{job.recipe.seeds[0]}", TrainSummary).training.used_rows
    expect_enough(used, job.recipe.training)
    found: dict[str, float] = {"rows used": used.used, "supervised tokens used": used.used_positions}
    return found | {
        f"rows left out, longer than {used.limit.by} = {used.limit.tokens}": used.rows - used.used,
        "supervised tokens of rows left out": used.positions - used.used_positions,
    }


def _curves(job: Job) -> list[Curve]:
    found = []
    for name, record in job.inputs.items():
        metrics = logged_metrics(job.store, record)
        if not metrics:
            continue
        model, seed = (name, job.recipe.seeds[0]) if record.stage == "teacher" else (name.partition(".")[0], of(record, TrainSummary).seed)
        for key, part in _CURVES.items():
            points = [(int(m["step"]), float(m[key])) for m in metrics if key in m]
            if points and not (key == "hard" and "soft" not in metrics[0]):
                steps, values = zip(*points, strict=True)
                found.append(Curve(model, seed, part, steps, values))
    return found


def _certainty(job: Job) -> Certainty | None:
    """Find how sure the teacher was of the rows that have soft labels; None where none have."""
    if "soft_labels" not in job.inputs:
        return None
    rows = job.read_table("soft_labels", "keys.parquet")
    if rows.num_rows == 0:
        return None
    cache, snapshot = frozen_rows(job, "soft_labels")
    num_supervised = rows["num_tokens"].to_numpy() - rows["first_supervised"].to_numpy()
    return certainty(cache, snapshot, rows["key"].to_pylist(), num_supervised)


def _samples(job: Job, scores: dict[str, pa.Table], suite: str) -> list[Sample]:
    """The first items of a suite with every model's answer; suites share the number of samples.

    The student's is of the seed that would be published, another model's of its first. Answers that were made for the report alone are
    cut short, and so are not verified.
    """
    number = max(1, _NUM_SAMPLES // len(job.recipe.evaluation.suites))
    items = suite_items(job.recipe, lambda name: job.read_table("prompts", name))[suite].slice(0, number).to_pylist()
    published, scored = job.summary("gate", GateSummary).student.seed, job.recipe.evaluation.generate is not None
    kind = kind_of(job.recipe)
    texts = {
        name: {
            row["item_id"]: row["text"]
            for row in reversed(table.to_pylist())
            if row["suite"] == suite and (name != "student" or row["seed"] == published)
        }
        for name, table in scores.items()
    }

    def answer(name: str, item: dict[str, Any]) -> SampleAnswer | None:
        text = texts[name].get(item["prompt_id"])
        if text is None:
            return None
        graded = scored and item["reference"] is not None
        return SampleAnswer(name, text, kind.is_right(job.recipe, text, item["reference"]) if graded else None)

    found = []
    for item in items:
        answers = tuple(a for name in _ORDER if name in texts and (a := answer(name, item)) is not None)
        if answers:
            found.append(Sample(item["prompt_id"], shown(item["prompt"]), item["reference"], answers))
    return found


def _versions(job: Job) -> dict[str, Any]:
    provenance = job.inputs["gate"].provenance
    return {**provenance["packages"], "python": provenance["python"], "machine": provenance["machine"]}
