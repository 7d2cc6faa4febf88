"""What a report shows of models that tell classes apart: samples with the classes that each model finds likely, and confusion matrices.

Read from what the evaluations kept (``guesses.parquet``); no model is run.
"""

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kd_core.evaluate.report_data import ClassGuess, ClassSample, Confusion
from kd_core.evaluate.suites import suite_items
from kd_core.prompts import INPUTS_FILE, Inputs
from kd_core.recipe import ClassificationTask
from kd_core.stages.job import Job
from kd_core.summaries import GateSummary

__all__ = ["class_samples", "confusions", "tells_classes"]

_SHOWN = ("teacher", "student", "ablation_hard")
_NUM_SAMPLES, _NUM_UNSEEN = 12, 6
_EDGE = 96
"""Longest side of a picture in a report, pixels."""


def tells_classes(job: Job) -> bool:
    """Tell whether the evaluations above kept classes."""
    return any("guesses.parquet" in {file.name for file in record.files} for record in job.inputs.values() if record.stage == "evaluate")


def class_samples(job: Job) -> Iterator[ClassSample]:
    """Items of the first suite: of classes that were left out some from the one of which the teacher is least sure to the surest, then of
    each other class the one of which it is least sure.
    """
    suite = job.recipe.evaluation.suites[0].name
    left_out = set(job.recipe.curate.leave_out_classes or ())
    items = suite_items(job.recipe, lambda name: job.read_table("prompts", name))[suite].to_pylist()
    guesses = {name: _guesses(job, name, suite) for name in _SHOWN if f"evaluate.{name}" in job.inputs}
    sure = {item_id: classes[0][1] for item_id, classes in guesses.get("teacher", {}).items()}
    items.sort(key=lambda item: (sure.get(item["prompt_id"], 0.0), item["prompt_id"]))
    with job.files(job.inputs["prompts"]) as files:
        inputs = Inputs(files / INPUTS_FILE)
    images = isinstance(job.recipe.task, ClassificationTask) and job.recipe.task.input == "image"
    for item in _chosen(items, left_out):
        models = tuple(ClassGuess(name, found[item["prompt_id"]]) for name, found in guesses.items())
        note = "the student never saw a row of this class" if item["gold"] in left_out else None
        picture = _picture(inputs.read(bytes.fromhex(item["prompt"]))) if images else None
        yield ClassSample(item["prompt_id"], picture, None if images else item["prompt"], item["gold"], note, models)


def _chosen(items: Sequence[Mapping[str, Any]], left_out: set[str]) -> list[Mapping[str, Any]]:
    unseen = _spread([item for item in items if item["gold"] in left_out], _NUM_UNSEEN)
    by_class: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        if item["gold"] not in left_out:
            by_class.setdefault(item["gold"], []).append(item)
    queues = [by_class[name] for name in sorted(by_class)]
    turns = [queue[turn] for turn in range(_NUM_SAMPLES) for queue in queues if turn < len(queue)]
    return [*unseen, *turns][:_NUM_SAMPLES]


def _spread(items: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """So many of the items, at even distances, the first and the last among them."""
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def _guesses(job: Job, model: str, suite: str) -> dict[str, tuple[tuple[str, float], ...]]:
    """Item -> its likeliest classes with their probabilities: of the student the seed that would be published, else the first one."""
    table = job.read_table(f"evaluate.{model}", "guesses.parquet")
    seed = job.summary("gate", GateSummary).student.seed if model in ("student", "ablation_hard") else table["seed"][0].as_py()
    rows = (row for row in table.to_pylist() if row["suite"] == suite and row["seed"] == seed)
    return {row["item_id"]: tuple(zip(row["classes"], row["probabilities"], strict=True)) for row in rows}


def _picture(data: bytes) -> bytes:
    """An image as a small PNG."""
    from PIL import Image

    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("L" if image.mode in ("1", "L", "I;16") else "RGB")
        small.thumbnail((_EDGE, _EDGE))
        small.save(out, "PNG")
    return out.getvalue()


def confusions(job: Job, scores: Mapping[str, pa.Table]) -> Iterator[Confusion]:
    """Confusion matrices over all suites and seeds of the models that are shown."""
    suites = suite_items(job.recipe, lambda name: job.read_table("prompts", name))
    gold = {(suite, row["prompt_id"]): row["gold"] for suite, table in suites.items() for row in table.to_pylist()}
    for name in (name for name in _SHOWN if name in scores):
        rows = scores[name].select(["suite", "item_id", "text"]).to_pylist()
        counts = Counter((gold[row["suite"], row["item_id"]], row["text"]) for row in rows)
        classes = tuple(sorted(set(gold.values()) | {text for _, text in counts}))
        yield Confusion(name, classes, tuple(tuple(counts[a, b] for b in classes) for a in classes))
