"""Work that the missing nodes of a group amount to: one function a stage of the graph.

Estimates, from what is known of the recipe (``known.py``) and from measured rates or arithmetic (``costs.py``). Needs no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import ceil
from typing import Any

from kd_core.artifacts import Record
from kd_core.planning.costs import (
    GROUP_BYTES,
    epoch_requests,
    forward_seconds,
    load_seconds,
    measured_seconds,
    row_groups,
    table_bytes,
    text_bytes,
    training_seconds,
    write_requests,
)
from kd_core.planning.features import live_teacher_seconds, reads_states
from kd_core.planning.known import Known
from kd_core.planning.soft_labels import estimate, scoring_rate
from kd_core.recipe import ServerTeacher, TrainedTeacher, Training
from kd_core.stages.graph import Node
from kd_core.summaries import (
    AnswersSummary,
    CurateSummary,
    EvaluateSummary,
    PromptsSummary,
    TeacherSummary,
    TrainingRun,
    TrainSummary,
    VocabularySummary,
    of,
)

__all__ = ["Work", "add", "work_of"]

_SECONDS_A_ROW = 0.001
"""Time of prompts and curation, before this store has measured any."""
_SERVER_TOKENS_A_SECOND = 20.0
"""Rate of each request to a server teacher that nobody has measured."""
_VERDICTS = {"gate": (0, 0.5), "report": (150_000, 4.0), "publish": (0, 10.0)}
"""Bytes and seconds of each stage that judges or publishes."""


@dataclass(frozen=True)
class Work:
    """Work of the missing nodes of a group; fields are those of StagePlan, and nothing by default."""

    rows: int | None = 0
    rows_cached: int | None = 0
    tokens: int | None = 0
    bytes: int | None = 0
    seconds: float | None = 0.0
    requests: int | None = 0


def work_of(known: Known, missing: Sequence[Node]) -> Work:
    """Estimate the work of nodes of one group that are not in the store; nothing where there are none."""
    return _WORK[missing[0].stage](known, missing) if missing else Work()


def add(*numbers: Any) -> Any:
    """Sum of numbers; None if one is unknown."""
    return None if any(n is None for n in numbers) else sum(numbers)


def _scaled(number: float | None, factor: float | None) -> float | None:
    return None if number is None or factor is None else number * factor


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


# ---------------------------------------------------------------------------------------------- one function a stage


def _prompts(known: Known, missing: Sequence[Node]) -> Work:
    rows, table = known.counts.prompts.rows, known.counts.prompts.table  # a third of its bytes is what Parquet leaves of text
    rate = measured_seconds(known.basis.finished("prompts"), lambda record: (of(record, PromptsSummary).rows, record.seconds))
    return Work(rows, 0, None, None if table is None else table.nbytes // 3, _scaled(rows, rate or _SECONDS_A_ROW))


def _teacher(known: Known, missing: Sequence[Node]) -> Work:
    teacher, parameters = known.basis.recipe.teacher, known.sizes.teacher_parameters
    if isinstance(teacher, ServerTeacher):
        return Work(rows=None, rows_cached=None)
    if not isinstance(teacher, TrainedTeacher):
        return Work(None, None, 0, None, None if parameters is None else load_seconds(parameters))
    architecture = teacher.architecture.model_dump(mode="json")

    def measure(record: Record) -> tuple[float, float] | None:
        run = of(record, TeacherSummary).training
        return None if run is None or record.identity["architecture"] != architecture else _trained(record, run)

    rate = measured_seconds(known.basis.finished("teacher"), measure)
    return _training(known, teacher.training, parameters, known.lengths.teacher_row_tokens, rate, rows=known.counts.teacher_rows)


def _answers(known: Known, missing: Sequence[Node]) -> Work:
    recipe, cached = known.basis.recipe, known.cached.answers
    assert recipe.answers is not None, "a recipe without answers has no such node"
    if cached.rows is None:
        return Work(None, cached.cached, None, None, None, None)
    rows, answer = cached.rows - cached.cached, known.lengths.answer_tokens(recipe.answers.max_tokens)
    row_tokens = answer + (known.lengths.prompt_tokens or 0.0)

    def measure(record: Record) -> tuple[float, float] | None:
        found = of(record, AnswersSummary)
        share = found.shards.rows_computed / found.shards.rows
        return (found.tokens * share, record.seconds) if known.sizes.same_teacher(record) else None

    seconds = _scaled(measured_seconds(known.basis.finished("answers"), measure), rows * answer)
    if seconds is None and isinstance(recipe.teacher, ServerTeacher):
        seconds = rows * answer / (recipe.run.teacher_concurrency * _SERVER_TOKENS_A_SECOND)
    elif seconds is None and known.sizes.teacher_parameters is not None:
        seconds = _generating(known, known.sizes.teacher_parameters, rows, row_tokens, answer)
    a_row = text_bytes(1, row_tokens) if cached.row_bytes is None else cached.row_bytes
    size = rows * a_row + GROUP_BYTES * row_groups(rows, shard_rows=recipe.run.shard_rows)
    writes = write_requests(rows, shard_rows=recipe.run.shard_rows)
    return Work(cached.rows, cached.cached, round(rows * answer), round(size), seconds, writes)


def _curate(known: Known, missing: Sequence[Node]) -> Work:
    rows = known.counts.curated_rows
    rate = measured_seconds(known.basis.finished("curate"), lambda record: (of(record, CurateSummary).rows, record.seconds))
    size = None if known.lengths.row_tokens is None else text_bytes(1, known.lengths.row_tokens[0])
    return Work(rows, 0, None, _whole(_scaled(rows, size)), _scaled(rows, rate or _SECONDS_A_ROW))


def _vocabulary(known: Known, missing: Sequence[Node]) -> Work:
    """Texts are read three times: once to see what occurs, twice to compare the tokenizers."""
    rate = measured_seconds(known.basis.finished("vocabulary"), lambda record: (of(record, VocabularySummary).texts, record.seconds))
    prompts, rows = known.counts.prompts.rows, known.counts.curated_rows
    texts = None if prompts is None or rows is None else prompts + rows
    return Work(None, None, None, None, _scaled(texts, rate or _SECONDS_A_ROW))


def _soft_labels(known: Known, missing: Sequence[Node]) -> Work:
    policy = known.basis.recipe.soft_labels
    assert policy is not None, "a recipe without soft labels has no such node"
    found = estimate(known, policy)
    return Work(found.rows, found.rows_cached, found.tokens, found.bytes, found.seconds, found.write_requests)


def _hidden_states(known: Known, missing: Sequence[Node]) -> Work:
    """int8 columns and a float32 scale a block and position, beside plain columns; the same pass as for soft labels."""
    recipe, cached, each = known.basis.recipe, known.cached.hidden_states, known.lengths.row_tokens
    assert recipe.hidden_states is not None, "a recipe without hidden states has no such node"
    if cached.rows is None or each is None:
        return Work(cached.rows, cached.cached, None, None, None, None)
    rows, width = cached.rows - cached.cached, recipe.hidden_states.width
    tokens, positions = cached.missing_tokens or (round(rows * each[0]), round(rows * each[1]))
    if width is None and isinstance(recipe.teacher, TrainedTeacher):
        width = recipe.teacher.architecture.hidden_size
    size = (
        None
        if width is None
        else positions * len(recipe.hidden_states.blocks) * (width + 4)
        + table_bytes(rows, tokens, groups=row_groups(rows, shard_rows=recipe.run.shard_rows))
    )
    comparable, rate = filter(known.sizes.same_teacher, known.basis.finished("hidden_states")), scoring_rate(known)
    measured = measured_seconds(comparable, known.cached.scored)
    seconds = _scaled(measured, tokens) if measured is not None or rate is None else tokens / rate.tokens_per_second
    return Work(cached.rows, cached.cached, positions, _whole(size), seconds, write_requests(rows, shard_rows=recipe.run.shard_rows))


def _train(known: Known, missing: Sequence[Node]) -> Work:
    parameters, objective = known.sizes.student_parameters, missing[0].identity["objective"]
    supervision = objective["supervision"]

    def measure(record: Record) -> tuple[float, float] | None:
        found = of(record, TrainSummary)
        comparable = found.parameters == parameters and _work_a_step(record.identity["objective"]) == _work_a_step(objective)
        return _trained(record, found.training) if comparable else None

    rate = measured_seconds(known.basis.finished("train"), measure)
    row_tokens = None if known.lengths.row_tokens is None else known.lengths.row_tokens[0]
    rows = known.counts.gold_rows if supervision == "gold" else known.counts.curated_rows
    one = _training(known, known.counts.training, parameters, row_tokens, rate, rows=rows)
    if rate is None and supervision == "soft" and one.tokens is not None:
        one = replace(one, seconds=add(one.seconds, live_teacher_seconds(known, tokens=one.tokens)))
    reads = _label_reads(known, rows) if supervision == "soft" else 0
    if reads is not None and supervision == "soft" and reads_states(known):
        reads *= 2  # hidden states lie in shards of as many rows
    return _total([replace(one, requests=reads)] * len(missing))


def _work_a_step(objective: Mapping[str, Any]) -> tuple[bool, Any, Any]:
    """Parts of an objective that a step's seconds depend on most: soft labels, and where features come from."""
    features = objective.get("features") or {}
    return objective["supervision"] == "soft", features.get("kind"), features.get("source")


