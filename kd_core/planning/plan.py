"""Plan of a recipe: what a run would find, compute, store and cost, before it does any of it.

One line a group of the graph. Hits cost nothing; the work of the rest is estimated in ``work.py``, and priced here. Reads the
store and the sources, writes nothing, loads no model, and no torch but for a chat template.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from kd_core.artifacts import Record, find
from kd_core.fingerprint import fingerprint
from kd_core.planning.basis import Basis
from kd_core.planning.costs import price
from kd_core.planning.features import feature_notes
from kd_core.planning.known import Known
from kd_core.planning.soft_labels import SoftLabelOption, bytes_factor, scoring_rate, soft_label_options
from kd_core.planning.usable import row_notes, template_notes, turn_notes
from kd_core.planning.work import Work, add, work_of
from kd_core.recipe import Recipe, ServerTeacher
from kd_core.stages.graph import Node, build_graph
from kd_core.store import Store
from kd_core.summaries import (
    AnswersSummary,
    CurateSummary,
    EvaluateSummary,
    PromptsSummary,
    ScoringSummary,
    TeacherSummary,
    TrainingRun,
    TrainSummary,
    parse,
)

__all__ = ["Plan", "PlanTotal", "StagePlan", "make_plan", "plan_json", "plan_of", "read_known"]

Status = Literal["hit", "partial", "miss"]


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
    """Plan: what a run would do.

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
    """Turn a plan into plain data: {"stages": [...], "total": {...}, "soft_label_options": [...], "notes": [...]}."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    return plain


def make_plan(recipe: Recipe, store: Store) -> Plan:
    """Plan a recipe against a store.

    Expected rows of stages whose input is not there yet: all answers and gold rows survive curation (an upper bound); rows
    that need a teacher who is not there are all missing; rows of hub data sets come from their `limit`, or are None.

    Raises:
        SourceError: a local source cannot be read.
        IntegrityError: the store holds a damaged record.
        VersionError: the store holds a record or commit of another version.
    """
    return plan_of(read_known(recipe, store))


def read_known(recipe: Recipe, store: Store) -> Known:
    """Draw a recipe's graph and read the records of what is done; errors as ``make_plan``."""
    nodes = build_graph(recipe, store)
    return Known(Basis(recipe, store, nodes, {name: find(store, node.stage, node.fingerprint) for name, node in nodes.items()}))


def plan_of(known: Known) -> Plan:
    """Plan from what is known; errors as ``make_plan``."""
    recipe, nodes = known.basis.recipe, known.basis.nodes
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
    if known.lengths.assumed and known.lengths.prompt_tokens is not None:
        gold = "" if known.lengths.gold_tokens is None else f" and {known.lengths.gold_tokens:.0f} a gold answer"
        yield f"lengths: hub data sets are not fetched for a plan; {known.lengths.prompt_tokens:.0f} tokens a prompt{gold} are assumed"
    answers = known.basis.recipe.answers
    longest = answers is not None and known.lengths.answer_tokens(answers.max_tokens) == answers.max_tokens
    if answers is not None and longest and known.basis.records["answers"] is None:
        yield f"answers: as long as answers.max_tokens allows, {answers.max_tokens:,} tokens each; shorter ones cost less"
    yield from _length_notes(known)
    yield from turn_notes(known)
    yield from row_notes(known)
    yield from template_notes(known.basis.recipe)
    yield from feature_notes(known)
    policy = known.basis.recipe.soft_labels
    if policy is None or not any(stage.name == "soft_labels" and stage.status != "hit" for stage in stages):
        return
    if (rate := scoring_rate(known)) is not None:
        yield f"scoring: {rate.tokens_per_second:,.0f} tokens/s, prompts included, {_RATES[rate.source]}"
    if known.cached.stored_labels(policy.kind) is not None:
        factor = bytes_factor(known, policy.kind)
        yield f"soft labels' bytes: {factor:.2f} of the codec's law, as measured on stored labels of kind {policy.kind}"
    else:
        yield f"soft labels' bytes: the codec's law; none of kind {policy.kind} have been measured in this store"


def _length_notes(known: Known) -> Iterator[str]:
    """One sentence on the steps that epochs amount to."""
    training, counted, rows = known.basis.recipe.training, known.counts.training, known.counts.curated_rows
    if training.epochs is None:
        return
    if counted is None:
        yield f"training: {training.length}; how many rows there are is not known before they are fetched, so neither are its steps"
        return
    sure = "" if known.basis.records["curate"] is not None else "at most "
    yield f"training: {training.length}, of {sure}{rows:,} rows by {training.batch_rows}: {sure}{counted.steps:,} steps a model and seed"


def _stage_plan(known: Known, group: str, members: Sequence[Node]) -> StagePlan:
    fp = members[0].fingerprint if len(members) == 1 else fingerprint([node.fingerprint for node in members])
    done = [record for node in members if (record := known.basis.records[node.name]) is not None]
    missing = [node for node in members if known.basis.records[node.name] is None]
    work = work_of(known, missing)
    cached = add(work.rows_cached, *(_rows_of(record) for record in done))
    rows = add(work.rows, *(_rows_of(record) for record in done))
    status: Status = "hit" if not missing else "partial" if done or work.rows_cached else "miss"
    cost = _price(known.basis.recipe, group, work)
    return StagePlan(group, fp, status, rows, cached, work.tokens, work.bytes, work.requests, work.seconds, cost)


def _price(recipe: Recipe, group: str, work: Work) -> float | None:
    run, per_million = recipe.run, None
    if group == "answers" and isinstance(recipe.teacher, ServerTeacher):
        per_million = recipe.teacher.price_per_million_tokens
    return price(
        (run.price_per_hour, work.seconds, 3600), (run.price_per_thousand_requests, work.requests, 1000), (per_million, work.tokens, 1e6)
    )


def _rows_of(record: Record) -> int | None:
    match parse(record):
        case EvaluateSummary() as found:
            return found.items * found.seeds
        case PromptsSummary(rows=rows) | CurateSummary(rows=rows):
            return rows
        case AnswersSummary(shards=shards) | ScoringSummary(shards=shards):
            return shards.rows
        case TeacherSummary(training=TrainingRun(rows=rows)) | TrainSummary(training=TrainingRun(rows=rows)):
            return rows
        case _:
            return None
