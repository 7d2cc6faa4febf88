"""The stage that decides: evidence of all compared models in, a verdict out."""

import pyarrow as pa

from kd_core.evaluate.gate import Efficiency, Evidence, decide
from kd_core.ledger import seen_in
from kd_core.stages.graph import least_validation_loss
from kd_core.stages.job import Job
from kd_core.summaries import EvaluateSummary, GateSummary, StudentReference, TeacherSummary, TrainSummary, of

__all__ = ["collect_evidence", "efficiency", "gate_stage", "model_scores"]


def model_scores(job: Job) -> dict[str, pa.Table]:
    """Score tables by model name, of every upstream evaluate node."""
    nodes = [role for role in job.inputs if role.startswith("evaluate.")]
    return {role.partition(".")[2]: job.read_table(role, "scores.parquet") for role in nodes}


def efficiency(job: Job) -> dict[str, Efficiency]:
    """Costs by model name, of every upstream evaluate node; the teacher's size also where it was not evaluated."""
    found: dict[str, Efficiency] = {}
    for role in job.inputs:
        if role.startswith("evaluate."):
            own = job.summary(role, EvaluateSummary)
            found[role.partition(".")[2]] = Efficiency(parameters=own.parameters, bytes=own.bytes, tokens_per_second=own.tokens_per_second)
    teacher = job.summary("teacher", TeacherSummary)
    if "teacher" not in found and teacher.parameters is not None and teacher.bytes is not None:
        found["teacher"] = Efficiency(parameters=teacher.parameters, bytes=teacher.bytes, tokens_per_second=None)
    return found


def collect_evidence(job: Job, *, published_seed: int) -> Evidence:
    """Collect what the gate decides on, given the seed of the student that would be published."""
    scores = model_scores(job)
    return Evidence(
        scores=scores,
        efficiency=efficiency(job),
        suites=tuple(suite.name for suite in job.recipe.evaluation.suites),
        confidence=job.recipe.evaluation.confidence,
        published_seed=published_seed,
        champion="champion" if "champion" in scores else None,
    )


def gate_stage(job: Job) -> GateSummary:
    """Files: none; the verdict is in the summary."""
    student = least_validation_loss([job.inputs[f"student.{seed}"] for seed in job.recipe.seeds])
    seed = of(student, TrainSummary).seed
    verdict = decide(collect_evidence(job, published_seed=seed), job.recipe.gate)
    return GateSummary(
        promote=verdict.promote,
        headline=verdict.headline,
        reasons=verdict.reasons,
        student=StudentReference(student.stage, student.fingerprint, student.digest, seed),
        champion=seen_in(job.champion()),
    )
