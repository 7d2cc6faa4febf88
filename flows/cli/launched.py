"""``kd run`` under torchrun or accelerate launch: its first process does all the work and starts the ranks of training itself.

A launcher starts everything N times; of a recipe only training is work for N. So the others end at once, and N becomes
``run.num_processes``. Launches over several machines are refused.
"""

import os

from kd_core.errors import RecipeError

__all__ = ["as_launched"]

_OF_A_RANK = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "TORCHELASTIC_")


def as_launched(overrides: list[str]) -> list[str] | None:
    """The overrides of a run, with the number of processes that a launcher was asked for; None where another process does the run.

    What says that this process is a rank is taken out of the environment.

    Raises:
        RecipeError: launched over several machines.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    for name in [name for name in os.environ if name.startswith(_OF_A_RANK)]:
        del os.environ[name]
    if world == 1:
        return overrides
    if here != world:
        raise RecipeError(
            f"launched as {world} processes, {here} of them on this machine: kd trains a student on one machine; launch there alone, or "
            "start kd once, with --set run.num_processes=N"
        )
    return [*overrides, f"run.num_processes={world}"] if rank == 0 else None
