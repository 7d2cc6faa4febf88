"""The stage that collects prompts: from sources to cleaned, split and decontaminated rows."""

from kd_core.evaluate.suites import expect_measurable, suite_items
from kd_core.progress import Tick
from kd_core.recipe import Recipe, SourceSuite
from kd_core.stages.job import Job
from kd_core.summaries import PromptsSummary
from kd_core.task_kinds import kind_of

__all__ = ["prompts_stage"]


def prompts_stage(job: Job) -> PromptsSummary:
    """Files: prompts.parquet; suite-<name>.parquet, whole, of each benchmark with a source of its own; what rows refer to by hash."""
    found = kind_of(job.recipe).collect(_with_whole_benchmarks(job.recipe), job.directory)
    tables = {"prompts.parquet": found.table, **{f"suite-{name}.parquet": items for name, items in found.suites.items()}}
    expect_measurable(job.recipe, suite_items(job.recipe, tables.__getitem__))
    for name, table in tables.items():
        job.write_table(name, table)
    job.tick(Tick(found.table.num_rows, found.table.num_rows, "prompts"))
    return PromptsSummary(found.table.num_rows, found.counts)


def _with_whole_benchmarks(recipe: Recipe) -> Recipe:
    """Lift the limits of suites: how much of one is measured is the evaluation's business, and must not move the prompts."""
    whole = tuple(suite.model_copy(update={"limit": None}) for suite in recipe.evaluation.suites if isinstance(suite, SourceSuite))
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"suites": whole})})
