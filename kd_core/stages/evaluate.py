"""The stage that measures models on the suites of a recipe, and the same for one model alone."""

from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from kd_core.artifacts import Record, find, workspace
from kd_core.errors import ArtifactError
from kd_core.evaluate.measure import Measured
from kd_core.evaluate.samples import samples_identity, with_samples
from kd_core.evaluate.statistics import METRICS, Estimate, estimate
from kd_core.evaluate.suites import suite_items
from kd_core.ledger import Entry, current
from kd_core.progress import Ticker
from kd_core.recipe import Recipe, ServerTeacher
from kd_core.stages.graph import build_graph, least_validation_loss, open_node
from kd_core.stages.job import Job
from kd_core.store import Store
from kd_core.summaries import EvaluateSummary, TrainSummary, of
from kd_core.task_kinds import TaskModel, kind_of
from kd_core.teacher.models import LoadedModel

__all__ = ["evaluate_stage", "measure_one"]


def evaluate_stage(job: Job) -> EvaluateSummary:
    """Files: scores.parquet, one row an item and seed; of classes guesses.parquet, the likeliest classes of each."""
    suites, teacher = _suites(job), _scorer(job)
    scores: list[pa.Table] = []
    guesses: list[pa.Table] = []
    sizes: dict[str, int] = {}
    rates: list[float] = []
    undecided = 0
    models = _models(job)
    shown = _shown_seeds(job)
    for seed, record in models:
        loaded = teacher if record is None else _load(job, record)
        assert loaded is not None, "a node without a record is the teacher's own"
        found = _measure(job, loaded, suites, teacher, seed)
        if seed in shown and isinstance(loaded, LoadedModel):
            found = replace(found, scores=with_samples(found.scores, loaded, suites, job.recipe.text_task))
        scores.append(found.scores)
        rates.append(found.tokens_per_second)
        undecided += found.undecided_samples
        guesses += [] if found.guesses is None else [found.guesses]
        sizes = {"parameters": loaded.num_parameters, "bytes": loaded.num_bytes, "items_beyond_positions": found.items_beyond_positions}
    job.write_table("scores.parquet", pa.concat_tables(scores))
    if guesses:
        job.write_table("guesses.parquet", pa.concat_tables(guesses))
    items = sum(table.num_rows for table in suites.values())
    return EvaluateSummary(**sizes, items=items, seeds=len(models), tokens_per_second=sum(rates) / len(rates), undecided_samples=undecided)


def measure_one(recipe: Recipe, store: Store, model: str, *, tick: Ticker) -> dict[tuple[str, str], Estimate]:
    """Measure one model on a recipe's suites; its prompts and teacher nodes must be done.

    Args:
        recipe: whose suites, sampling and teacher are used.
        store: where its artifacts are.
        model: 'champion', or a local directory in the Hugging Face layout.
        tick: progress, in items.

    Returns:
        (suite, metric) -> value with interval.

    Raises:
        ArtifactError: there is no champion, or its weights are gone.
        TeacherError: the directory holds no model.
    """
    nodes = build_graph(recipe, store)
    inputs = {role: open_node(store, nodes[role]) for role in ("prompts", "teacher")}
    with workspace() as directory:
        job = Job(recipe, nodes["evaluate.student"], store, inputs, directory, tick)
        if model == "champion":
            holder = current(store, recipe.publish)
            if holder is None:
                raise ArtifactError(
                    f"{recipe.publish} has no champion in {store.uri} yet; run a recipe that publishes it, or name a directory"
                )
            loaded = _load(job, _champion_record(store, holder))
        else:
            loaded = kind_of(recipe).load(job, Path(model))
        scores = _measure(job, loaded, _suites(job), _scorer(job), recipe.seeds[0]).scores
    confidence = recipe.evaluation.confidence
    found = {(s.name, m): estimate(scores, m, suite=s.name, confidence=confidence) for s in recipe.evaluation.suites for m in METRICS}
    return {where: value for where, value in found.items() if value is not None}


def _suites(job: Job) -> dict[str, pa.Table]:
    return suite_items(job.recipe, lambda name: job.read_table("prompts", name))


def _scorer(job: Job) -> TaskModel | None:
    """The teacher whose distribution models are compared with; None where it only speaks text."""
    return None if isinstance(job.recipe.teacher, ServerTeacher) else kind_of(job.recipe).load_teacher(job)


def _measure(job: Job, loaded: TaskModel, suites: dict[str, pa.Table], teacher: TaskModel | None, seed: int) -> Measured:
    return kind_of(job.recipe).measure(job, loaded, suites, teacher=teacher, seed=seed)


def _models(job: Job) -> list[tuple[int, Record | None]]:
    """List (seed, record) of the models that this node measures; None is the teacher."""
    if job.node.name == "evaluate.teacher":
        return [(job.recipe.seeds[0], None)]
    if job.node.name == "evaluate.champion":
        holder = job.champion()
        assert holder is not None, "the graph has this node only when there is a champion"
        return [(0, _champion_record(job.store, holder))]
    return [(seed, job.inputs[f"model.{seed}"]) for seed in job.recipe.seeds]


def _shown_seeds(job: Job) -> tuple[int, ...]:
    """Seeds of the models that answer some prompts for the report alone: of the teacher, and of the student that would be published."""
    if samples_identity(job.recipe) is None or job.node.name not in ("evaluate.teacher", "evaluate.student"):
        return ()
    if job.node.name == "evaluate.teacher":
        return job.recipe.seeds[:1]
    return (of(least_validation_loss([job.inputs[f"model.{seed}"] for seed in job.recipe.seeds]), TrainSummary).seed,)


def _champion_record(store: Store, holder: Entry) -> Record:
    record = find(store, holder.artifact.stage, holder.artifact.fingerprint)
    if record is None or record.digest != holder.artifact.digest:
        raise ArtifactError(f"the champion's weights {holder.artifact.digest} are gone from {store.uri}; restore them or roll back")
    return record


def _load(job: Job, record: Record) -> TaskModel:
    with job.files(record) as files:
        return kind_of(job.recipe).load(job, files / "model")
