"""The publish stage: the ledger's entry, then MLflow's run, model version and aliases.

The ledger in the store is the commit of a promotion; MLflow follows it. A kill at any point leaves the old champion or
the new one, and running again converges.
"""

import json
import time
from typing import Any

from kd_core.artifacts import Artifact, Record, read_bytes
from kd_core.errors import ArtifactError
from kd_core.ledger import Entry, append, current
from kd_core.recipe.addresses import redact_url
from kd_core.stages.job import Job
from kd_core.train.history import logged_metrics
from tasks.tracking import DatasetInfo, ModelInfo, Publication, StageRun, default_tracking_uri, publish_run

__all__ = ["publish_stage"]

_REPORTS = ("report.html", "report.md", "report.json", "recipe.yaml")


def publish_stage(job: Job) -> dict[str, Any]:
    """No files. Summary: MLflow's run and version, and whether the champion moved."""
    gate = job.inputs["gate"].summary
    student = job.inputs[f"student.{gate['student']['seed']}"]
    if gate["promote"]:
        _promote(job, gate, student)
    uri = default_tracking_uri(job.recipe.run.tracking)
    published = publish_run(uri, _publication(job, gate, student))
    return {
        "tracking": redact_url(uri),
        "run_id": published.run_id,
        "run_url": published.run_url,
        "model": job.recipe.publish,
        "version": published.version,
        "champion_version": published.champion_version,
        "promoted": gate["promote"],
    }


def _promote(job: Job, gate: Any, student: Record) -> None:
    """Append to the ledger, unless the champion is no longer the one that the gate compared with."""
    holder = current(job.store, job.recipe.publish)
    if holder is not None and holder.artifact.digest == student.digest:
        return
    expected = gate["champion"]["digest"] if gate["champion"] else None
    found = holder.artifact.digest if holder is not None else None
    if found != expected:
        raise ArtifactError(
            f"{job.recipe.publish}: the gate compared with champion {expected}, now it is {found}; run the recipe again to decide anew"
        )
    artifact = Artifact(student.stage, student.fingerprint, student.digest)
    reasons = tuple(f"{reason['rule']}: {reason['detail']}" for reason in gate["reasons"])
    number = holder.number if holder is not None else None
    append(job.store, job.recipe.publish, Entry(job.recipe.publish, "promote", artifact, reasons, number, int(time.time())))


def _publication(job: Job, gate: Any, student: Record) -> Publication:
    report = json.loads(read_bytes(job.store, job.inputs["report"], "report.json"))
    metrics = {name: float(metric["value"]) for name, metric in report["models"]["student"]["metrics"].items()}
    prompts = job.inputs["prompts"]
    datasets = [DatasetInfo("prompts", prompts.digest, f"{job.store.uri}/{prompts.prefix}", int(prompts.summary["rows"]), "prompts")]
    curate = job.inputs["curate"]
    datasets.append(
        DatasetInfo("training rows", curate.digest, f"{job.store.uri}/{curate.prefix}", int(curate.summary["rows"]), "training")
    )
    return Publication(
        name=job.recipe.name,
        run_key=job.node.fingerprint,
        parameters=_flat(job.recipe.model_dump(mode="json", exclude={"run", "description"})),
        tags={"kd.store": job.store.uri, "kd.verdict": gate["headline"]},
        stages=tuple(_stage_run(job, name, record) for name, record in job.inputs.items()),
        datasets=tuple(datasets),
        artifacts={name: read_bytes(job.store, job.inputs["report"], name) for name in _REPORTS},
        model=ModelInfo(
            name=job.recipe.publish,
            source=f"{job.store.uri}/{student.prefix}/model",
            digests={
                "kd.digest": student.digest,
                "kd.fingerprint": student.fingerprint,
                **{f"kd.sha256.{f.name}": f.sha256 for f in student.files},
            },
            promote=gate["promote"],
            reasons=[f"{'holds' if r['holds'] else 'fails'}: {r['rule']}: {r['detail']}" for r in gate["reasons"]],
            metrics=metrics,
        ),
    )


def _stage_run(job: Job, name: str, record: Record) -> StageRun:
    numbers = {k: float(v) for k, v in record.summary.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "seconds"}
    series: dict[str, list[tuple[int, float]]] = {}
    for row in [*logged_metrics(job.store, record), *record.summary.get("speed", ())]:
        for key in row.keys() - {"step"}:
            series.setdefault(key, []).append((int(row["step"]), float(row[key])))
    metrics = {key: value for key, value in numbers.items() if key not in series}
    return StageRun(name, record.fingerprint, _flat(dict(record.identity)), metrics, series, float(record.summary["seconds"]), "done")


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested plain data as dotted names: MLflow's parameters are flat text."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}".lstrip(".")).items()}
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        return {k: v for i, inner in enumerate(value) for k, v in _flat(inner, f"{prefix}.{i}").items()}
    return {prefix: value if isinstance(value, str) else json.dumps(value)}
