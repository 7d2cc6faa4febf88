"""The plan of a recipe: what a run would find, compute, store and cost, before it does any of it.

One line a group of the graph. Hits cost nothing; the rest is estimated from what is known (``stages.known``) and from
measured rates or arithmetic (``costs``). Reads the store and the sources, writes nothing, loads no model and no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from math import ceil
from typing import Any, Literal

from kd_core.artifacts import Record, find
from kd_core.costs import forward_seconds, load_seconds, measured_seconds, soft_label_bytes, training_seconds
from kd_core.fingerprint import fingerprint
from kd_core.recipe import Recipe, ServerTeacher, TrainedTeacher, Training
from kd_core.stages.graph import Node, build_graph
from kd_core.stages.known import Known
from kd_core.store import Store

__all__ = ["Plan", "StagePlan", "make_plan", "plan_json"]

Status = Literal["hit", "partial", "miss"]

_SECONDS_A_ROW = 0.001
"""Of prompts and curation, before this store has measured any."""
_SERVER_TOKENS_A_SECOND = 20.0
"""Of each request to a server teacher that nobody has measured."""
_VERDICTS = {"gate": (0, 0.5), "report": (150_000, 4.0), "publish": (0, 10.0)}
"""Stage -> bytes, seconds."""


@dataclass(frozen=True)
class StagePlan:
    """One line of the plan. None is unknown, or nothing that the stage has.

    Attributes:
        name: the group: 'answers', 'student', 'evaluate' ...
        fingerprint: 32 hex, of its node or over its nodes.
        status: hit: all is in the store; partial: some nodes or rows are.
        rows: all nodes together; prompts, answers, rows learnt from, items evaluated.
        rows_cached: of them, in the store.
        tokens: to generate, score or train on.
        bytes: to add to the store.
        seconds: to compute.
        price: in the currency of ``run.price_per_hour`` and the server teacher's price; None if neither is stated.
    """

    name: str
    fingerprint: str
    status: Status
    rows: int | None
    rows_cached: int | None
    tokens: int | None
    bytes: int | None
    seconds: float | None
    price: float | None


@dataclass(frozen=True)
class Plan:
    """The lines, in the order of the graph."""

    stages: tuple[StagePlan, ...]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: {"stages": [one object a line, with StagePlan's fields]}."""
    return {"stages": [asdict(stage) for stage in plan.stages]}


def make_plan(recipe: Recipe, store: Store) -> Plan:
    """Plan a recipe against a store.

    Expected rows of stages whose input is not there yet: all answers and gold rows survive curation (an upper bound); rows
    that need a teacher who is not there are all missing; rows of hub data sets come from their `limit`, or are None.

    Raises:
        SourceError: a local source cannot be read.
        IntegrityError: the store holds a damaged record.
    """
    nodes = build_graph(recipe, store)
    known = Known(recipe, store, nodes, {name: find(store, node.stage, node.fingerprint) for name, node in nodes.items()})
    groups: dict[str, list[Node]] = {}
    for node in nodes.values():
        groups.setdefault(node.group, []).append(node)
    return Plan(tuple(_stage_plan(known, group, members) for group, members in groups.items()))


def _stage_plan(known: Known, group: str, members: Sequence[Node]) -> StagePlan:
    fp = members[0].fingerprint if len(members) == 1 else fingerprint([node.fingerprint for node in members])
    done = [record for node in members if (record := known.records[node.name]) is not None]
    missing = [node for node in members if known.records[node.name] is None]
    work = _WORK[members[0].stage](known, missing) if missing else _Work()
    cached = _add(work.rows_cached, *(_rows_of(record) for record in done))
    rows = _add(work.rows, *(_rows_of(record) for record in done))
    status: Status = "hit" if not missing else "partial" if done or work.rows_cached else "miss"
    price = _price(known.recipe, group, work)
    return StagePlan(group, fp, status, rows, cached, work.tokens, work.bytes, work.seconds, price)


@dataclass(frozen=True)
class _Work:
    """What the missing nodes of a group amount to; as in StagePlan, and nothing by default."""

    rows: int | None = 0
    rows_cached: int | None = 0
    tokens: int | None = 0
    bytes: int | None = 0
    seconds: float | None = 0.0


def _price(recipe: Recipe, group: str, work: _Work) -> float | None:
    per_hour, per_million = recipe.run.price_per_hour, None
    if group == "answers" and isinstance(recipe.teacher, ServerTeacher):
        per_million = recipe.teacher.price_per_million_tokens
    if per_hour is None and per_million is None:
        return None
    price: float | None = _add(_scaled(work.seconds, (per_hour or 0.0) / 3600), _scaled(work.tokens, (per_million or 0.0) / 1e6))
    return price


def _rows_of(record: Record) -> int | None:
    if record.stage == "evaluate":
        return int(record.summary["items"]) * int(record.summary["seeds"])
    return record.summary.get("rows")