def _label_reads(known: Known, rows: int | None) -> int | None:
    """Range reads of soft labels over all epochs, as if no local disk kept any of them."""
    training = known.counts.training
    if not rows or training is None:
        return None
    epochs = training.steps * training.batch_rows / rows
    return ceil(epochs * epoch_requests(rows, shard_rows=known.basis.recipe.run.shard_rows))


def _evaluate(known: Known, missing: Sequence[Node]) -> Work:
    return _total([_evaluate_one(known, node) for node in missing])


def _evaluate_one(known: Known, node: Node) -> Work:
    recipe, model = known.basis.recipe, node.name.partition(".")[2]
    generate, parameters = recipe.evaluation.generate, known.sizes.evaluated_parameters(model)
    seeds = 1 if model in ("teacher", "champion") else len(recipe.seeds)
    items = known.counts.prompts.items
    if items is None or known.lengths.prompt_tokens is None:
        return Work(_whole(_scaled(items, seeds)), 0, None, None, None)
    items *= seeds
    answer = 0.0 if generate is None else known.lengths.answer_tokens(generate.max_tokens)
    samples = 0 if generate is None else items * generate.num_samples
    scored = items * (known.lengths.prompt_tokens + known.lengths.gold_tokens) if known.lengths.gold_tokens is not None else 0.0

    def measure(record: Record) -> tuple[float, float] | None:
        found = of(record, EvaluateSummary)
        comparable = found.parameters == parameters and record.identity["evaluation"] == node.identity["evaluation"]
        return (found.items * found.seeds, record.seconds) if comparable else None

    seconds = _scaled(measured_seconds(known.basis.finished("evaluate"), measure), items)
    if seconds is None and parameters is not None:
        passes = ceil(scored / recipe.run.micro_batch_tokens)
        seconds = forward_seconds(parameters + (known.sizes.teacher_parameters or 0), tokens=scored, passes=2 * passes, run=recipe.run)
        seconds += _generating(known, parameters, samples, known.lengths.prompt_tokens + answer, answer)
    return Work(items, 0, round(samples * answer + scored), round(text_bytes(items, answer * items)), seconds)


