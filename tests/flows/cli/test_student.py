"""``kd student describe``: one table, one JSON, refusals as one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[3] / "recipes"


def test_a_table_and_the_same_as_json(kd: Callable[..., Any]) -> None:
    called = kd("student", "describe", RECIPES / "quickstart.yaml", "--json")
    assert (called.code, called.err) == (0, "")
    said = json.loads(called.out)
    assert said["ratios"]["parameters"] == said["student"]["parameters"] / said["teacher"]["parameters"]
    assert said["student"]["dtype"] == "float32"
    table = kd("student", "describe", RECIPES / "quickstart.yaml").out
    for name in ("parameters", "flops_a_token", "kv_cache_bytes_a_token"):
        assert f"{said['student'][name]:,}" in table
        assert f"{said['teacher'][name]:,}" in table
    assert list(Path().iterdir()) == [], "it writes nothing"


def test_a_student_the_teacher_cannot_give_is_refused(kd: Callable[..., Any]) -> None:
    called = kd("student", "describe", RECIPES / "quickstart.yaml", "--set", "student={kind: from_teacher, blocks: [0, 99]}")
    assert (called.code, called.out) == (2, "")
    assert called.err.startswith("kd: student.blocks: 99, and the teacher has ")
