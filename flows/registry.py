"""Where a recipe is published: its own field, the environment, or the local database, written out before anything runs."""

from kd_core.recipe import Recipe
from tasks.tracking import default_tracking_uri

__all__ = ["with_registry"]


def with_registry(recipe: Recipe) -> Recipe:
    """The recipe with the address of its model registry written out."""
    run = recipe.run.model_copy(update={"tracking": default_tracking_uri(recipe.run.tracking)})
    return recipe.model_copy(update={"run": run})
