"""Stages in which the teacher works: prepare it, let it answer. What it says of tokens is ``scoring``'s business.

Answers are kept by row, not by stage: a recipe with more prompts, or another objective, finds the rows that are there
and pays for the others only.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch

from kd_core.errors import RecipeError, TeacherError
from kd_core.fingerprint import fingerprint, sha256_bytes
from kd_core.progress import Tick
from kd_core.prompts import collect_gold
from kd_core.recipe import Answers, Objective, PretrainedTeacher, Recipe, ServerTeacher, TrainedTeacher
from kd_core.row_keys import about_answers, answer_rows
from kd_core.row_schemas import ANSWER_SCHEMA
from kd_core.shard_work import Packed, work_in_shards
from kd_core.shards import RowCache, Snapshot
from kd_core.stages.job import Job
from kd_core.student.make import new_model
from kd_core.teacher.generate import generate
from kd_core.teacher.models import LoadedModel, load_directory, load_model, load_tokenizer, pick_device, save_model, teacher_identity
from kd_core.teacher.reference import reference_identity
from kd_core.teacher.server import answer_prompts
from kd_core.tokens import character_tokenizer, decode_answer, encode_gold, encode_prompt
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.data import MemoryRows, TokenRow, TrainingData
from kd_core.train.history import to_jsonl
from kd_core.train.loop import train

__all__ = ["Progress", "answers_stage", "frozen_rows", "load_teacher", "read_answers", "sharded_summary", "teacher_stage"]

# ---------------------------------------------------------------------------------------------- the teacher itself


def teacher_stage(job: Job) -> dict[str, Any]:
    """Files: model/ (of a pre-trained one only the tokenizer), metrics.jsonl of a trained one. Summary: its content identity and size."""
    teacher = job.recipe.teacher
    if isinstance(teacher, ServerTeacher):
        return {"teacher": {"engine": "server", "model": teacher.model, "revision": teacher.revision}, "parameters": None, "bytes": None}
    if isinstance(teacher, TrainedTeacher):
        return _train_teacher(job, teacher)
    device = pick_device(job.recipe.run.device)
    tokenizer = load_tokenizer(teacher)
    loaded = load_model(teacher, device=device, tokenizer=tokenizer, trust_remote_code=teacher.trust_remote_code)
    tokenizer.save_pretrained(job.directory / "model")
    return _describe(loaded, reference_identity(teacher))


def _describe(loaded: LoadedModel, weights: dict[str, Any]) -> dict[str, Any]:
    sizes = {"parameters": loaded.num_parameters, "bytes": loaded.num_bytes}
    return {"teacher": teacher_identity(loaded, weights), **sizes}


def _train_teacher(job: Job, teacher: TrainedTeacher) -> dict[str, Any]:
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
    model = new_model(teacher.architecture, tokenizer, seed=seed)
    rows = [_token_row(tokenizer, recipe, row) for row in gold.to_pylist()]
    device = pick_device(recipe.run.device)
    loaded = LoadedModel(model, tokenizer, model.config.vocab_size)
    result = train(
        model,
        TrainingData(MemoryRows(rows), ()),
        num_columns=loaded.num_columns,
        training=teacher.training,
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
    learnt = {
        "rows": len(rows),
        "rows_too_long": result.rows_too_long,
        "counts": counts,
        "supervised_tokens": result.supervised_tokens,
        "resumed_from": result.resumed_from,
        "speed": result.speed,
    }
    return {**_describe(loaded, weights), **learnt, "training_seconds": result.seconds}


def _token_row(tokenizer: Any, recipe: Recipe, row: dict[str, Any]) -> TokenRow:
    prompt_ids = encode_prompt(tokenizer, row["prompt"], recipe.task)
    return TokenRow((*prompt_ids, *encode_gold(tokenizer, row["gold"], prompt_ids=prompt_ids)), len(prompt_ids))


def _weights_digest(model: torch.nn.Module) -> str:
    """32 hex over every weight's bytes, by name."""
    return fingerprint({n: sha256_bytes(p.detach().cpu().float().numpy().tobytes()) for n, p in model.state_dict().items()})


