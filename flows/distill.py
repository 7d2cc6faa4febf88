"""The main flow: a recipe in, a promoted student with its evidence out.

The order of the stages is ``kd_core.stages.graph.walk``, the same that ``kd run --local`` follows; this file adds the
orchestrator and nothing else.
"""

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.registry import with_registry
from kd_core.artifacts import Artifact, find, read_bytes
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph, walk
from kd_core.store import Store, open_store
from tasks.nodes import compute

__all__ = ["distill"]


@flow(name="distill", flow_run_name="distill-{recipe_file}", validate_parameters=True)
def distill(
    recipe: Recipe | None = None, recipe_file: str = "recipes/quickstart.yaml", overrides: list[str] | None = None
) -> dict[str, Artifact]:
    """Distil a student and publish it if the evidence allows.

    Args:
        recipe: a whole recipe, as the form in the UI builds it; leave it empty to use a file.
        recipe_file: a recipe's YAML file, as the worker sees it.
        overrides: changes to the file, each 'dotted.path=value'.
    """
    chosen = with_registry(recipe if recipe is not None else load_recipe(recipe_file, overrides or ()))
    store = open_store(chosen.run.store, chosen.run.s3)
    done = {node.name: compute(chosen, node.name) for node in walk(chosen, store)}
    _show(chosen, store, done)
    return done


def _show(recipe: Recipe, store: Store, done: dict[str, Artifact]) -> None:
    """Results in the Prefect UI: the stages as a table, the report as text."""
    rows = [
        {"stage": n, "result": "hit" if a.hit else "computed", "seconds": round(a.seconds, 1), "fingerprint": a.fingerprint}
        for n, a in done.items()
    ]
    create_table_artifact(key=f"{_key(recipe.name)}-stages", table=rows, description=f"Stages of {recipe.name}")
    report = find(store, "report", build_graph(recipe, store)["report"].fingerprint)
    assert report is not None, "the flow has just computed it"
    create_markdown_artifact(
        key=f"{_key(recipe.name)}-report", markdown=read_bytes(store, report, "report.md").decode(), description=report.summary["headline"]
    )


def _key(name: str) -> str:
    """Artifact keys in Prefect are lower-case letters, digits and dashes."""
    return name.replace(".", "-").replace("_", "-")
