"""Pairs with the verdict a person gives, each judged from both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from kd_core.curate import judge
from kd_core.recipe import Task

WHOLE = Task(template="plain", verifier="math")
GOLDEN: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("golden_answers.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_there_are_many_pairs_of_either_kind_each_once() -> None:
    assert len({(pair["answer"], pair["reference"]) for pair in GOLDEN}) == len(GOLDEN) >= 900
    assert min(sum(pair["equal"] for pair in GOLDEN), sum(not pair["equal"] for pair in GOLDEN)) >= 400
    assert len({pair["source"] for pair in GOLDEN}) >= 60


@pytest.mark.parametrize("source", sorted({pair["source"] for pair in GOLDEN}))
def test_golden_pairs_from_both_sides(source: str) -> None:
    failed = []
    for pair in GOLDEN:
        if pair["source"] == source:
            found = judge(pair["answer"], pair["reference"], WHOLE)
            turned = judge(pair["reference"], pair["answer"], WHOLE)
            if (found == "right") != pair["equal"] or turned != found:
                failed.append((pair, found, turned))
    assert failed == []
