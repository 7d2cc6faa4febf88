"""Notes of a plan on rows and templates before anything is paid: which turns of chats are learnt, the share of rows that can be
learnt from, and whether a chat template can be used.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from kd_core.planning.known import Known
from kd_core.prompts import turns_of
from kd_core.recipe import (
    DatasetSource,
    FileSource,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    ServerTeacher,
    StudentFromConfig,
    Task,
    TrainedTeacher,
)
from kd_core.summaries import RowLimit, TeacherSummary, UsedRows, of
from kd_core.teacher.reference import locate
from kd_core.tokens.lengths import row_limit, used_rows

__all__ = ["row_notes", "template_notes", "turn_notes"]


def row_notes(known: Known) -> Iterator[str]:
    """One sentence on the rows within training.max_tokens: counted after curation, estimated from gold answers before."""
    if not isinstance(known.basis.recipe.task, Task):
        return  # classes are told apart whatever an input's length is
    training, limit = known.basis.recipe.training, _limit(known)
    used, exact = _used(known, limit), known.cached.curated is not None
    if used is not None:
        short = used.share < training.least_rows_share
        stop = f"; a run stops there: training.least_rows_share is {training.least_rows_share:.0%}" if short else ""
        yield f"rows: {used}{'' if exact else ', by their gold answers and an estimate of their tokens'}{stop}"
    answers = known.basis.recipe.answers
    if not exact and answers is not None and known.lengths.prompt_tokens is not None:
        longest = known.lengths.prompt_tokens + answers.max_tokens
        if longest > limit.tokens:
            yield (
                f"rows: a prompt and an answer of answers.max_tokens = {answers.max_tokens:,} have about {longest:,.0f} tokens, and rows "
                f"with more than {limit.by} = {limit.tokens:,} are left out"
            )


def _limit(known: Known) -> RowLimit:
    student, teacher, record = known.basis.recipe.student, known.basis.recipe.teacher, known.basis.records["teacher"]
    positions = {"student": student.architecture.max_positions if isinstance(student, StudentFromConfig) else None}
    if isinstance(teacher, TrainedTeacher):
        positions["teacher"] = teacher.architecture.max_positions
    elif record is not None:
        positions["teacher"] = of(record, TeacherSummary).max_positions
    return row_limit(known.basis.recipe.training, positions=positions)


def _used(known: Known, limit: RowLimit) -> UsedRows | None:
    """Rows as they are, or gold answers by their characters; None where nothing was read."""
    if known.cached.curated is not None:
        tokens = np.array([len(ids) for ids, _ in known.cached.curated], np.int64)
        return used_rows(tokens, tokens - np.array([first for _, first in known.cached.curated], np.int64), limit)
    table = known.counts.prompts.table
    if table is None:
        return None
    gold = table.filter(pc.and_(pc.equal(table["split"], "train"), pc.is_valid(table["gold"])))
    if not gold.num_rows:
        return None
    prompts, answers = (pc.utf8_length(gold[name]).to_numpy() * (known.lengths.tokens_of(1.0) or 1.0) for name in ("prompt", "gold"))
    supervised = np.ceil(answers).astype(np.int64) + 1
    return used_rows(np.ceil(prompts).astype(np.int64) + supervised, supervised, limit)


def turn_notes(known: Known) -> Iterator[str]:
    """One sentence on which turns of chats are learnt."""
    sources = known.basis.recipe.prompts.sources
    if not any(isinstance(source, FileSource | DatasetSource) and source.messages is not None for source in sources):
        return
    table, several = known.counts.prompts.table, ""
    if table is not None:
        num = sum(len(turns_of(prompt)) > 1 for prompt in table["prompt"].to_pylist())
        several = f" ({num:,} of {table.num_rows:,} prompts have several turns or a system message of their own)"
    yield f"messages: of each row the last assistant turn alone is learnt; what stands before it is the prompt{several}"


def template_notes(recipe: Recipe) -> Iterator[str]:
    """One sentence on the chat template, which is rendered with a probe; a tokenizer on the hub is not fetched.

    Raises:
        SourceError, RecipeError: the template cannot be used as the recipe asks.
    """
    if not isinstance(recipe.task, Task) or recipe.task.template == "plain":
        return
    ref = recipe.teacher if not isinstance(recipe.teacher, ServerTeacher) else recipe.student
    if isinstance(ref, PretrainedTeacher | PretrainedStudent) and locate(ref) is None:
        yield f"template: {ref.model} is on the hub and not fetched for a plan; kd doctor looks at its chat template"
        return
    from kd_core.task_kinds.generation import rows_tokenizer  # with transformers: seconds that only a recipe with a chat template pays
    from kd_core.tokens.templates import check_template

    yield f"template: {check_template(rows_tokenizer(recipe), recipe.text_task)}"
