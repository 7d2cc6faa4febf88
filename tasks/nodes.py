"""The one Prefect task: compute a node of the recipe's graph.

It takes a recipe and a name and returns a small reference; the store decides what is done. Prefect's own cache is off:
it knows nothing of objects that are gone.
"""

import time
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from kd_core.artifacts import Artifact
from kd_core.errors import IntegrityError, StoreError
from kd_core.progress import Tick
from kd_core.recipe import Recipe
from kd_core.stages.run import run_node
from kd_core.store import open_store
from tasks.listener import current_listener
from tasks.publish import publish_stage

__all__ = ["compute"]

_SECONDS_BETWEEN_UPDATES = 2.0


class _ProgressArtifact:
    """Progress of one node in the Prefect UI; made at the first tick, updated at most every two seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.sent = name, 0.0
        self.artifact: UUID | None = None

    def __call__(self, tick: Tick) -> None:
        if (listener := current_listener()) is not None:
            listener.tick(tick)
        now, finished = time.monotonic(), tick.done >= tick.total
        if not finished and now - self.sent < _SECONDS_BETWEEN_UPDATES:
            return
        self.sent = now
        percent = 100.0 * tick.done / max(1, tick.total)
        text = f"{self.name}: {tick.done} of {tick.total} {tick.unit}" + (f", {tick.note}" if tick.note else "")
        if self.artifact is None:
            self.artifact = create_progress_artifact(progress=percent, description=text)
        else:
            update_progress_artifact(self.artifact, progress=percent, description=text)


def _is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Whether another attempt can help: the store could not be reached. Wrong bytes and wrong recipes stay wrong."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StoreError) and not isinstance(error, IntegrityError)


@task(task_run_name="{name}", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[5, 30], retry_condition_fn=_is_transient)
def compute(recipe: Recipe, name: str) -> Artifact:
    """Compute one node, or find it done."""
    store = open_store(recipe.run.store, recipe.run.s3)
    listener = current_listener()
    if listener is not None:
        listener.start(name)
    artifact = run_node(recipe, name, store=store, tick=_ProgressArtifact(name), extra={"publish": publish_stage})
    if listener is not None:
        listener.done(artifact)
    return artifact
