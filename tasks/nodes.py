"""The one Prefect task: compute a node of the recipe's graph.

It takes a recipe, its graph and a name, and returns a small reference; the store decides what is done. Prefect's own cache is off:
it knows nothing of objects that are gone.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.utilities.annotations import quote

from kd_core.artifacts import Artifact
from kd_core.errors import IntegrityError, StoreError
from kd_core.progress import Tick
from kd_core.recipe import Recipe
from kd_core.stages.graph import Graph
from kd_core.stages.workers import Workers
from tasks.computing import EXTRA_STAGES, compute_node
from tasks.listener import current_listener

__all__ = ["compute", "computing_in", "unseen"]

_SECONDS_BETWEEN_UPDATES = 2.0

_workers: ContextVar[Workers | None] = ContextVar("workers", default=None)


def unseen(nodes: Graph) -> Graph:
    """The graph as an argument that Prefect hands on as it is, without looking for task runs in it."""
    return cast(Graph, quote(nodes))


@contextmanager
def computing_in(recipe: Recipe, slots: list[str | None]) -> Iterator[None]:
    """Let the nodes of this context be computed in worker processes, one a slot; a single slot is this process."""
    if len(slots) == 1:
        yield
        return
    with Workers(recipe, slots, EXTRA_STAGES) as workers:
        token = _workers.set(workers)
        try:
            yield
        finally:
            _workers.reset(token)


class _ProgressArtifact:
    """Progress of one node in the Prefect UI; made at the first tick, updated at most every two seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.sent = name, 0.0
        self.artifact: UUID | None = None

    def __call__(self, tick: Tick) -> None:
        now, finished = time.monotonic(), tick.done >= tick.total
        if not finished and now - self.sent < _SECONDS_BETWEEN_UPDATES:
            return
        self.sent = now
        percent = 100.0 * tick.done / max(1, tick.total)
        text = f"{self.name}: {tick.done} of {tick.total} {tick.unit}" + (f", {tick.note}" if tick.note else "")
        if self.artifact is None:
            self.artifact = cast(UUID, create_progress_artifact(progress=percent, description=text))
        else:
            update_progress_artifact(self.artifact, progress=percent, description=text)


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Whether another attempt can help: the store could not be reached. Wrong bytes and wrong recipes stay wrong."""
    if (workers := _workers.get()) is not None and workers.ended:
        return False
    error = state.result(raise_on_failure=False)
    return isinstance(error, StoreError) and not isinstance(error, IntegrityError)


def _end_the_others(_task: Any, _run: Any, state: Any) -> None:
    """The first node that fails for good ends those that are computed beside it, as in a run of one process."""
    if (workers := _workers.get()) is not None:
        workers.end(state.result(raise_on_failure=False))


@task(
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[5, 30],
    retry_condition_fn=_is_transient,
    on_failure=[_end_the_others],
)
def compute(recipe: Recipe, nodes: Graph, name: str) -> Artifact:
    """Compute one node, or find it done."""
    return compute_node(recipe, nodes, name, workers=_workers.get(), listener=current_listener(), tick=_ProgressArtifact(name))
