"""The main flow: a recipe in, a promoted student with its evidence out.

The order of the stages is ``kd_core.stages.order.run_graph``, the same that ``kd run --local`` follows; this file adds the
orchestrator and nothing else. Nodes that are computed side by side are submitted with what they wait for, so the UI draws the graph.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect import State, flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.futures import PrefectFuture

from flows.registry import with_registry
from kd_core.artifacts import Artifact, find, read_bytes
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import Graph, Node, build_graph
from kd_core.stages.order import Pending, Submit, run_graph, when_all_done
from kd_core.stages.workers import device_slots
from kd_core.store import Store, open_store
from kd_core.summaries import ReportSummary, of
from tasks.listener import current_listener
from tasks.nodes import compute, computing_in, unseen

__all__ = ["distill"]


@flow(name="distill", flow_run_name="distill-{recipe_file}", validate_parameters=True)
def distill(recipe: Recipe | None = None, recipe_file: str = "quickstart", overrides: list[str] | None = None) -> dict[str, Artifact]:
    """Distil a student and publish it if the evidence allows.

    Args:
        recipe: a whole recipe, as the form in the UI builds it; leave it empty to use a file.
        recipe_file: a recipe's YAML file as the worker sees it, or the name of a shipped recipe.
        overrides: changes to the file, each 'dotted.path=value'.
    """
    chosen = with_registry(recipe if recipe is not None else load_recipe(recipe_file, overrides or ()))
    store = open_store(chosen.run.store, chosen.run.s3)
    nodes = build_graph(chosen, store)
    done = when_all_done(chosen, store, nodes)
    if done is None:
        slots = device_slots(chosen.run)
        with computing_in(chosen, slots):
            done = run_graph(chosen, store, _one_by_one(chosen) if len(slots) == 1 else _side_by_side(chosen), nodes=nodes)
    else:  # a task run for each of them would take seconds and say no more than the table
        _tell(done)
    _show(chosen, store, done)
    return done


def _tell(done: dict[str, Artifact]) -> None:
    """Name the nodes of a run that was found done to whoever listens."""
    if (listener := current_listener()) is not None:
        for name, artifact in done.items():
            listener.done(name, artifact)


@dataclass(frozen=True)
class _Done:
    """A task run that is over, and what it left; task runs that wait for it are drawn below it."""

    state: State[Artifact]
    artifact: Artifact

    def result(self) -> Artifact:
        """The artifact."""
        return self.artifact


def _one_by_one(recipe: Recipe) -> Submit:
    """Nodes as task runs in this thread: where there is one slot, an interrupt ends the node at once."""

    def submit(nodes: Graph, node: Node, above: Sequence[Any]) -> _Done:
        state = compute(recipe, unseen(nodes), node.name, wait_for=[upstream.state for upstream in above], return_state=True)
        return _Done(state, state.result())

    return submit


def _side_by_side(recipe: Recipe) -> Submit:
    """Nodes as task runs in threads, each of which waits for a worker process."""

    def submit(nodes: Graph, node: Node, above: Sequence[Any]) -> Pending:
        future: PrefectFuture[Artifact] = compute.submit(recipe, unseen(nodes), node.name, return_state=False, wait_for=above)
        return future

    return submit


def _show(recipe: Recipe, store: Store, done: dict[str, Artifact]) -> None:
    """Results in the Prefect UI: the stages as a table, the report as text."""
    rows = [
        {"stage": n, "result": "hit" if a.hit else "computed", "seconds": round(a.seconds, 1), "fingerprint": a.fingerprint}
        for n, a in done.items()
    ]
    create_table_artifact(key=f"{_key(recipe.name)}-stages", table=rows, description=f"Stages of {recipe.name}")
    report = find(store, "report", done["report"].fingerprint)
    assert report is not None, "the flow has just computed it"
    create_markdown_artifact(
        key=f"{_key(recipe.name)}-report",
        markdown=read_bytes(store, report, "report.md").decode(),
        description=of(report, ReportSummary).headline,
    )


def _key(name: str) -> str:
    """Artifact keys in Prefect are lower-case letters, digits and dashes."""
    return name.replace(".", "-").replace("_", "-")