def _add(*numbers: Any) -> Any:
    """The sum; None if one is unknown."""
    return None if any(n is None for n in numbers) else sum(numbers)


def _scaled(number: float | None, factor: float | None) -> float | None:
    return None if number is None or factor is None else number * factor


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


# ---------------------------------------------------------------------------------------------- one function a stage


def _prompts(known: Known, missing: Sequence[Node]) -> _Work:
    rows, table = known.prompts.rows, known.prompts.table  # a third of its bytes is what Parquet leaves of text
    rate = measured_seconds(known.finished("prompts"), lambda record: (record.summary["rows"], record.summary["seconds"]))
    return _Work(rows, 0, None, None if table is None else table.nbytes // 3, _scaled(rows, rate or _SECONDS_A_ROW))


def _teacher(known: Known, missing: Sequence[Node]) -> _Work:
    teacher, parameters = known.recipe.teacher, known.teacher_parameters
    if isinstance(teacher, ServerTeacher):
        return _Work(rows=None, rows_cached=None)
    if not isinstance(teacher, TrainedTeacher):
        return _Work(None, None, 0, None, None if parameters is None else load_seconds(parameters))
    architecture = teacher.architecture.model_dump(mode="json")

    def measure(record: Record) -> tuple[float, float] | None:
        return _trained(record) if record.identity.get("architecture") == architecture else None

    rate = measured_seconds(known.finished("teacher"), measure)
    return _training(known, teacher.training, parameters, known.teacher_row_tokens, rate, rows=known.teacher_rows)


def _answers(known: Known, missing: Sequence[Node]) -> _Work:
    recipe, cached = known.recipe, known.answers
    assert recipe.answers is not None, "a recipe without answers has no such node"
    if cached.rows is None:
        return _Work(None, cached.cached, None, None, None)
    rows, answer = cached.rows - cached.cached, known.answer_tokens(recipe.answers.max_tokens)
    row_tokens = answer + (known.prompt_tokens or 0.0)

    def measure(record: Record) -> tuple[float, float] | None:
        share = record.summary["rows_computed"] / record.summary["rows"]
        return (record.summary["tokens"] * share, record.summary["seconds"]) if _same_teacher(known, record) else None

    seconds = _scaled(measured_seconds(known.finished("answers"), measure), rows * answer)
    if seconds is None and isinstance(recipe.teacher, ServerTeacher):
        seconds = rows * answer / (recipe.run.teacher_concurrency * _SERVER_TOKENS_A_SECOND)
    elif seconds is None and known.teacher_parameters is not None:
        seconds = _generating(known, known.teacher_parameters, rows, row_tokens, answer)
    return _Work(cached.rows, cached.cached, round(rows * answer), round(rows * (cached.row_bytes or _text_bytes(row_tokens))), seconds)


def _curate(known: Known, missing: Sequence[Node]) -> _Work:
    rows = known.curated_rows
    rate = measured_seconds(known.finished("curate"), lambda record: (record.summary["rows"], record.summary["seconds"]))
    size = None if known.row_tokens is None else _text_bytes(known.row_tokens[0])
    return _Work(rows, 0, None, _whole(_scaled(rows, size)), _scaled(rows, rate or _SECONDS_A_ROW))


def _soft_labels(known: Known, missing: Sequence[Node]) -> _Work:
    recipe, cached = known.recipe, known.soft_labels
    assert recipe.soft_labels is not None, "a recipe without soft labels has no such node"
    if cached.rows is None or known.row_tokens is None:
        return _Work(cached.rows, cached.cached, None, None, None)
    rows, (row_tokens, supervised) = cached.rows - cached.cached, known.row_tokens
    positions = round(rows * supervised) if cached.missing_tokens is None else cached.missing_tokens

    def measure(record: Record) -> tuple[float, float] | None:
        share = record.summary["rows_computed"] / record.summary["rows"]
        return (record.summary["supervised_tokens"] * share, record.summary["seconds"]) if _same_teacher(known, record) else None

    seconds = _scaled(measured_seconds(known.finished("soft_labels"), measure), positions)
    if seconds is None and known.teacher_parameters is not None:
        tokens = rows * row_tokens
        seconds = forward_seconds(known.teacher_parameters, tokens=tokens, passes=tokens / recipe.run.micro_batch_tokens, run=recipe.run)
    size = _scaled(cached.row_bytes, rows)
    if size is None and known.num_columns is not None:
        targets = soft_label_bytes(recipe.soft_labels, rows=rows, positions=positions, num_columns=known.num_columns)
        size = targets + rows * _text_bytes(row_tokens)
    return _Work(cached.rows, cached.cached, positions, _whole(size), seconds)


def _train(known: Known, missing: Sequence[Node]) -> _Work:
    parameters, supervision = known.student_parameters, missing[0].identity["objective"]["supervision"]

    def measure(record: Record) -> tuple[float, float] | None:
        soft = record.identity["objective"]["supervision"] == "soft"
        comparable = record.summary["parameters"] == parameters and soft == (supervision == "soft")
        return _trained(record) if comparable else None

    rate = measured_seconds(known.finished("train"), measure)
    row_tokens = None if known.row_tokens is None else known.row_tokens[0]
    rows = known.gold_rows if supervision == "gold" else known.curated_rows
    one = _training(known, known.recipe.training, parameters, row_tokens, rate, rows=rows)
    return _total([one] * len(missing))


def _evaluate(known: Known, missing: Sequence[Node]) -> _Work:
    return _total([_evaluate_one(known, node) for node in missing])


def _evaluate_one(known: Known, node: Node) -> _Work:
    recipe, model = known.recipe, node.name.partition(".")[2]
    generate, parameters = recipe.evaluation.generate, known.evaluated_parameters(model)
    seeds = 1 if model in ("teacher", "champion") else len(recipe.seeds)
    items = known.prompts.items
    if items is None or known.prompt_tokens is None:
        return _Work(_whole(_scaled(items, seeds)), 0, None, None, None)
    items *= seeds
    answer = 0.0 if generate is None else known.answer_tokens(generate.max_tokens)
    samples = 0 if generate is None else items * generate.num_samples
    scored = items * (known.prompt_tokens + known.gold_tokens) if known.gold_tokens is not None else 0.0

    def measure(record: Record) -> tuple[float, float] | None:
        comparable = record.summary["parameters"] == parameters and record.identity["evaluation"] == node.identity["evaluation"]
        return (record.summary["items"] * record.summary["seeds"], record.summary["seconds"]) if comparable else None

    seconds = _scaled(measured_seconds(known.finished("evaluate"), measure), items)
    if seconds is None and parameters is not None:
        passes = ceil(scored / recipe.run.micro_batch_tokens)
        seconds = forward_seconds(parameters + (known.teacher_parameters or 0), tokens=scored, passes=2 * passes, run=recipe.run)
        seconds += _generating(known, parameters, samples, known.prompt_tokens + answer, answer)
    return _Work(items, 0, round(samples * answer + scored), round(items * _text_bytes(answer)), seconds)


def _verdict(known: Known, missing: Sequence[Node]) -> _Work:
    """Gate, report, publish: seconds of the last one, or what they took when this was written."""
    stage = missing[0].stage
    size, seconds = _VERDICTS[stage]
    measured = measured_seconds(known.finished(stage), lambda record: (1, record.summary["seconds"]))
    return _Work(None, None, None, size, seconds if measured is None else measured)


_WORK: Mapping[str, Callable[[Known, Sequence[Node]], _Work]] = {
    "prompts": _prompts,
    "teacher": _teacher,
    "answers": _answers,
    "curate": _curate,
    "soft_labels": _soft_labels,
    "train": _train,
    "evaluate": _evaluate,
    **dict.fromkeys(_VERDICTS, _verdict),
}


# ---------------------------------------------------------------------------------------------- what they share


def _training(
    known: Known, training: Training, parameters: int | None, row_tokens: float | None, rate: float | None, *, rows: int | None
) -> _Work:
    """One training run; `rate` is seconds a trained row."""
    trained = training.steps * training.batch_rows
    tokens, seconds = _scaled(row_tokens, trained), _scaled(rate, trained)
    if seconds is None and parameters is not None and tokens is not None:
        seconds = training_seconds(parameters, tokens=tokens, steps=training.steps, run=known.recipe.run)
    return _Work(rows, 0, _whole(tokens), _whole(_scaled(parameters, 4)), seconds)


def _trained(record: Record) -> tuple[float, float]:
    """(rows trained on, seconds) of the process that finished a training run."""
    training, summary = record.identity["training"], record.summary
    return (training["steps"] - summary["resumed_from"]) * training["batch_rows"], summary["training_seconds"]


def _generating(known: Known, parameters: int, rows: int, row_tokens: float, answer_tokens: float) -> float:
    """Seconds to answer: a pass a token for every batch of sequences."""
    run = known.recipe.run
    passes = ceil(rows / run.generate_rows) * answer_tokens
    return forward_seconds(parameters, tokens=rows * row_tokens, passes=passes, run=run)


def _same_teacher(known: Known, record: Record) -> bool:
    """Whether a record's teacher is this recipe's, or of its size."""
    if record.upstream["teacher"] == known.nodes["teacher"].fingerprint:
        return True
    teacher = find(known.store, "teacher", record.upstream["teacher"])
    return teacher is not None and known.teacher_parameters is not None and teacher.summary["parameters"] == known.teacher_parameters


def _text_bytes(tokens: float) -> float:
    """Of a stored row, compressed: keys, ids and text (59 measured for answers of 20 tokens to prompts of 7)."""
    return 30.0 + 3.0 * tokens


def _total(works: Sequence[_Work]) -> _Work:
    return _Work(*(_add(*column) for column in zip(*(astuple(work) for work in works), strict=True)))
