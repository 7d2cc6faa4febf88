"""Measure one model on the suites of a recipe: the champion, or any directory in the Hugging Face layout."""

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.registry import with_registry
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.store import open_store
from tasks.evaluate import measure_model
from tasks.nodes import compute, unseen

__all__ = ["evaluate_model"]


@flow(name="evaluate_model", flow_run_name="evaluate-{model}", validate_parameters=True)
def evaluate_model(
    model: str = "champion", recipe_file: str = "quickstart", overrides: list[str] | None = None
) -> list[dict[str, str | float | int]]:
    """Measure a model on a recipe's suites.

    Args:
        model: 'champion' (of the recipe's registered model), or a local directory in the Hugging Face layout.
        recipe_file: the recipe (file, or a shipped one's name) whose prompts, suites and teacher are used.
        overrides: changes to the file, each 'dotted.path=value'.
    """
    recipe = with_registry(load_recipe(recipe_file, overrides or ()))
    nodes = build_graph(recipe, open_store(recipe.run.store, recipe.run.s3))
    for name in ("prompts", "teacher"):
        compute(recipe, unseen(nodes), name)
    rows = measure_model(recipe, model)
    create_table_artifact(key="evaluate-model", table=rows, description=f"{model} on the suites of {recipe.name}")
    return rows
