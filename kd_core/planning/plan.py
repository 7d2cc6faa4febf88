"""The plan of a recipe: what a run would find, compute, store and cost, before it does any of it.

One line a group of the graph. Hits cost nothing; the rest is estimated from what is known (``stages.known``) and from
measured rates or arithmetic (``costs``). Reads the store and the sources, writes nothing, loads no model, and no torch but for a chat
template.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from math import ceil
from typing import Any, Literal

from kd_core.artifacts import Record, find
from kd_core.fingerprint import fingerprint
from kd_core.planning.costs import (
    GROUP_BYTES,
    epoch_requests,
    forward_seconds,
    load_seconds,
    measured_seconds,
    price,
    row_groups,
    table_bytes,
    text_bytes,
    training_seconds,
    write_requests,
)
from kd_core.planning.features import feature_notes, live_teacher_seconds, reads_states
from kd_core.planning.known import Known
from kd_core.planning.soft_labels import SoftLabelOption, bytes_factor, estimate, scoring_rate, soft_label_options
from kd_core.planning.usable import row_notes, template_notes
from kd_core.recipe import Recipe, ServerTeacher, TrainedTeacher, Training
from kd_core.stages.graph import Node, build_graph
from kd_core.store import Store

__all__ = ["Plan", "PlanTotal", "StagePlan", "make_plan", "plan_json"]

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
        tokens: to generate, score or train on; of soft labels the supervised positions.
        bytes: to add to the store.
        requests: to the store: shards and commits written, row groups read in training. The few files of each artifact
            are not counted.
        seconds: to compute.
        price: of seconds, requests and a server teacher's tokens, as far as the recipe states their prices; None if it states none.
    """

    name: str
    fingerprint: str
    status: Status
    rows: int | None
    rows_cached: int | None
    tokens: int | None
    bytes: int | None
    requests: int | None
    seconds: float | None
    price: float | None


