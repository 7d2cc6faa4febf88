"""Kinds of task: each is one file here and one line in ``kinds`` and in the recipe's union of tasks."""

from functools import cache

from kd_core.recipe import ClassificationTask, Recipe, Task
from kd_core.task_kinds.protocol import Curation, NewTeacher, TaskKind, TaskModel, Workplace

__all__ = ["Curation", "NewTeacher", "TaskKind", "TaskModel", "Workplace", "kind_of", "kinds"]


@cache
def kinds() -> dict[type, TaskKind]:
    """Class of a recipe's task -> what the stages do for it."""
    from kd_core.task_kinds.classification import Classification
    from kd_core.task_kinds.generation import Generation

    return {Task: Generation(), ClassificationTask: Classification()}


def kind_of(recipe: Recipe) -> TaskKind:
    """The kind of a recipe's task."""
    return kinds()[type(recipe.task)]