def load_teacher(job: Job) -> LoadedModel:
    """The teacher behind the job's upstream 'teacher', ready to run.

    Raises:
        TeacherError: it cannot be loaded here.
    """
    teacher = job.recipe.teacher
    device = pick_device(job.recipe.run.device)
    with job.files(job.inputs["teacher"]) as files:
        tokenizer = load_tokenizer(files / "model")
        if isinstance(teacher, PretrainedTeacher):
            return load_model(teacher, device=device, tokenizer=tokenizer, trust_remote_code=teacher.trust_remote_code)
        return load_directory(files / "model", device=device, tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------- answers

AnswerRequest = tuple[str, dict[str, Any]]  # row key, and what is asked


def answers_stage(job: Job) -> dict[str, Any]:
    """Files: keys.parquet, the rows of the shared answer table that belong to this recipe. Summary: counts and rates."""
    recipe = job.recipe
    answers = recipe.answers
    assert answers is not None, "a recipe without answers has no such node"
    rows = answer_rows(recipe, answers, job.inputs["teacher"], job.read_table("prompts", "prompts.parquet"))
    about = about_answers(recipe, answers, job.inputs["teacher"])
    cache = RowCache(job.store, "answers", fingerprint(about))
    cache.describe(about)
    progress = Progress(job, len(dict(rows)), "answers")
    teacher = recipe.teacher
    engine = _ServerEngine(job, teacher, answers) if isinstance(teacher, ServerTeacher) else _LocalEngine(job, answers)
    ordered, run = engine.order(rows), recipe.run
    snapshot, computed = work_in_shards(
        cache,
        lambda: ordered,
        engine.answer,
        _packed_answers,
        shard_rows=run.shard_rows,
        done=progress,
        worker=run.worker,
        num_workers=run.num_workers,
    )
    keys = [key for key, _ in rows]
    table = cache.read(snapshot, keys)
    job.write_table("keys.parquet", pa.table({"key": keys}))
    reasons = {r["values"]: r["counts"] for r in table["finish_reason"].value_counts().to_pylist()}
    tokens = int(sum(len(ids) for ids in table["answer_ids"].to_pylist()))
    return {**sharded_summary(cache, snapshot, keys, computed), "tokens": tokens, "finish_reasons": reasons}


def _packed_answers(rows: pa.Table) -> Packed:
    return Packed(rows, sum(len(ids) for ids in rows["answer_ids"].to_pylist()))


def sharded_summary(cache: RowCache, snapshot: Snapshot, keys: Sequence[str], computed: int) -> dict[str, Any]:
    """What a record says of rows in shards; it freezes the shards that hold them."""
    own = snapshot.of(keys)
    commits = [commit.sha256 for commit in own.commits]
    return {"rows": len(keys), "rows_computed": computed, "namespace": cache.namespace, "bytes": own.size_bytes(), "commits": commits}


def frozen_rows(job: Job, role: str) -> tuple[RowCache, Snapshot]:
    """The growing table behind an upstream node, and the shards that its record froze.

    Raises:
        QuarantinedError: one of them is gone.
    """
    record = job.inputs[role]
    cache = RowCache(job.store, record.stage, record.summary["namespace"])
    return cache, cache.snapshot().frozen(record.summary["commits"])


class Progress:
    """Adds up finished rows and ticks."""

    def __init__(self, job: Job, total: int, unit: str) -> None:
        self.job, self.total, self.unit, self.done = job, total, unit, 0

    def __call__(self, rows: int) -> None:
        self.done += rows
        self.job.tick(Tick(self.done, self.total, self.unit))


class _LocalEngine:
    """The transformers teacher answering shards; loaded at the first shard, so a full cache loads nothing."""

    def __init__(self, job: Job, answers: Answers) -> None:
        self.job, self.answers = job, answers
        self._loaded: LoadedModel | None = None
        with job.files(job.inputs["teacher"]) as files:
            self.tokenizer = load_tokenizer(files / "model")

    def order(self, rows: list[AnswerRequest]) -> list[AnswerRequest]:
        """Prompts of like length share a batch: padding is waste."""
        for _, row in rows:
            row["prompt_ids"] = encode_prompt(self.tokenizer, row["prompt"], self.job.recipe.task)
        return sorted(rows, key=lambda item: (len(item[1]["prompt_ids"]), item[0]))

    def answer(self, shard: list[AnswerRequest]) -> pa.Table:
        self._loaded = self._loaded or load_teacher(self.job)
        out: list[dict[str, Any]] = []
        step = self.job.recipe.run.generate_rows
        for start in range(0, len(shard), step):
            part = shard[start : start + step]
            found = generate(self._loaded, [row["prompt_ids"] for _, row in part], keys=[key for key, _ in part], answers=self.answers)
            for (key, row), answer in zip(part, found, strict=True):
                text = decode_answer(self.tokenizer, answer.ids, prompt_ids=row["prompt_ids"])
                said = {"answer_ids": answer.ids, "text": text, "finish_reason": answer.finish_reason, "error": None}
                out.append({"key": key, **{n: row[n] for n in ("prompt_id", "sample_index", "prompt_ids")}, **said})
        return pa.Table.from_pylist(out, schema=ANSWER_SCHEMA)


class _ServerEngine:
    """A server teacher answering shards. A prompt it refuses is a row with its reason; a shard with no answer at all is an error."""

    def __init__(self, job: Job, teacher: ServerTeacher, answers: Answers) -> None:
        if job.recipe.run.teacher_url is None:
            raise RecipeError("run.teacher_url: a server teacher needs its address; add --set run.teacher_url=http://host:port/v1")
        self.job, self.teacher, self.answers, self.url = job, teacher, answers, job.recipe.run.teacher_url

    def order(self, rows: list[AnswerRequest]) -> list[AnswerRequest]:
        """As they are: the server makes its own batches."""
        return rows

    def answer(self, shard: list[AnswerRequest]) -> pa.Table:
        found = answer_prompts(
            self.teacher,
            url=self.url,
            prompts=[(row["prompt"], row["sample_index"]) for _, row in shard],
            answers=self.answers,
            task=self.job.recipe.task,
            seed=self.job.recipe.seeds[0],
            concurrency=self.job.recipe.run.teacher_concurrency,
            on_done=lambda _: None,
        )
        if all(answer.finish_reason == "error" for answer in found):
            raise TeacherError(f"the teacher at {self.url} answered none of {len(found)} prompts; it says: {found[0].error}")
        out = []
        for (key, row), answer in zip(shard, found, strict=True):
            said: dict[str, Any] = {"answer_ids": [], "text": answer.text, "finish_reason": answer.finish_reason, "error": answer.error}
            out.append({"key": key, "prompt_id": row["prompt_id"], "sample_index": row["sample_index"], "prompt_ids": [], **said})
        return pa.Table.from_pylist(out, schema=ANSWER_SCHEMA)


def read_answers(job: Job) -> pa.Table:
    """All answers of the upstream 'answers' node, in prompt order, verified."""
    cache, snapshot = frozen_rows(job, "answers")
    return cache.read(snapshot, job.read_table("answers", "keys.parquet")["key"].to_pylist())