@dataclass(frozen=True)
class PlanTotal:
    """Sums over the lines that are known: lower bounds where ``unknown`` names some.

    Attributes:
        bytes, requests, seconds, price: as in StagePlan.
        price_a_month: of keeping those bytes in the store; None if the recipe states no such price.
        unknown: lines whose seconds are not known.
    """

    bytes: int
    requests: int
    seconds: float
    price: float | None
    price_a_month: float | None
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        stages: the lines, in the order of the graph.
        total: their sums.
        soft_label_options: other target policies beside the recipe's; empty where it uses no soft labels.
        notes: where the estimates come from, one sentence each.
    """

    stages: tuple[StagePlan, ...]
    total: PlanTotal
    soft_label_options: tuple[SoftLabelOption, ...]
    notes: tuple[str, ...]


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: {"stages": [...], "total": {...}, "soft_label_options": [...], "notes": [...]}."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    return plain


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
    stages = tuple(_stage_plan(known, group, members) for group, members in groups.items())
    return Plan(stages, _sum(recipe, stages), soft_label_options(known), tuple(_notes(known, stages)))


def _sum(recipe: Recipe, stages: Sequence[StagePlan]) -> PlanTotal:
    size = sum(stage.bytes or 0 for stage in stages)
    prices = [stage.price for stage in stages if stage.price is not None]
    return PlanTotal(
        bytes=size,
        requests=sum(stage.requests or 0 for stage in stages),
        seconds=sum(stage.seconds or 0.0 for stage in stages),
        price=sum(prices) if prices else None,
        price_a_month=price((recipe.run.price_per_gb_month, size, 1e9)),
        unknown=tuple(stage.name for stage in stages if stage.seconds is None),
    )


_RATES = {
    "recipe": "as run.score_tokens_per_second says",
    "measured": "as finished records of this store measured it",
    "arithmetic": "from its parameters and an assumed rate of this machine; state run.score_tokens_per_second if you know better",
}


def _notes(known: Known, stages: Sequence[StagePlan]) -> Iterator[str]:
    if known.lengths_assumed and known.prompt_tokens is not None:
        gold = "" if known.gold_tokens is None else f" and {known.gold_tokens:.0f} a gold answer"
        yield f"lengths: hub data sets are not fetched for a plan; {known.prompt_tokens:.0f} tokens a prompt{gold} are assumed"
    answers = known.recipe.answers
    if answers is not None and known.records["answers"] is None and known.answer_tokens(answers.max_tokens) == answers.max_tokens:
        yield f"answers: as long as answers.max_tokens allows, {answers.max_tokens:,} tokens each; shorter ones cost less"
    yield from row_notes(known)
    yield from template_notes(known.recipe)
    yield from feature_notes(known)
    policy = known.recipe.soft_labels
    if policy is None or not any(stage.name == "soft_labels" and stage.status != "hit" for stage in stages):
        return
    if (rate := scoring_rate(known)) is not None:
        yield f"scoring: {rate.tokens_per_second:,.0f} tokens/s, prompts included, {_RATES[rate.source]}"
    if known.stored_labels(policy.kind) is not None:
        factor = bytes_factor(known, policy.kind)
        yield f"soft labels' bytes: {factor:.2f} of the codec's law, as measured on stored labels of kind {policy.kind}"
    else:
        yield f"soft labels' bytes: the codec's law; none of kind {policy.kind} have been measured in this store"


def _stage_plan(known: Known, group: str, members: Sequence[Node]) -> StagePlan:
    fp = members[0].fingerprint if len(members) == 1 else fingerprint([node.fingerprint for node in members])
    done = [record for node in members if (record := known.records[node.name]) is not None]
    missing = [node for node in members if known.records[node.name] is None]
    work = _WORK[members[0].stage](known, missing) if missing else _Work()
    cached = _add(work.rows_cached, *(_rows_of(record) for record in done))
    rows = _add(work.rows, *(_rows_of(record) for record in done))
    status: Status = "hit" if not missing else "partial" if done or work.rows_cached else "miss"
    cost = _price(known.recipe, group, work)
    return StagePlan(group, fp, status, rows, cached, work.tokens, work.bytes, work.requests, work.seconds, cost)


@dataclass(frozen=True)
class _Work:
    """What the missing nodes of a group amount to; as in StagePlan, and nothing by default."""

    rows: int | None = 0
    rows_cached: int | None = 0
    tokens: int | None = 0
    bytes: int | None = 0
    seconds: float | None = 0.0
    requests: int | None = 0


def _price(recipe: Recipe, group: str, work: _Work) -> float | None:
    run, per_million = recipe.run, None
    if group == "answers" and isinstance(recipe.teacher, ServerTeacher):
        per_million = recipe.teacher.price_per_million_tokens
    return price(
        (run.price_per_hour, work.seconds, 3600), (run.price_per_thousand_requests, work.requests, 1000), (per_million, work.tokens, 1e6)
    )


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
        return _Work(None, cached.cached, None, None, None, None)
    rows, answer = cached.rows - cached.cached, known.answer_tokens(recipe.answers.max_tokens)
    row_tokens = answer + (known.prompt_tokens or 0.0)

    def measure(record: Record) -> tuple[float, float] | None:
        share = record.summary["rows_computed"] / record.summary["rows"]
        return (record.summary["tokens"] * share, record.summary["seconds"]) if known.same_teacher(record) else None

    seconds = _scaled(measured_seconds(known.finished("answers"), measure), rows * answer)
    if seconds is None and isinstance(recipe.teacher, ServerTeacher):
        seconds = rows * answer / (recipe.run.teacher_concurrency * _SERVER_TOKENS_A_SECOND)
    elif seconds is None and known.teacher_parameters is not None:
        seconds = _generating(known, known.teacher_parameters, rows, row_tokens, answer)
    a_row = text_bytes(1, row_tokens) if cached.row_bytes is None else cached.row_bytes
    size = rows * a_row + GROUP_BYTES * row_groups(rows, shard_rows=recipe.run.shard_rows)
    writes = write_requests(rows, shard_rows=recipe.run.shard_rows)
    return _Work(cached.rows, cached.cached, round(rows * answer), round(size), seconds, writes)


def _curate(known: Known, missing: Sequence[Node]) -> _Work:
    rows = known.curated_rows
    rate = measured_seconds(known.finished("curate"), lambda record: (record.summary["rows"], record.summary["seconds"]))
    size = None if known.row_tokens is None else text_bytes(1, known.row_tokens[0])
    return _Work(rows, 0, None, _whole(_scaled(rows, size)), _scaled(rows, rate or _SECONDS_A_ROW))


def _vocabulary(known: Known, missing: Sequence[Node]) -> _Work:
    """Texts are read three times: once to see what occurs, twice to compare the tokenizers."""
    rate = measured_seconds(known.finished("vocabulary"), lambda record: (record.summary["texts"], record.summary["seconds"]))
    prompts, rows = known.prompts.rows, known.curated_rows
    texts = None if prompts is None or rows is None else prompts + rows
    return _Work(None, None, None, None, _scaled(texts, rate or _SECONDS_A_ROW))


def _soft_labels(known: Known, missing: Sequence[Node]) -> _Work:
    policy = known.recipe.soft_labels
    assert policy is not None, "a recipe without soft labels has no such node"
    found = estimate(known, policy)
    return _Work(found.rows, found.rows_cached, found.tokens, found.bytes, found.seconds, found.write_requests)


def _hidden_states(known: Known, missing: Sequence[Node]) -> _Work:
    """int8 columns and a float32 scale a block and position, beside plain columns; the same pass as for soft labels."""
    recipe, cached, each = known.recipe, known.hidden_states, known.row_tokens
    assert recipe.hidden_states is not None, "a recipe without hidden states has no such node"
    if cached.rows is None or each is None:
        return _Work(cached.rows, cached.cached, None, None, None, None)
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
    measured, rate = measured_seconds(filter(known.same_teacher, known.finished("hidden_states")), known.scored), scoring_rate(known)
    seconds = _scaled(measured, tokens) if measured is not None or rate is None else tokens / rate.tokens_per_second
    return _Work(cached.rows, cached.cached, positions, _whole(size), seconds, write_requests(rows, shard_rows=recipe.run.shard_rows))


def _train(known: Known, missing: Sequence[Node]) -> _Work:
    parameters, objective = known.student_parameters, missing[0].identity["objective"]
    supervision = objective["supervision"]

    def measure(record: Record) -> tuple[float, float] | None:
        comparable = record.summary["parameters"] == parameters and _work_a_step(record.identity["objective"]) == _work_a_step(objective)
        return _trained(record) if comparable else None

    rate = measured_seconds(known.finished("train"), measure)
    row_tokens = None if known.row_tokens is None else known.row_tokens[0]
    rows = known.gold_rows if supervision == "gold" else known.curated_rows
    one = _training(known, known.recipe.training, parameters, row_tokens, rate, rows=rows)
    if rate is None and supervision == "soft" and one.tokens is not None:
        one = replace(one, seconds=_add(one.seconds, live_teacher_seconds(known, tokens=one.tokens)))
    reads = _label_reads(known.recipe, rows) if supervision == "soft" else 0
    if reads is not None and supervision == "soft" and reads_states(known):
        reads *= 2  # hidden states lie in shards of as many rows
    return _total([replace(one, requests=reads)] * len(missing))


def _work_a_step(objective: Mapping[str, Any]) -> tuple[bool, Any, Any]:
    """What of an objective a step's seconds depend on most: soft labels, and where features come from."""
    features = objective.get("features") or {}
    return objective["supervision"] == "soft", features.get("kind"), features.get("source")


