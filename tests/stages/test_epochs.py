"""Training by epochs: steps follow from all curated rows, for every compared model alike, and the plan tells them before and after."""

import json
from pathlib import Path

import pytest

from kd_core.artifacts import Record, find
from kd_core.planning.plan import make_plan
from kd_core.progress import silent
from kd_core.recipe import Recipe
from kd_core.recipe.files import parse_recipe
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.summaries import CurateSummary, TrainSummary, of

SIZE = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "max_positions": 64}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = [{"q": f"{a}+{b}=", "a": f"#{a + b}"} for a in range(10) for b in range(10)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "file", "path": str(tmp_path / "q.jsonl"), "prompt": "{q}", "gold": "{a}"}
    data = {
        "name": "by-epochs",
        "seeds": [0, 1],
        "task": {"answer_marker": "#", "verifier": "math"},
        "prompts": {"sources": [source]},
        "teacher": {
            "kind": "trained",
            "sources": [source],
            "tokenizer": {"kind": "characters", "alphabet": "0123456789+=#"},
            "architecture": SIZE,
            "training": {"steps": 4, "batch_rows": 8, "learning_rate": 0.003},
        },
        "answers": {"max_tokens": 6},
        "curate": {"verify": False, "keep_truncated": True},
        "student": {"kind": "config", "architecture": SIZE},
        "training": {"epochs": 0.5, "batch_rows": 8},
        "run": {"threads": 1, "device": "cpu"},
    }
    return parse_recipe(data, origin="test")


def test_compared_models_take_the_steps_that_all_curated_rows_make(recipe: Recipe, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    (before,) = [note for note in make_plan(recipe, store).notes if note.startswith("training: ")]
    records: dict[str, Record] = {}
    for name in ("prompts", "teacher", "answers", "curate", "soft_labels", "student.0", "baseline.0"):
        node = build_graph(recipe, store)[name]
        run_node(recipe, build_graph(recipe, store), name, store=store, tick=silent, extra={})
        record = find(store, node.stage, node.fingerprint)
        assert record is not None
        records[name] = record
    curated = of(records["curate"], CurateSummary).rows
    steps = -(-curated // 16)
    student, baseline = (of(records[name], TrainSummary).training for name in ("student.0", "baseline.0"))
    assert baseline.rows < student.rows == curated
    assert student.steps == baseline.steps == steps > 2
    assert before.startswith("training: 0.5 epochs, of at most ")
    (after,) = [note for note in make_plan(recipe, store).notes if note.startswith("training: ")]
    assert after == f"training: 0.5 epochs, of {curated:,} rows by 8: {steps:,} steps a model and seed"
