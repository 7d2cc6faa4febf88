"""The stage that measures models on the suites of a recipe, and the same for one model alone."""

import logging
from pathlib import Path

import pyarrow as pa

from kd_core.artifacts import Record, find, workspace
from kd_core.errors import ArtifactError
from kd_core.evaluate.measure import Measured, measure
from kd_core.evaluate.samples import samples_identity, with_samples
from kd_core.evaluate.statistics import METRICS, Estimate, estimate
from kd_core.evaluate.suites import suite_items
from kd_core.ledger import Entry, current
from kd_core.progress import Ticker
from kd_core.recipe import Recipe, ServerTeacher
from kd_core.stages.graph import build_graph, least_validation_loss, open_node
from kd_core.stages.job import Job
from kd_core.stages.teacher import load_teacher
from kd_core.store import Store
from kd_core.summaries import EvaluateSummary, TrainSummary, of
from kd_core.teacher.models import LoadedModel, load_directory, load_tokenizer, pick_device
from kd_core.tokens.encoding import encode_gold, encode_prompt

__all__ = ["evaluate_stage", "measure_one"]

_LOG = logging.getLogger(__name__)


def evaluate_stage(job: Job) -> EvaluateSummary:
    """Files: scores.parquet, one row an item and seed."""
    suites, teacher = _suites(job), _scorer(job)
    scores: list[pa.Table] = []
    sizes: dict[str, int] = {}
    rates: list[float] = []
    undecided = 0
    models = _models(job)
    shown = _shown_seeds(job)
    for seed, record in models:
        loaded = teacher if record is None else _load(job, record)
        assert loaded is not None, "a node without a record is the teacher's own"
        found = _measure(job, loaded, suites, teacher, seed)
        scores.append(with_samples(found.scores, loaded, suites, job.recipe.task) if seed in shown else found.scores)
        rates.append(found.tokens_per_second)
        undecided += found.undecided_samples
        sizes = {"parameters": loaded.num_parameters, "bytes": loaded.num_bytes, "items_beyond_positions": _beyond(job, loaded, suites)}
    job.write_table("scores.parquet", pa.concat_tables(scores))
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
        device = pick_device(recipe.run.device)
        if model == "champion":
            holder = current(store, recipe.publish)
            if holder is None:
                raise ArtifactError(
                    f"{recipe.publish} has no champion in {store.uri} yet; run a recipe that publishes it, or name a directory"
                )
            loaded = _load(job, _champion_record(store, holder))
        else:
            loaded = load_directory(Path(model), device=device, tokenizer=load_tokenizer(Path(model)))
        scores = _measure(job, loaded, _suites(job), _scorer(job), recipe.seeds[0]).scores
    confidence = recipe.evaluation.confidence
    found = {(s.name, m): estimate(scores, m, suite=s.name, confidence=confidence) for s in recipe.evaluation.suites for m in METRICS}
    return {where: value for where, value in found.items() if value is not None}


def _suites(job: Job) -> dict[str, pa.Table]:
    return suite_items(job.recipe, lambda name: job.read_table("prompts", name))


def _scorer(job: Job) -> LoadedModel | None:
    """The teacher whose distribution models are compared with; None where it only speaks text."""
    return None if isinstance(job.recipe.teacher, ServerTeacher) else load_teacher(job)


def _measure(job: Job, loaded: LoadedModel, suites: dict[str, pa.Table], teacher: LoadedModel | None, seed: int) -> Measured:
    recipe = job.recipe
    return measure(
        loaded,
        suites,
        seed=seed,
        answers=recipe.evaluation.generate,
        task=recipe.task,
        run=recipe.run,
        teacher=teacher,
        tick=job.tick,
    )


def _beyond(job: Job, loaded: LoadedModel, suites: dict[str, pa.Table]) -> int:
    """Items whose prompt with its gold answer, or with the longest sampled one, has more tokens than the model has positions."""
    task, generate, positions = job.recipe.task, job.recipe.evaluation.generate, loaded.max_positions
    found = 0
    for item in (item for table in suites.values() for item in table.to_pylist() if positions is not None):
        gold = len(encode_gold(loaded.tokenizer, item["gold"], task)) if item["gold"] else 0
        answer = max(gold, 0 if generate is None else generate.max_tokens)
        found += len(encode_prompt(loaded.tokenizer, item["prompt"], task)) + answer > (positions or 0)
    if found:
        _LOG.warning("%s: %d items may need more than the model's %d positions, for which it was not made", job.node.name, found, positions)
    return found


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


def _load(job: Job, record: Record) -> LoadedModel:
    with job.files(record) as files:
        tokenizer = load_tokenizer(files / "model", trust_remote_code=job.recipe.trusts_code)
        return load_directory(files / "model", device=pick_device(job.recipe.run.device), tokenizer=tokenizer)
