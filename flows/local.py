"""A run without an orchestrator: the same graph, its nodes computed here one after another, or side by side in worker processes."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kd_core.artifacts import Artifact
from kd_core.recipe import Recipe
from kd_core.stages.graph import Graph, Node
from kd_core.stages.order import Pending, run_graph
from kd_core.stages.workers import Workers, device_slots
from kd_core.store import Store
from tasks.computing import EXTRA_STAGES, compute_node
from tasks.listener import Listener

__all__ = ["run_local"]


@dataclass(frozen=True)
class _Done:
    """A node that was computed when it was handed out."""

    artifact: Artifact

    def result(self) -> Artifact:
        """The artifact."""
        return self.artifact


def run_local(recipe: Recipe, store: Store, nodes: Graph, listener: Listener) -> dict[str, Artifact]:
    """Compute every node of a recipe without Prefect.

    Returns:
        Node name -> artifact, in the order of the graph.
    """
    slots = device_slots(recipe.run)
    if len(slots) == 1:

        def compute_here(graph: Graph, node: Node, above: Sequence[Pending]) -> Pending:
            return _Done(compute_node(recipe, graph, node.name, workers=None, listener=listener))

        return run_graph(recipe, store, compute_here, nodes=nodes)
    with ThreadPoolExecutor(max_workers=2 * len(nodes)) as threads, Workers(recipe, slots, EXTRA_STAGES) as workers:  # a thread a node

        def compute(graph: Graph, node: Node, above: Sequence[Pending]) -> Artifact:
            try:
                for upstream in above:
                    upstream.result()
                return compute_node(recipe, graph, node.name, workers=workers, listener=listener)
            except BaseException as error:
                workers.end(error)
                raise

        return run_graph(recipe, store, lambda graph, node, above: threads.submit(compute, graph, node, above), nodes=nodes)
