"""The stage in which a model learns: the student, and the compared models that differ from it in one field."""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import TrainingError
from kd_core.recipe import Arm, PretrainedStudent, ServerTeacher, StudentFromConfig, StudentFromTeacher
from kd_core.shards import RowCache
from kd_core.softlabels.codec import decode
from kd_core.softlabels.targets import Targets
from kd_core.stages.job import Job
from kd_core.stages.teaching import load_teacher, token_rows
from kd_core.student.make import new_model, student_from_blocks
from kd_core.teacher.models import LoadedModel, load_model, load_tokenizer, pick_device, save_model
from kd_core.tokens import num_columns, tokenizer_identity
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.data import TrainingData
from kd_core.train.loop import train

__all__ = ["train_stage"]


def train_stage(job: Job) -> dict[str, Any]:
    """Files: model/ (Hugging Face layout), metrics.json. Summary: sizes, losses, tokens, seconds."""
    arm: Arm = job.node.group  # type: ignore[assignment]  # a train node's group is its arm
    recipe = job.recipe.arm(arm)
    seed = int(job.node.name.rpartition(".")[2])
    table = job.read_table("curate", "rows.parquet")
    if recipe.objective.supervision == "gold":
        table = table.filter(pc.equal(table["source"], "gold"))
        if not table.num_rows:
            raise TrainingError(
                f"{job.node.name}: no row has a gold answer; give prompts.sources a gold template, or drop baseline from evaluation.compare"
            )
    validation = token_rows(job.read_table("curate", "validation.parquet"))
    student = _make_student(job, seed)
    checkpoints = Checkpoints(job.store, job.node.fingerprint)
    data = TrainingData(token_rows(table), _read_targets(job, table) if "soft_labels" in job.inputs else None, validation)
    result = train(
        student.model,
        data,
        num_columns=student.num_columns,
        training=recipe.training,
        objective=recipe.objective,
        seed=seed,
        run=recipe.run,
        checkpoints=checkpoints,
        tick=job.tick,
    )
    save_model(student, job.directory)
    (job.directory / "metrics.json").write_text(json.dumps(result.metrics))
    return {
        "arm": arm,
        "seed": seed,
        "rows": table.num_rows,
        "rows_too_long": result.rows_too_long,
        "steps": recipe.training.steps,
        "parameters": student.num_parameters,
        "bytes": student.num_bytes,
        "validation_nll": result.validation_nll,
        "supervised_tokens": result.supervised_tokens,
        "final": result.metrics[-1],
        "resumed_from": result.resumed_from,
        "training_seconds": result.seconds,
    }


def _make_student(job: Job, seed: int) -> LoadedModel:
    spec = job.recipe.student
    if isinstance(spec, StudentFromTeacher):
        teacher = load_teacher(job)
        return LoadedModel(student_from_blocks(teacher, spec.every_nth_block), teacher.tokenizer, teacher.num_columns)
    if isinstance(spec, StudentFromConfig):
        with job.files(job.inputs["teacher"]) as files:
            tokenizer = load_tokenizer(files / "model")
        return LoadedModel(new_model(spec.architecture, tokenizer, seed=seed), tokenizer, num_columns(tokenizer))
    return _pretrained_student(job, spec)


def _pretrained_student(job: Job, spec: PretrainedStudent) -> LoadedModel:
    tokenizer = load_tokenizer(spec)
    if not isinstance(job.recipe.teacher, ServerTeacher):
        theirs, ours = job.summary("teacher")["teacher"]["tokenizer"], tokenizer_identity(tokenizer)
        if (theirs["vocabulary"], theirs["probe"]) != (ours["vocabulary"], ours["probe"]):
            raise TrainingError("teacher and student have different tokenizers; use a student with the teacher's tokenizer")
    loaded = load_model(spec, device=pick_device("cpu"), tokenizer=tokenizer)
    loaded.model.float().requires_grad_(True)
    return loaded


def _read_targets(job: Job, table: pa.Table) -> Callable[[int], Targets]:
    """Soft labels of curated row i, decoded when a step asks for them; every row has some, or this raises."""
    record = job.inputs["soft_labels"]
    cache = RowCache(job.store, "soft_labels", record.summary["namespace"])
    keys = job.read_table("soft_labels", "keys.parquet")["key"].to_pylist()
    found = cache.read(cache.snapshot(), keys)
    if token_rows(found) != token_rows(table):
        raise TrainingError("soft labels and curated rows disagree on token ids; run the recipe again, or check the store with kd doctor")
    blobs: list[bytes] = found["targets"].to_pylist()
    return lambda i: decode(blobs[i])
