"""Stages in which the teacher works: prepare it, let it answer. What it says of tokens is ``scoring``'s business.

Answers are kept by row, not by stage: a recipe with more prompts, or another objective, finds the rows that are there
and pays for the others only.
"""

from typing import Any

import pyarrow as pa

from kd_core.errors import RecipeError, TeacherError
from kd_core.fingerprint import fingerprint
from kd_core.recipe import Answers, ServerTeacher
from kd_core.rows.keys import about_answers, answer_rows
from kd_core.rows.schemas import ANSWER_SCHEMA
from kd_core.rows.table import RowCache
from kd_core.rows.work import Packed, work_in_shards
from kd_core.stages.job import Job
from kd_core.stages.sharded import Progress, frozen_rows, sharded_summary
from kd_core.stages.teacher import load_teacher, rows_tokenizer
from kd_core.teacher.generate import generate
from kd_core.teacher.models import LoadedModel, load_tokenizer
from kd_core.teacher.server import answer_prompts
from kd_core.tokens.encoding import encode_prompt
from kd_core.tokens.templates import check_template

__all__ = ["answers_stage", "read_answers"]


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


class _LocalEngine:
    """The transformers teacher answering shards; loaded at the first shard, so a full cache loads nothing."""

    def __init__(self, job: Job, answers: Answers) -> None:
        self.job, self.answers = job, answers
        self._loaded: LoadedModel | None = None
        with job.files(job.inputs["teacher"]) as files:
            self.tokenizer = load_tokenizer(files / "model", trust_remote_code=job.recipe.trusts_code)

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
                text = self.tokenizer.decode(answer.ids, skip_special_tokens=True)
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
        """As they are: the server makes its own batches. Prompts that the student cannot read stop the run before any is paid for."""
        tokenizer = rows_tokenizer(self.job.recipe)
        check_template(tokenizer, self.job.recipe.task)
        for prompt in {row["prompt"] for _, row in rows}:
            encode_prompt(tokenizer, prompt, self.job.recipe.task)
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
