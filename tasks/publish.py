"""The publish stage: the ledger's entry, then MLflow's run, model version and aliases.

The ledger in the store is the commit of a promotion; MLflow follows it. A kill at any point leaves the old champion or
the new one, and running again converges. Before anything is pointed to, every byte of the student is read, and the ledger is
held against what publication records and the registry know of it: a student is not promoted because an entry vanished.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kd_core.artifacts import Artifact, Record, check_bytes, read_bytes
from kd_core.errors import ArtifactError, IntegrityError
from kd_core.ledger import Entry, append, check_against_records, current, lost_entry, seen_in
from kd_core.recipe.addresses import redact_url
from kd_core.stages.job import Job
from kd_core.summaries import (
    CurateSummary,
    GateSummary,
    PromptsSummary,
    PublishSummary,
    TeacherSummary,
    TrainingRun,
    TrainSummary,
    parse,
)
from kd_core.train.history import logged_metrics
from tasks.publication import DatasetInfo, ModelInfo, Publication, StageRun
from tasks.tracking import default_tracking_uri, promotions, publish_run

__all__ = ["publish_stage"]

_REPORTS = ("report.html", "report.md", "report.json", "recipe.yaml")


def publish_stage(job: Job) -> PublishSummary:
    """No files: what MLflow and the ledger hold of the run is in the summary."""
    gate = job.summary("gate", GateSummary)
    student = job.inputs[f"student.{gate.student.seed}"]
    uri = default_tracking_uri(job.recipe.run.tracking)
    check_bytes(job.store, student)
    _check_ledger(job, uri)
    entry = _promote(job, gate, student) if gate.promote else None
    published = publish_run(uri, _publication(job, gate, student, entry))
    return PublishSummary(
        tracking=redact_url(uri),
        run_id=published.run_id,
        run_url=published.run_url,
        model=job.recipe.publish,
        version=published.version,
        champion_version=published.champion_version,
        promoted=gate.promote,
        ledger=seen_in(current(job.store, job.recipe.publish)),
    )


def _check_ledger(job: Job, tracking_uri: str) -> None:
    """Hold the ledger against the records of the store and the versions of the registry.

    Raises:
        IntegrityError: one of them saw an entry that is not there; with both sides.
    """
    model, store = job.recipe.publish, job.store
    entries = check_against_records(store, model)
    for seen in promotions(tracking_uri, model, store_uri=store.uri):
        if (reason := lost_entry(entries, seen.number, seen.digest)) is not None:
            raise IntegrityError(
                f"{store.uri}/ledger/{model}: version {seen.version} of {model} at {redact_url(tracking_uri)} was promoted by entry "
                f"{seen.number} ({seen.digest}), and the ledger disagrees: {reason}. Restore the ledger from a backup; if the step back is "
                f"meant, delete the tag kd.ledger of that version"
            )


def _promote(job: Job, gate: GateSummary, student: Record) -> Entry:
    """Append to the ledger, unless the champion is no longer the one that the gate compared with; the student's entry."""
    holder = current(job.store, job.recipe.publish)
    if holder is not None and holder.artifact.digest == student.digest:
        return holder
    expected = gate.champion.digest if gate.champion else None
    found = holder.artifact.digest if holder is not None else None
    if found != expected:
        raise ArtifactError(
            f"{job.recipe.publish}: the gate compared with champion {expected}, now it is {found}; run the recipe again to decide anew"
        )
    artifact = Artifact(student.stage, student.fingerprint, student.digest)
    reasons = tuple(f"{reason.rule}: {reason.detail}" for reason in gate.reasons)
    number = holder.number if holder is not None else None
    entry = Entry(job.recipe.publish, "promote", artifact, reasons, number, int(time.time()))
    return append(job.store, job.recipe.publish, entry)


def _publication(job: Job, gate: GateSummary, student: Record, entry: Entry | None) -> Publication:
    report = json.loads(read_bytes(job.store, job.inputs["report"], "report.json"))
    metrics = {name: float(metric["value"]) for name, metric in report["models"]["student"]["metrics"].items()}
    prompts, curate = job.inputs["prompts"], job.inputs["curate"]
    asked, learnt = job.summary("prompts", PromptsSummary).rows, job.summary("curate", CurateSummary).rows
    datasets = (
        DatasetInfo("prompts", prompts.digest, f"{job.store.uri}/{prompts.prefix}", asked, "prompts"),
        DatasetInfo("training rows", curate.digest, f"{job.store.uri}/{curate.prefix}", learnt, "training"),
    )
    return Publication(
        name=job.recipe.name,
        run_key=job.node.fingerprint,
        parameters=_flat(job.recipe.model_dump(mode="json", exclude={"run", "description"})),
        tags={"kd.store": job.store.uri, "kd.verdict": gate.headline},
        stages=tuple(_stage_run(job, name, record) for name, record in job.inputs.items()),
        datasets=datasets,
        artifacts={name: read_bytes(job.store, job.inputs["report"], name) for name in _REPORTS},
        model=ModelInfo(
            name=job.recipe.publish,
            source=f"{job.store.uri}/{student.prefix}/model",
            digests={
                "kd.digest": student.digest,
                "kd.fingerprint": student.fingerprint,
                **{f"kd.sha256.{f.name}": f.sha256 for f in student.files},
            },
            promote=gate.promote,
            reasons=[f"{'holds' if r.holds else 'fails'}: {r.rule}: {r.detail}" for r in gate.reasons],
            metrics=metrics,
            ledger_number=None if entry is None else entry.number,
        ),
    )


def _stage_run(job: Job, name: str, record: Record) -> StageRun:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in [*logged_metrics(job.store, record), *_speed(record)]:
        for key in row.keys() - {"step"}:
            series.setdefault(key, []).append((int(row["step"]), float(row[key])))
    metrics = {key: value for key, value in _numbers(record.summary).items() if key not in series}
    return StageRun(name, record.fingerprint, _flat(dict(record.identity)), metrics, series, record.seconds, "done")


def _speed(record: Record) -> Sequence[Mapping[str, float]]:
    """Readings of a training run's speed; none where nothing was trained."""
    match parse(record):
        case TeacherSummary(training=TrainingRun(speed=speed)) | TrainSummary(training=TrainingRun(speed=speed)):
            return speed
        case _:
            return ()


def _numbers(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a summary and of its parts, under dotted names."""
    found: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = float(value)
    return found


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested plain data as dotted names: MLflow's parameters are flat text."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".lstrip(".")).items()}
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}.{i}").items()}
    return {prefix: value if isinstance(value, str) else json.dumps(value)}
