"""The stage in which the teacher answers prompts.

Answers are kept by row, not by stage: a recipe with more prompts, or another objective, finds the rows that are there
and pays for the others only.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from kd_core.errors import RecipeError
from kd_core.fingerprint import fingerprint
from kd_core.recipe import Answers, ServerTeacher
from kd_core.rows.keys import about_answers, answer_rows
from kd_core.rows.schemas import ANSWER_SCHEMA
from kd_core.rows.table import RowCache
from kd_core.rows.work import Packed, work_in_shards
from kd_core.stages.job import Job
from kd_core.stages.sharded import Progress, frozen_rows, sharded_rows
from kd_core.summaries import AnswersSummary
from kd_core.task_kinds.generation import load_text_teacher, rows_tokenizer
from kd_core.teacher.generate import generate
from kd_core.teacher.models import LoadedModel, load_tokenizer
from kd_core.teacher.replies import ServerAnswer
from kd_core.teacher.server import Session, answer_prompts
from kd_core.tokens.encoding import decode_answer, encode_prompt
from kd_core.tokens.templates import check_template

__all__ = ["answers_stage", "read_answers"]

_LOG = logging.getLogger(__name__)


_KEPT_TOGETHER = 64
_KEPT_WITHIN_SECONDS = 30.0
"""A server's answers are committed when there are so many, or the last commit is so long ago: what a kill can cost, beside requests in
flight."""

AnswerRequest = tuple[str, dict[str, Any]]  # row key, and what is asked


def answers_stage(job: Job) -> AnswersSummary:
    """Files: keys.parquet, the rows of the row store of answers that belong to this recipe; failed.parquet, rows that a server
    failed on, if there are any.

    Raises:
        TeacherError: more rows failed than run.max_failed_answers allows.
    """
    recipe = job.recipe
    answers = recipe.answers
    assert answers is not None, "a recipe without answers has no such node"
    rows = answer_rows(recipe, answers, job.inputs["teacher"], job.read_table("prompts", "prompts.parquet"))
    about = about_answers(recipe, answers, job.inputs["teacher"])
    cache = RowCache(job.store, "answers", fingerprint(about))
    cache.describe(about)
    progress = Progress(job, len(dict(rows)), "answers")
    engine, run = _engine(job, answers, cache, rows, progress), recipe.run
    ordered = engine.order(rows)
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
    failed = [row for key, row in engine.failed.items() if key not in snapshot.lines]
    gone = {row["key"] for row in failed}
    keys = [key for key, _ in rows if key not in gone]
    table = cache.read(snapshot, keys)
    job.write_table("keys.parquet", pa.table({"key": keys}))
    reasons = {r["values"]: r["counts"] for r in table["finish_reason"].value_counts().to_pylist()}
    if failed:
        job.write_table("failed.parquet", _answer_table(failed))
        reasons["error"] = len(failed)
        what = "%d of %d answers failed and are left out, the first: %s; a recipe with other prompts or samples asks for them again"
        _LOG.warning(what, len(failed), len(rows), failed[0]["error"])
    tokens = int(sum(len(ids) for ids in table["answer_ids"].to_pylist()))
    return AnswersSummary(sharded_rows(cache, snapshot, keys, computed - len(failed)), tokens, reasons)


def _engine(
    job: Job, answers: Answers, cache: RowCache, rows: Sequence[AnswerRequest], progress: Progress
) -> "_LocalEngine | _ServerEngine":
    teacher = job.recipe.teacher
    if not isinstance(teacher, ServerTeacher):
        return _LocalEngine(job, answers, progress)
    allowed = math.floor(job.recipe.run.max_failed_answers * len(rows))
    held = cache.snapshot().lines
    session = Session(proven=any(key in held for key, _ in rows), max_failed=allowed)
    return _ServerEngine(job, teacher, answers, session=session, keep=lambda rows: cache.commit(rows, num_tokens=0), progress=progress)


def _packed_answers(rows: pa.Table) -> Packed:
    return Packed(rows, sum(len(ids) for ids in rows["answer_ids"].to_pylist()))


class _LocalEngine:
    """The transformers teacher answering shards; loaded at the first shard, so a full cache loads nothing."""

    def __init__(self, job: Job, answers: Answers, progress: Progress) -> None:
        self.job, self.answers, self.progress = job, answers, progress
        self._loaded: LoadedModel | None = None
        self.failed: dict[str, dict[str, Any]] = {}  # it answers every row
        with job.files(job.inputs["teacher"]) as files:
            self.tokenizer = load_tokenizer(files / "model", trust_remote_code=job.recipe.trusts_code)

    def order(self, rows: list[AnswerRequest]) -> list[AnswerRequest]:
        """Prompts of like length share a batch: padding is waste."""
        for _, row in rows:
            row["prompt_ids"] = encode_prompt(self.tokenizer, row["prompt"], self.job.recipe.text_task)
        return sorted(rows, key=lambda item: (len(item[1]["prompt_ids"]), item[0]))

    def answer(self, shard: list[AnswerRequest]) -> pa.Table:
        self._loaded = self._loaded or load_text_teacher(self.job)
        out: list[dict[str, Any]] = []
        step = self.job.recipe.run.generate_rows
        for start in range(0, len(shard), step):
            part = shard[start : start + step]
            prompts, keys = [row["prompt_ids"] for _, row in part], [key for key, _ in part]
            found = generate(self._loaded, prompts, keys=keys, answers=self.answers, on_tokens=lambda n: self.progress.made(n, "tokens"))
            for (key, row), answer in zip(part, found, strict=True):
                text = decode_answer(self.tokenizer, answer.ids, prompt_ids=row["prompt_ids"])
                said = {"answer_ids": answer.ids, "text": text, "finish_reason": answer.finish_reason, "error": None}
                out.append({"key": key, **{n: row[n] for n in ("prompt_id", "sample_index", "prompt_ids")}, **said})
        return pa.Table.from_pylist(out, schema=ANSWER_SCHEMA)


class _ServerEngine:
    """A server teacher answering shards. Answers are committed as they come; a failed row is kept apart, with its reason."""

    def __init__(
        self,
        job: Job,
        teacher: ServerTeacher,
        answers: Answers,
        *,
        session: Session,
        keep: Callable[[pa.Table], object],
        progress: Progress,
    ) -> None:
        if job.recipe.run.teacher_url is None:
            raise RecipeError("run.teacher_url: a server teacher needs its address; add --set run.teacher_url=http://host:port/v1")
        self.job, self.teacher, self.answers, self.url = job, teacher, answers, job.recipe.run.teacher_url
        self.session, self.keep, self.kept_at, self.progress = session, keep, time.monotonic(), progress
        self.failed: dict[str, dict[str, Any]] = {}

    def order(self, rows: list[AnswerRequest]) -> list[AnswerRequest]:
        """Put every prompt's first sample before every second: the first failures are those of different prompts.

        Prompts that the student cannot read stop the run before any is paid for.
        """
        tokenizer = rows_tokenizer(self.job.recipe)
        check_template(tokenizer, self.job.recipe.text_task)
        for prompt in {row["prompt"] for _, row in rows}:
            encode_prompt(tokenizer, prompt, self.job.recipe.text_task)
        return sorted(rows, key=lambda item: item[1]["sample_index"])

    def answer(self, shard: list[AnswerRequest]) -> pa.Table:
        """The last answers of the shard: those that are not committed yet."""
        waiting: list[dict[str, Any]] = []

        def done(found: tuple[int, ServerAnswer]) -> None:
            (key, row), answer = shard[found[0]], found[1]
            self.progress.made(1, "answers")
            said: dict[str, Any] = {"answer_ids": [], "text": answer.text, "finish_reason": answer.finish_reason, "error": answer.error}
            full = {"key": key, "prompt_id": row["prompt_id"], "sample_index": row["sample_index"], "prompt_ids": [], **said}
            if answer.error is not None:
                self.failed[key] = full
                return
            waiting.append(full)
            if len(waiting) == _KEPT_TOGETHER or time.monotonic() - self.kept_at >= _KEPT_WITHIN_SECONDS:
                rows, waiting[:], self.kept_at = waiting.copy(), (), time.monotonic()
                self.keep(_answer_table(rows))

        try:
            answer_prompts(
                self.teacher,
                url=self.url,
                prompts=[(row["prompt"], row["sample_index"]) for _, row in shard],
                answers=self.answers,
                task=self.job.recipe.text_task,
                seed=self.job.recipe.seeds[0],
                concurrency=self.job.recipe.run.teacher_concurrency,
                on_done=done,
                session=self.session,
            )
        except BaseException:
            if waiting:
                self.keep(_answer_table(waiting))
            raise
        return _answer_table(waiting)


def _answer_table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA)


def read_answers(job: Job) -> pa.Table:
    """Read all answers of the upstream 'answers' node, verified: in prompt order, and then the rows that failed."""
    cache, snapshot = frozen_rows(job, "answers")
    found = cache.read(snapshot, job.read_table("answers", "keys.parquet")["key"].to_pylist())
    if "failed.parquet" not in {file.name for file in job.inputs["answers"].files}:
        return found
    return pa.concat_tables([found, job.read_table("answers", "failed.parquet").cast(found.schema)])
