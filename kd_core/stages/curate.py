"""The stage that chooses the rows from which the student learns: verified answers and worked gold."""

from typing import Any

import pyarrow as pa

from kd_core.curate import curate_answers, gold_rows
from kd_core.errors import TrainingError
from kd_core.progress import Tick
from kd_core.recipe import PretrainedStudent, ServerTeacher
from kd_core.stages.answers import read_answers
from kd_core.stages.job import Job
from kd_core.summaries import CurateSummary
from kd_core.teacher.models import load_tokenizer
from kd_core.tokens.encoding import encode_answer, encode_gold, encode_prompt

__all__ = ["ROW_SCHEMA", "curate_stage"]

ROW_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # 'teacher' or 'gold'
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("ids", pa.list_(pa.int32()), nullable=False),
        pa.field("first_supervised", pa.int32(), nullable=False),
    ]
)


def curate_stage(job: Job) -> CurateSummary:
    """Files: rows.parquet (what is learnt), rejected.parquet (with reasons), validation.parquet."""
    recipe = job.recipe
    prompts = job.read_table("prompts", "prompts.parquet")
    with job.files(job.inputs["teacher"]) as files:
        if isinstance(recipe.teacher, ServerTeacher) and isinstance(recipe.student, PretrainedStudent):
            tokenizer = load_tokenizer(recipe.student)
        else:
            tokenizer = load_tokenizer(files / "model", trust_remote_code=recipe.trusts_code)
    counts: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    if "answers" in job.inputs:
        curated = curate_answers(read_answers(job), prompts, curate=recipe.curate, task=recipe.task)
        job.write_table("rejected.parquet", curated.rejected)
        counts.update(curated.counts)
        text_of = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
        for row in curated.kept.to_pylist():
            prompt_ids = row["prompt_ids"] or encode_prompt(tokenizer, text_of[row["prompt_id"]], recipe.task)
            ended = row["finish_reason"] == "stop"
            ids = row["answer_ids"] or encode_answer(tokenizer, row["text"], ended=ended, task=recipe.task, prompt_ids=prompt_ids)
            rows.append(_row(row["prompt_id"], "teacher", row["sample_index"], row["finish_reason"], row["text"], prompt_ids, ids))
    gold = [_gold_row(tokenizer, row, job) for row in gold_rows(prompts, limit=recipe.curate.gold_rows).to_pylist()]
    validation = [_gold_row(tokenizer, row, job) for row in prompts.to_pylist() if row["split"] == "validation" and row["gold"]]
    rows.extend(gold)
    if not rows:
        raise TrainingError(f"curate: no row is left to learn from: {counts}; allow gold rows, or look into why answers were rejected")
    job.write_table("rows.parquet", pa.Table.from_pylist(rows, schema=ROW_SCHEMA))
    job.write_table("validation.parquet", pa.Table.from_pylist(validation, schema=ROW_SCHEMA))
    tokens = sum(len(row["ids"]) - row["first_supervised"] for row in rows)
    job.tick(Tick(len(rows), len(rows), "rows"))
    counts.update({"gold": len(gold), "validation": len(validation)})
    return CurateSummary(len(rows), tokens, sum(len(row["ids"]) for row in rows), counts)


def _gold_row(tokenizer: Any, row: dict[str, Any], job: Job) -> dict[str, Any]:
    prompt_ids = encode_prompt(tokenizer, row["prompt"], job.recipe.task)
    gold_ids = encode_gold(tokenizer, row["gold"], job.recipe.task, prompt_ids=prompt_ids)
    return _row(row["prompt_id"], "gold", 0, "stop", row["gold"], prompt_ids, gold_ids)


def _row(prompt_id: str, source: str, sample: int, reason: str, text: str, prompt_ids: list[int], answer_ids: list[int]) -> dict[str, Any]:
    ids = {"ids": [*prompt_ids, *answer_ids], "first_supervised": len(prompt_ids)}
    return {"prompt_id": prompt_id, "source": source, "sample_index": sample, "finish_reason": reason, "text": text, **ids}
