"""Feature distillation from recipe to written student: cached and live states, relations, and a model without a trace of them."""

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from kd_core.artifacts import find, materialize
from kd_core.errors import SoftLabelError
from kd_core.progress import silent
from kd_core.recipe.files import load_recipe
from kd_core.stages import hidden_states
from kd_core.stages import train as train_stage_module
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.task_kinds import generation
from kd_core.train.history import logged_metrics

CAPTURED = "hidden_states={blocks: [0, 1], width: 8, reduce: project}"
FEATURES: dict[str, dict[str, Any]] = {
    "cached": {"kind": "hidden_states", "source": "cached", "blocks": [{"student": 0, "teacher": 1}], "weight": 0.5},
    "live": {"kind": "hidden_states", "source": "live", "loss": "cosine"},
    "relations": {"kind": "relations", "num_heads": 4},
}


@pytest.mark.parametrize("name", FEATURES)
def test_a_student_learns_features_and_is_written_as_a_plain_model(name: str, copy, tmp_path, monkeypatch, caplog) -> None:
    store = LocalStore(copy.store)
    overrides = [f"objective.features={json.dumps(FEATURES[name])}", *([CAPTURED] if name == "cached" else [])]
    recipe = load_recipe(copy.recipe_file, overrides)
    nodes = build_graph(recipe, store)
    assert ("hidden_states" in nodes["student.0"].upstream) == (name == "cached")
    assert "hidden_states" not in nodes["ablation_hard.0"].upstream
    if name == "cached":
        run_node(recipe, build_graph(recipe, store), "hidden_states", store=store, tick=silent, extra={})
        monkeypatch.setattr(train_stage_module, "load_text_teacher", lambda job: pytest.fail("cached states need no teacher"))
    with caplog.at_level(logging.INFO):
        assert not run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={}).hit
    assert "features: the student's blocks learn from the teacher's: 0 from 1" in caplog.text
    record = find(store, "train", nodes["student.0"].fingerprint)
    assert record is not None
    assert record.summary["feature_blocks"] == [[0, 1]]
    first, last = (logged_metrics(store, record)[i] for i in (0, -1))
    assert 0.0 < last["feature"] < first["feature"]
    assert first["gradient_norm_feature"] > 0.0
    plain = find(store, "train", build_graph(load_recipe(copy.recipe_file), store)["student.0"].fingerprint)
    assert plain is not None
    assert "feature" not in logged_metrics(store, plain)[0]
    files = [materialize(store, one, tmp_path / one.fingerprint) / "model" for one in (record, plain)]
    with_features, without = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in files)
    assert {key: value.shape for key, value in with_features.items()} == {key: value.shape for key, value in without.items()}
    assert record.summary["bytes"] == plain.summary["bytes"]


def test_damaged_states_are_captured_again_in_the_same_run(copy, caplog) -> None:
    store = LocalStore(copy.store)
    recipe = load_recipe(copy.recipe_file, [f"objective.features={json.dumps(FEATURES['cached'])}", CAPTURED])
    run_node(recipe, build_graph(recipe, store), "hidden_states", store=store, tick=silent, extra={})
    shard = sorted((copy.store / "rows/hidden_states").rglob("*.parquet"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000] + bytes([whole[2000] ^ 8]) + whole[2001:])
    assert not run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={}).hit
    assert "computed again" in caplog.text
    assert shard.read_bytes() == whole


def test_rows_the_teacher_fails_on_are_left_out_of_states_as_of_labels(copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget of refused rows is one for both; a row that has labels alone is an error, never another row's states."""
    store = LocalStore(copy.store)

    def failing(real, one_in: int, results: str):
        def call(teacher, rows, **named):
            bad = {key for key, row in rows if sum(row.ids) % one_in == 0}
            found = real(teacher, rows, **named)
            kept = {results: tuple(one for one in getattr(found, results) if one.key not in bad)}
            return replace(found, refused=found.refused | dict.fromkeys(bad, "the teacher gave NaN"), **kept)

        return call

    labels = {"kind": "sampled", "num_draws": 7, "temperature": 2.0, "max_refused_rows": 90}
    overrides = [f"soft_labels={json.dumps(labels)}", "objective.temperature=2.0", f"objective.features={json.dumps(FEATURES['cached'])}"]
    recipe = load_recipe(copy.recipe_file, [*overrides, "hidden_states={blocks: [1]}"])
    monkeypatch.setattr(generation, "score_rows", failing(generation.score_rows, 8, "scored"))
    real = hidden_states.capture_hidden
    monkeypatch.setattr(hidden_states, "capture_hidden", failing(real, 8, "captured"))
    for name in ("soft_labels", "hidden_states"):
        run_node(recipe, build_graph(recipe, store), name, store=store, tick=silent, extra={})
    nodes = build_graph(recipe, store)
    refused = [find(store, name, nodes[name].fingerprint).summary["rows_refused"] for name in ("soft_labels", "hidden_states")]
    assert 0 < refused[0] == refused[1] <= 90
    assert not run_node(recipe, build_graph(recipe, store), "student.0", store=store, tick=silent, extra={}).hit
    more = load_recipe(copy.recipe_file, [*overrides, "hidden_states={blocks: [0, 1]}"])
    monkeypatch.setattr(hidden_states, "capture_hidden", failing(real, 4, "captured"))
    run_node(more, build_graph(more, store), "hidden_states", store=store, tick=silent, extra={})
    with pytest.raises(SoftLabelError, match=r"\d+ curated rows have soft labels and no hidden states, .*; load it in float32, or set"):
        run_node(more, build_graph(more, store), "student.0", store=store, tick=silent, extra={})
