"""The stage that prepares the teacher: loads, trains or names it, and says what it is made of."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from kd_core.fingerprint import fingerprint, sha256_bytes
from kd_core.prompts import collect_gold
from kd_core.recipe import Objective, PretrainedStudent, PretrainedTeacher, Recipe, ServerTeacher, TrainedTeacher
from kd_core.stages.job import Job
from kd_core.student.make import new_model
from kd_core.summaries import ServerIdentity, TeacherSummary
from kd_core.teacher.models import LoadedModel, load_directory, load_model, load_tokenizer, pick_device, save_model, teacher_identity
from kd_core.teacher.reference import reference_identity
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import character_tokenizer, encode_gold, encode_prompt
from kd_core.tokens.lengths import expect_enough, row_limit, used_rows
from kd_core.tokens.templates import check_template
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.history import to_jsonl
from kd_core.train.loop import train
from kd_core.train.row_order import MemoryRows, TrainingData

__all__ = ["load_teacher", "rows_tokenizer", "teacher_stage"]


def rows_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer in which rows are written, from its source: the teacher's, or the student's beside a server teacher.

    Raises:
        TeacherError: it cannot be loaded.
    """
    if isinstance(recipe.teacher, TrainedTeacher):
        return character_tokenizer(recipe.teacher.tokenizer)
    if isinstance(recipe.teacher, PretrainedTeacher):
        return load_tokenizer(recipe.teacher)
    assert isinstance(recipe.student, PretrainedStudent), "the recipe allows no other student beside a server teacher"
    return load_tokenizer(recipe.student)


def teacher_stage(job: Job) -> TeacherSummary:
    """Files: model/ (of a pre-trained one only the tokenizer), metrics.jsonl of a trained one."""
    teacher = job.recipe.teacher
    if isinstance(teacher, ServerTeacher):
        check_template(rows_tokenizer(job.recipe), job.recipe.task)
        return TeacherSummary(ServerIdentity("server", teacher.model, teacher.revision), None, None, None, counts={}, training=None)
    if isinstance(teacher, TrainedTeacher):
        return _train_teacher(job, teacher)
    device = pick_device(job.recipe.run.device)
    tokenizer = load_tokenizer(teacher)
    check_template(tokenizer, job.recipe.task)
    loaded = load_model(teacher, device=device, tokenizer=tokenizer)
    tokenizer.save_pretrained(job.directory / "model")
    return _describe(loaded, reference_identity(teacher))


def _describe(loaded: LoadedModel, weights: Mapping[str, Any]) -> TeacherSummary:
    return TeacherSummary(
        teacher=teacher_identity(loaded, weights),
        parameters=loaded.num_parameters,
        bytes=loaded.num_bytes,
        max_positions=loaded.max_positions,
        counts={},
        training=None,
    )


def _train_teacher(job: Job, teacher: TrainedTeacher) -> TeacherSummary:
    recipe, seed = job.recipe, job.recipe.seeds[0]
    gold, counts = collect_gold(
        teacher.sources,
        task=recipe.task,
        split=recipe.prompts.split,
        suites=recipe.evaluation.suites,
        max_characters=recipe.prompts.max_characters,
        s3=recipe.run.s3,
    )
    tokenizer = character_tokenizer(teacher.tokenizer)
    check_template(tokenizer, recipe.task)
    model = new_model(teacher.architecture, tokenizer, seed=seed)
    rows = [_token_row(tokenizer, recipe, row) for row in gold.to_pylist()]
    device = pick_device(recipe.run.device)
    loaded = LoadedModel(model, tokenizer, model.config.vocab_size)
    limit = row_limit(teacher.training, positions={"teacher": loaded.max_positions}, field="teacher.training")
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    used = used_rows(lengths, np.array([row.num_supervised for row in rows], np.int64), limit)
    expect_enough(used, teacher.training, field="teacher.training")
    result = train(
        model,
        TrainingData(MemoryRows(rows), ()),
        num_columns=loaded.num_columns,
        training=teacher.training.model_copy(update={"max_tokens": limit.tokens}),
        objective=Objective(supervision="gold"),
        seed=seed,
        run=recipe.run,
        checkpoints=Checkpoints(job.store, job.node.fingerprint, recipe.run.keep_checkpoints),
        tick=job.tick,
    )
    model.to(device).eval().requires_grad_(False)
    save_model(loaded, job.directory)
    (job.directory / "metrics.jsonl").write_text(to_jsonl(result.metrics))
    weights = {"training": job.node.fingerprint, "content": _weights_digest(model)}
    return replace(_describe(loaded, weights), counts=counts, training=result.summary(num_rows=len(rows), used=used))


def _token_row(tokenizer: Any, recipe: Recipe, row: dict[str, Any]) -> TokenRow:
    prompt_ids = encode_prompt(tokenizer, row["prompt"], recipe.task)
    gold_ids = encode_gold(tokenizer, row["gold"], recipe.task, prompt_ids=prompt_ids)
    return TokenRow((*prompt_ids, *gold_ids), len(prompt_ids))


def _weights_digest(model: torch.nn.Module) -> str:
    """Digest of every weight's bytes, by name: 32 hex."""
    return fingerprint({n: sha256_bytes(p.detach().cpu().float().numpy().tobytes()) for n, p in model.state_dict().items()})


def load_teacher(job: Job) -> LoadedModel:
    """The teacher behind the job's upstream 'teacher', ready to run.

    Raises:
        TeacherError: it cannot be loaded here.
    """
    teacher = job.recipe.teacher
    device = pick_device(job.recipe.run.device)
    with job.files(job.inputs["teacher"]) as files:
        tokenizer = load_tokenizer(files / "model", trust_remote_code=job.recipe.trusts_code)
        if isinstance(teacher, PretrainedTeacher):
            return load_model(teacher, device=device, tokenizer=tokenizer)
        return load_directory(files / "model", device=device, tokenizer=tokenizer)
