"""A run without an orchestrator: the same graph, the same nodes, called in place."""

from kd_core.artifacts import Artifact
from kd_core.recipe import Recipe
from kd_core.stages.graph import walk
from kd_core.stages.run import run_node
from kd_core.store import Store
from tasks.listener import Listener
from tasks.publish import publish_stage

__all__ = ["run_local"]


def run_local(recipe: Recipe, store: Store, listener: Listener) -> dict[str, Artifact]:
    """Compute every node of a recipe in this process.

    Returns:
        Node name -> artifact, in the order of the graph.
    """
    done = {}
    for node in walk(recipe, store):
        listener.start(node.name)
        done[node.name] = run_node(recipe, node.name, store=store, tick=listener.tick, extra={"publish": publish_stage})
        listener.done(done[node.name])
    return done