def _label_reads(recipe: Recipe, rows: int | None) -> int | None:
    """Range reads of soft labels over all epochs, as if no local disk kept any of them."""
    if not rows:
        return None
    epochs = recipe.training.steps * recipe.training.batch_rows / rows
    return ceil(epochs * epoch_requests(rows, shard_rows=recipe.run.shard_rows))


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
    return _Work(items, 0, round(samples * answer + scored), round(text_bytes(items, answer * items)), seconds)


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
    "vocabulary": _vocabulary,
    "soft_labels": _soft_labels,
    "hidden_states": _hidden_states,
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
    steps = summary.get("steps", training["steps"])  # fewer where it stopped early
    return (steps - summary["resumed_from"]) * training["batch_rows"], summary["training_seconds"]


def _generating(known: Known, parameters: int, rows: int, row_tokens: float, answer_tokens: float) -> float:
    """Seconds to answer: a pass a token for every batch of sequences."""
    run = known.recipe.run
    passes = ceil(rows / run.generate_rows) * answer_tokens
    return forward_seconds(parameters, tokens=rows * row_tokens, passes=passes, run=run)


def _total(works: Sequence[_Work]) -> _Work:
    return _Work(*(_add(*column) for column in zip(*(astuple(work) for work in works), strict=True)))
