"""A run through Prefect from the command line: a server if PREFECT_API_URL names one, else a temporary one.

The settings are made before Prefect is imported, because it reads them then.
"""

import os
from pathlib import Path

from kd_core.artifacts import Artifact
from kd_core.recipe import Recipe
from kd_core.store.local import make_directory
from tasks.listener import Listener, listening

__all__ = ["run_with_prefect"]

_SETTINGS = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # the display shows progress, and errors come back as exceptions
    "PREFECT_LOGGING_ROOT_LEVEL": "CRITICAL",  # the recorder of events complains there when a flow ends at once
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",  # the default of 20 s is too short on a busy machine
}


def run_with_prefect(recipe: Recipe, listener: Listener) -> dict[str, Artifact]:
    """Run the distill flow in this process.

    Returns:
        Node name -> artifact, in the order of the graph.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    home = os.environ.setdefault("PREFECT_HOME", str(Path(".kd/prefect").absolute()))
    make_directory(Path(home))  # Prefect makes only the last folder, and warns
    from flows.distill import distill

    with listening(listener):
        return distill(recipe=recipe, recipe_file=recipe.name)
