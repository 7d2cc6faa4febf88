"""Which rows the student learns from: faults found in Python, then one query that gives every row its reason.

Every answer ends in exactly one of two tables, kept or rejected, in the order (prompt_id, sample_index). Nothing is
dropped without a reason and a count.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from kd_core.curate.thoughts import is_run_on, leaves_thought_open
from kd_core.curate.verifier import judge
from kd_core.errors import ArtifactError
from kd_core.recipe import Curate, Task

__all__ = ["Curated", "Reason", "curate_answers", "gold_rows"]

Fault = Literal["open_thought", "run_on", "wrong", "undecided"]
Reason = Literal["error", "empty", "truncated", "open_thought", "run_on", "no_reference", "wrong", "undecided", "duplicate", "over_limit"]
"""Why an answer is not kept. open_thought: it ends inside its thought. run_on: it goes on to another question. undecided: it
or its reference cannot be read, or they could not be compared."""

_REASONS = """
WITH judged AS (
    SELECT
        answers.row,
        answers.prompt_id,
        answers.sample_index,
        answers.key,
        answers.text,
        CASE
            WHEN answers.finish_reason = 'error' THEN 'error'
            WHEN NOT regexp_matches(answers.text, '\\S') THEN 'empty'
            WHEN answers.finish_reason = 'length' AND NOT $keep_truncated THEN 'truncated'
            WHEN faults.fault IN ('open_thought', 'run_on') THEN faults.fault
            WHEN $verify AND prompts.reference IS NULL AND NOT $keep_unverified THEN 'no_reference'
            ELSE faults.fault
        END AS reason
    FROM answers
    JOIN prompts USING (prompt_id)
    JOIN faults USING (row)
),
first_of_text AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY prompt_id, text, reason IS NULL ORDER BY sample_index, key) AS copy
    FROM judged
),
ranked AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY prompt_id, reason IS NULL AND copy = 1 ORDER BY sample_index, key) AS place
    FROM first_of_text
)
SELECT
    row,
    CASE
        WHEN reason IS NOT NULL THEN reason
        WHEN copy > 1 THEN 'duplicate'
        WHEN place > $max_answers_per_prompt THEN 'over_limit'
    END AS reason
FROM ranked
ORDER BY prompt_id, sample_index, key
"""


@dataclass(frozen=True)
class Curated:
    """The two halves of all answers, each ordered by (prompt_id, sample_index).

    Attributes:
        kept: the answers' own columns.
        rejected: key, prompt_id, sample_index, text, reason (see Reason).
        counts: read, kept, and one number a reason; read = kept + all reasons.
    """

    kept: pa.Table
    rejected: pa.Table
    counts: dict[str, int]


def curate_answers(answers: pa.Table, prompts: pa.Table, *, curate: Curate, task: Task) -> Curated:
    """Keep the answers a student may learn from, and say of every other one why not.

    The first reason that holds counts, in the order of Reason. Of equal texts for one prompt the lowest sample_index stays.

    Args:
        answers: key, prompt_id, sample_index, text, finish_reason ('stop', 'length' or 'error') and any further columns.
        prompts: PROMPT_SCHEMA; its references verify the answers.
        curate: the recipe's curation.
        task: the recipe's task: marker and verifier.

    Raises:
        ArtifactError: a key stands twice, an answer belongs to no prompt, or its finish_reason is unknown.
    """
    _check(answers, prompts)
    numbered = answers.append_column("row", pa.array(range(answers.num_rows), pa.int64()))
    with duckdb.connect() as connection:
        connection.execute("SET enable_progress_bar = false")
        connection.register("answers", numbered.select(["row", "key", "prompt_id", "sample_index", "text", "finish_reason"]))
        connection.register("prompts", prompts.select(["prompt_id", "reference"]))
        connection.register("faults", _faults(answers, prompts, curate=curate, task=task))
        parameters = {
            "keep_truncated": curate.keep_truncated,
            "keep_unverified": curate.keep_unverified,
            "verify": curate.verify,
            "max_answers_per_prompt": curate.max_answers_per_prompt,
        }
        decided: pa.Table = connection.sql(_REASONS, params=parameters).to_arrow_table()
    is_kept = pc.is_null(decided["reason"])
    kept = answers.take(decided.filter(is_kept)["row"])
    refused = decided.filter(pc.invert(is_kept))
    rejected = answers.select(["key", "prompt_id", "sample_index", "text"]).take(refused["row"]).append_column("reason", refused["reason"])
    assert decided.num_rows == answers.num_rows == len(pc.unique(decided["row"])), "every answer has exactly one decision"
    reasons = Counter(refused["reason"].to_pylist())
    counts = {"read": answers.num_rows, "kept": kept.num_rows, **{reason: reasons[reason] for reason in get_args(Reason)}}
    return Curated(kept, rejected, counts)


def gold_rows(prompts: pa.Table, *, limit: int | None) -> pa.Table:
    """The first `limit` training prompts with a worked gold answer, by prompt_id; None: all of them.

    Args:
        prompts: PROMPT_SCHEMA.
        limit: rows; 0 gives none.
    """
    chosen = prompts.filter((pc.field("split") == "train") & pc.field("gold").is_valid())
    return chosen.sort_by("prompt_id").slice(0, limit)


def _check(answers: pa.Table, prompts: pa.Table) -> None:
    num_keys = len(pc.unique(answers["key"]))
    if num_keys != answers.num_rows:
        raise ArtifactError(f"answers: {answers.num_rows - num_keys} keys stand twice; resolve the snapshot to one row a key first")
    known = pc.is_in(answers["prompt_id"], value_set=prompts["prompt_id"].combine_chunks())
    strangers = answers.filter(pc.invert(known))["prompt_id"].to_pylist()
    if strangers:
        raise ArtifactError(
            f"answers: {len(strangers)} belong to none of the {prompts.num_rows} prompts (one says {strangers[0]}); pass their own prompts"
        )
    unknown = set(pc.unique(answers["finish_reason"]).to_pylist()) - {"stop", "length", "error"}
    if unknown:
        raise ArtifactError(f"answers: finish_reason {sorted(map(str, unknown))}; there are stop, length and error")


def _faults(answers: pa.Table, prompts: pa.Table, *, curate: Curate, task: Task) -> pa.Table:
    """One row an answer: fault, null where there is none or nothing was to be judged."""
    references = dict(zip(prompts["prompt_id"].to_pylist(), prompts["reference"].to_pylist(), strict=True))
    finishes = {"stop", "length"} if curate.keep_truncated else {"stop"}
    columns = (answers[name].to_pylist() for name in ("prompt_id", "text", "finish_reason"))
    faults = [
        _fault(text, references[prompt_id] if curate.verify else None, task) if finish_reason in finishes else None
        for prompt_id, text, finish_reason in zip(*columns, strict=True)
    ]
    return pa.table({"row": pa.array(range(answers.num_rows), pa.int64()), "fault": pa.array(faults, pa.string())})


def _fault(text: str, reference: str | None, task: Task) -> Fault | None:
    if leaves_thought_open(text):
        return "open_thought"
    if is_run_on(text, task):
        return "run_on"
    verdict = "right" if reference is None else judge(text, reference, task)
    return None if verdict == "right" else verdict
