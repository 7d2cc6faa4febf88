"""Which items a suite measures: written once for the stages that evaluate, report and plan."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import SourceError
from kd_core.recipe import Recipe, SourceSuite

__all__ = ["held_out_items", "suite_items"]


def held_out_items(prompts: pa.Table) -> pa.Table:
    """The test side of a recipe's own prompts, without what has neither a gold nor a final answer."""
    test = prompts.filter(pc.equal(prompts["split"], "test"))
    return test.filter(pc.or_(pc.is_valid(test["gold"]), pc.is_valid(test["reference"])))


def suite_items(recipe: Recipe, read: Callable[[str], pa.Table]) -> dict[str, pa.Table]:
    """Items of every suite by name (PROMPT_SCHEMA), in hash order, cut to the suite's limit.

    Args:
        recipe: whose suites.
        read: file name -> table, of the finished 'prompts' artifact.

    Raises:
        SourceError: a suite has no item with a gold or a final answer.
    """
    found = {}
    for i, suite in enumerate(recipe.evaluation.suites):
        table = read(f"suite-{suite.name}.parquet") if isinstance(suite, SourceSuite) else held_out_items(read("prompts.parquet"))
        if not table.num_rows:
            where = f"evaluation.suites.{i}: suite {suite.name}"
            raise SourceError(f"{where} has no item with a gold or a final answer; check its source, or raise prompts.split.test")
        found[suite.name] = table.slice(0, suite.limit)
    return found
