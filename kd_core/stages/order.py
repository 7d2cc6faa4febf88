"""The order of a run, written once: which nodes are started when, whoever computes them.

A node is handed out with what stands above it, and the one who computes it (``Submit``) says what it gets back: something whose result can
be waited for. So a run in one process, one in several processes, and one of Prefect tasks follow the same graph.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from kd_core.artifacts import Artifact
from kd_core.recipe import Recipe
from kd_core.stages.graph import VERDICT, Graph, Node, build_graph, with_verdict
from kd_core.stages.run import found_done
from kd_core.store import Store

__all__ = ["Pending", "Submit", "run_graph", "when_all_done"]


class Pending(Protocol):
    """A node that was handed out."""

    def result(self) -> Artifact:
        """Wait for it.

        Raises:
            KDError: it could not be computed.
        """
        ...


Submit = Callable[[Graph, Node, Sequence[Pending]], Pending]
"""(graph, node, what it waits for) -> the node as it is computed. May return at once, or when the node is done."""


def when_all_done(recipe: Recipe, store: Store, nodes: Graph) -> dict[str, Artifact] | None:
    """Node name -> artifact where every node is done; None where one is not. Looks into the store, starts nothing."""
    done: dict[str, Artifact] = {}
    for name in nodes:
        if (artifact := found_done(recipe, store, nodes, name)) is None:
            return None
        done[name] = artifact
    return done


def run_graph(recipe: Recipe, store: Store, submit: Submit, *, nodes: Graph | None = None) -> dict[str, Artifact]:
    """Compute every node of a recipe, each as soon as what stands above it is done.

    The last part of the graph is drawn again once the students are trained, because only then is known which champion they face.

    Args:
        recipe: the recipe.
        store: where artifacts live.
        submit: hands a node out.
        nodes: the recipe's graph, if it was drawn already.

    Returns:
        Node name -> artifact, in the order of the graph.
    """
    first = build_graph(recipe, store) if nodes is None else nodes
    pending: dict[str, Pending] = {}

    def start(graph: Graph, names: Sequence[str]) -> None:
        for name in names:
            pending[name] = submit(graph, graph[name], [pending[above] for above in graph[name].upstream.values()])

    start(first, [name for name in first if name not in VERDICT])
    for seed in recipe.seeds:
        pending[f"student.{seed}"].result()
    last = with_verdict(recipe, store, first)
    start(last, [name for name in last if name not in pending])
    return {name: pending[name].result() for name in last}
