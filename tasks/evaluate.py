"""Measuring one model outside a recipe's own run: the task behind the evaluate_model flow."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.stages.evaluate import measure_one
from kd_core.store import open_store

__all__ = ["measure_model"]


@task(task_run_name="measure {model}", cache_policy=NO_CACHE)
def measure_model(recipe: Recipe, model: str) -> list[dict[str, str | float | int]]:
    """Metrics with intervals of a model on the recipe's suites, one row a suite and metric."""
    store = open_store(recipe.run.store, recipe.run.s3)
    found = measure_one(recipe, store, model, tick=silent)
    return [
        {
            "suite": suite,
            "metric": metric,
            "value": round(e.value, 4),
            "low": round(e.low, 4),
            "high": round(e.high, 4),
            "items": e.n,
            "left_out": e.left_out,
        }
        for (suite, metric), e in found.items()
    ]
