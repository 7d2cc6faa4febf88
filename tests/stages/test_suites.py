"""Suites by which a gate could not decide are refused before anything is trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kd_core.errors import SourceError
from kd_core.evaluate.suites import expect_measurable
from kd_core.prompts.rows import PROMPT_SCHEMA
from kd_core.recipe import Recipe
from kd_core.recipe.files import load_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"
CEILING = "gate.rules=[{kind: ceiling, metric: parameter_ratio, maximum: 1}]"


def items(num_items: int, *, gold: int, reference: int) -> dict[str, pa.Table]:
    """A suite of which the first ``gold`` items have a worked answer and the first ``reference`` a final one."""
    rows = [
        {
            "prompt_id": f"{i:032x}",
            "prompt": f"{i}+{i}=",
            "gold": f"{2 * i}" if i < gold else None,
            "reference": f"{2 * i}" if i < reference else None,
            "source": "test",
            "split": "test",
        }
        for i in range(num_items)
    ]
    return {"held_out": pa.Table.from_pylist([{name: row.get(name) for name in PROMPT_SCHEMA.names} for row in rows], schema=PROMPT_SCHEMA)}


def recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, overrides)


def test_whole_suites_pass() -> None:
    expect_measurable(recipe(), items(20, gold=20, reference=20))
    expect_measurable(recipe(), items(20, gold=0, reference=18))  # nll is measured on none, and no rule asks for it
    expect_measurable(recipe(CEILING, "evaluation.generate=null"), items(20, gold=18, reference=0))


@pytest.mark.parametrize(
    ("overrides", "suite", "message"),
    [
        ((), items(1, gold=1, reference=1), "evaluation.suites.0: suite held_out has 1 item, which says nothing of others"),
        ((), items(20, gold=20, reference=17), r"a gate rule asks for pass_at_1, which needs a reference answer, and 85% of its 20 items"),
        ((CEILING,), items(20, gold=10, reference=10), r"50% of its 20 items have a gold answer and 50% a reference; at least 90%"),
        ((CEILING, "evaluation.generate=null"), items(20, gold=0, reference=20), "100% a reference, which needs evaluation.generate"),
    ],
)
def test_suites_that_say_too_little_are_refused(overrides: tuple[str, ...], suite: dict[str, pa.Table], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        expect_measurable(recipe(*overrides), suite)


def test_a_rule_asks_of_the_suite_it_names_alone() -> None:
    second = "evaluation.suites=[{kind: held_out, name: held_out}, {kind: held_out, name: second}]"
    tables = {**items(20, gold=20, reference=20), "second": items(20, gold=20, reference=0)["held_out"]}
    named = "gate.rules=[{kind: floor, metric: pass_at_1, minimum: 0.5, suite: held_out}]"
    expect_measurable(recipe(second, named), tables)
    with pytest.raises(SourceError, match="suite second: a gate rule asks for pass_at_1"):
        expect_measurable(recipe(second, named.replace(", suite: held_out", "")), tables)


def test_plan_and_run_refuse_a_suite_of_one_item_before_training(kd: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"q": f"{i}+{i}=", "a": f"{2 * i}#{2 * i}"}) + "\n" for i in range(40)))
    source = f"[{{kind: file, path: {tmp_path / 'q.jsonl'}, prompt: '{{q}}', gold: '{{a}}'}}]"
    changes = [f"prompts.sources={source}", "evaluation.suites.0.limit=1", "prompts.split.test=0.3", f"run.store={tmp_path / 'store'}"]
    for command in (("plan",), ("run", "--local")):
        called = kd(*command, QUICKSTART, *(word for change in changes for word in ("--set", change)))
        assert called.code == 2
        assert "suite held_out has 1 item, which says nothing of others" in called.out + called.err, "a plan prints what will fail"
        assert "+ prompts" not in called.err + called.out
