"""Items that a suite measures, and whether a gate can judge by them: written once for whoever evaluates, reports and plans."""

from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from kd_core.errors import SourceError
from kd_core.evaluate.gate import LEAST_MEASURED
from kd_core.recipe import Ceiling, Recipe, SourceSuite

__all__ = ["expect_measurable", "held_out_items", "suite_items"]


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


_NEEDS = {"pass_at_1": "reference", "accuracy": "gold", "nll": "gold", "kl": "gold", "agreement": "gold"}


def expect_measurable(recipe: Recipe, items: Mapping[str, pa.Table]) -> None:
    """Refuse, before anything is trained, suites by which the gate could not promote: it would say so after the last student.

    Args:
        recipe: whose suites and gate.
        items: of every suite, as ``suite_items`` gives them.

    Raises:
        SourceError: a suite has fewer than two items, too few that anything can be measured on, or too few for a rule's metric.
    """
    sampled = recipe.evaluation.generate is not None
    for i, suite in enumerate(recipe.evaluation.suites):
        table, where = items[suite.name], f"evaluation.suites.{i}: suite {suite.name}"
        if table.num_rows < 2:
            raise SourceError(f"{where} has {table.num_rows} item, which says nothing of others; give it at least 2, hundreds if you can")
        shares = {metric: 1.0 - table[column].null_count / table.num_rows for metric, column in _NEEDS.items()}
        asked = {r.metric for r in recipe.gate.rules if not isinstance(r, Ceiling) and r.suite in (None, suite.name)}
        if "unseen_recall" in asked:
            _expect_unseen(recipe, table, where)
        for metric in sorted(asked - {"unseen_recall"}):
            if shares[metric] < LEAST_MEASURED:
                raise SourceError(
                    f"{where}: a gate rule asks for {metric}, which needs a {_NEEDS[metric]} answer, and {shares[metric]:.0%} of its "
                    f"{table.num_rows} items have one; at least {LEAST_MEASURED:.0%} must: fill it in, or name the rule's suite"
                )
        if max(shares["nll"], shares["pass_at_1"] if sampled else 0.0) < LEAST_MEASURED:
            raise SourceError(
                f"{where}: {shares['nll']:.0%} of its {table.num_rows} items have a gold answer and {shares['pass_at_1']:.0%} a reference"
                f"{'' if sampled else ', which needs evaluation.generate'}; at least {LEAST_MEASURED:.0%} must have one kind to be measured"
            )


def _expect_unseen(recipe: Recipe, table: pa.Table, where: str) -> None:
    left_out = recipe.curate.leave_out_classes or ()
    found = sum(name in left_out for name in table["gold"].to_pylist())
    if found < 2:
        raise SourceError(
            f"{where}: a gate rule asks for unseen_recall, and {found} of its items are of the classes {', '.join(left_out)}; "
            "at least 2 must be"
        )