def _verdict(known: Known, missing: Sequence[Node]) -> Work:
    """Gate, report, publish: seconds of the last one, or what they took when this was written."""
    stage = missing[0].stage
    size, seconds = _VERDICTS[stage]
    measured = measured_seconds(known.basis.finished(stage), lambda record: (1, record.seconds))
    return Work(None, None, None, size, seconds if measured is None else measured)


_WORK: Mapping[str, Callable[[Known, Sequence[Node]], Work]] = {
    "prompts": _prompts,
    "teacher": _teacher,
    "answers": _answers,
    "curate": _curate,
    "vocabulary": _vocabulary,
    "soft_labels": _soft_labels,
    "hidden_states": _hidden_states,
    "train": _train,
    "evaluate": _evaluate,
    **dict.fromkeys(_VERDICTS, _verdict),
}


# ---------------------------------------------------------------------------------------------- what they share


def _training(
    known: Known, training: Training | None, parameters: int | None, row_tokens: float | None, rate: float | None, *, rows: int | None
) -> Work:
    """Estimate one training run; `rate` is seconds a trained row. What is not known of one by epochs whose rows are not is None."""
    if training is None:
        return Work(rows, 0, None, _whole(_scaled(parameters, 4)), None)
    trained = training.steps * training.batch_rows
    tokens, seconds = _scaled(row_tokens, trained), _scaled(rate, trained)
    if seconds is None and parameters is not None and tokens is not None:
        seconds = training_seconds(parameters, tokens=tokens, steps=training.steps, run=known.basis.recipe.run)
    return Work(rows, 0, _whole(tokens), _whole(_scaled(parameters, 4)), seconds)


def _trained(record: Record, run: TrainingRun) -> tuple[float, float]:
    """Tell (rows trained on, seconds) of the process that finished a training run."""
    return (run.steps - run.resumed_from) * record.identity["training"]["batch_rows"], run.seconds


def _generating(known: Known, parameters: int, rows: int, row_tokens: float, answer_tokens: float) -> float:
    """Seconds to answer: a pass a token for every batch of sequences."""
    run = known.basis.recipe.run
    passes = ceil(rows / run.generate_rows) * answer_tokens
    return forward_seconds(parameters, tokens=rows * row_tokens, passes=passes, run=run)


def _total(works: Sequence[Work]) -> Work:
    return Work(*(add(*column) for column in zip(*(astuple(work) for work in works), strict=True)))
