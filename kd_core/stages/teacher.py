"""The stage that prepares the teacher: loads, trains or names it, and says what it is made of."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kd_core.fingerprint import fingerprint, sha256_bytes
from kd_core.recipe import Objective, Recipe, ServerTeacher, TrainedClassifier, TrainedTeacher
from kd_core.stages.job import Job
from kd_core.summaries import ServerIdentity, TeacherSummary
from kd_core.task_kinds import TaskKind, TaskModel, kind_of
from kd_core.task_kinds.generation import rows_tokenizer
from kd_core.teacher.models import pick_device
from kd_core.tokens.lengths import expect_enough, row_limit, used_rows
from kd_core.tokens.templates import check_template
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.history import to_jsonl
from kd_core.train.loop import train
from kd_core.train.row_order import MemoryRows, TrainingData

__all__ = ["teacher_stage"]


def teacher_stage(job: Job) -> TeacherSummary:
    """Files: model/ (of a pre-trained one only what reads its rows), metrics.jsonl of a trained one."""
    teacher = job.recipe.teacher
    if isinstance(teacher, ServerTeacher):
        check_template(rows_tokenizer(job.recipe), job.recipe.text_task)
        return TeacherSummary(ServerIdentity("server", teacher.model, teacher.revision), None, None, None, counts={}, training=None)
    kind = kind_of(job.recipe)
    if isinstance(teacher, TrainedTeacher | TrainedClassifier):
        return _train_teacher(job, kind, teacher)
    return _describe(kind, *kind.pretrained_teacher(job))


def _describe(kind: TaskKind, loaded: TaskModel, weights: Mapping[str, Any]) -> TeacherSummary:
    return TeacherSummary(
        teacher=kind.identity(loaded, weights),
        parameters=loaded.num_parameters,
        bytes=loaded.num_bytes,
        max_positions=loaded.max_positions,
        counts={},
        training=None,
    )


def _train_teacher(job: Job, kind: TaskKind, teacher: TrainedTeacher | TrainedClassifier) -> TeacherSummary:
    recipe: Recipe = job.recipe
    new = kind.new_teacher(job)
    loaded, model = new.model, new.model.model
    limit = row_limit(teacher.training, positions={"teacher": loaded.max_positions}, field="teacher.training")
    lengths = np.array([len(row.ids) for row in new.rows], np.int64)
    used = used_rows(lengths, np.array([row.num_supervised for row in new.rows], np.int64), limit)
    expect_enough(used, teacher.training, field="teacher.training")
    result = train(
        model,
        TrainingData(MemoryRows(new.rows), ()),
        num_columns=loaded.num_columns,
        training=teacher.training.model_copy(update={"max_tokens": limit.tokens}),
        objective=Objective(supervision="gold"),
        seed=recipe.seeds[0],
        run=recipe.run,
        checkpoints=Checkpoints(job.store, job.node.fingerprint, recipe.run.keep_checkpoints),
        tick=job.tick,
        reading=kind.reading(loaded),
    )
    model.to(pick_device(recipe.run.device)).eval().requires_grad_(False)
    kind.save(loaded, job.directory)
    (job.directory / "metrics.jsonl").write_text(to_jsonl(result.metrics))
    weights = {"training": job.node.fingerprint, "content": _weights_digest(model)}
    return replace(_describe(kind, loaded, weights), counts=new.counts, training=result.summary(num_rows=len(new.rows), used=used))


def _weights_digest(model: torch.nn.Module) -> str:
    """Digest of every weight's bytes, by name: 32 hex."""
    return fingerprint({n: sha256_bytes(p.detach().cpu().float().numpy().tobytes()) for n, p in model.state_dict().items()})
