"""One node, computed in this process or in a worker process, with what hears of it. Knows no orchestrator."""

from collections.abc import Mapping

from kd_core.artifacts import Artifact
from kd_core.progress import Tick, Ticker, silent
from kd_core.recipe import Recipe
from kd_core.stages.graph import Graph
from kd_core.stages.run import StageFunction, found_done, run_node
from kd_core.stages.workers import Workers
from kd_core.store import open_store
from tasks.listener import Listener
from tasks.publish import publish_stage

__all__ = ["EXTRA_STAGES", "compute_node"]

EXTRA_STAGES: Mapping[str, StageFunction] = {"publish": publish_stage}
"""Stages that need a registry, which kd_core does not know."""


def compute_node(
    recipe: Recipe, nodes: Graph, name: str, *, workers: Workers | None, listener: Listener | None, tick: Ticker = silent
) -> Artifact:
    """Compute one node, or find it done.

    Args:
        recipe: the recipe.
        nodes: its graph.
        name: a node whose upstream nodes are done.
        workers: processes to compute it in; None: here.
        listener: hears when it begins, goes on and is done.
        tick: hears its progress besides.
    """
    store = open_store(recipe.run.store, recipe.run.s3)

    def begun() -> None:
        if listener is not None:
            listener.start(name)

    def hear(found: Tick) -> None:
        tick(found)
        if listener is not None:
            listener.tick(name, found)

    artifact = found_done(recipe, store, nodes, name)
    if artifact is None and workers is not None:
        artifact = workers.run(nodes, name, begun=begun, tick=hear)
    elif artifact is None:
        begun()
        artifact = run_node(recipe, nodes, name, store=store, tick=hear, extra=EXTRA_STAGES)
    if listener is not None:
        listener.done(name, artifact)
    return artifact
