"""Students of a whole run: from the teacher's width with adapters, the artifact is a plain model of the promised size."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd_core.artifacts import find, materialize
from kd_core.recipe.files import load_recipe
from kd_core.stages.graph import build_graph
from kd_core.store import LocalStore

STUDENT = {
    "kind": "from_teacher",
    "last_blocks": 1,
    "narrower": {"num_heads": 1, "intermediate_size": 24, "sample_rows": 8},
    "share_embeddings": True,
}


@pytest.mark.parametrize("adapter", [None, {"kind": "dora", "rank": 2, "alpha": 4}])
def test_a_narrower_student_is_trained_and_written_as_a_plain_model(
    adapter: dict[str, Any] | None, copy: Any, kd: Callable[..., Any], tmp_path
) -> None:
    overrides = [f"student={json.dumps({**STUDENT, 'adapter': adapter})}", "evaluation.compare=[teacher]"]
    rules = [{"kind": "ceiling", "metric": "parameter_ratio", "maximum": 0.6}]
    overrides += [f"gate.rules={json.dumps(rules)}", f"run.store={copy.store}", f"run.tracking={copy.tracking}"]
    words = [word for override in overrides for word in ("--set", override)]
    called = kd("run", "--local", "--json", copy.recipe_file, *words)
    assert called.code == 0, called.err
    described = json.loads(kd("student", "describe", copy.recipe_file, *words, "--json").out)["student"]
    recipe = load_recipe(str(copy.recipe_file), overrides)
    store = LocalStore(copy.store)
    nodes = build_graph(recipe, store)
    record = find(store, "train", nodes["student.0"].fingerprint)
    assert record is not None
    assert record.summary["parameters"] == described["parameters"]
    assert (described["trainable_parameters"] < described["parameters"]) == (adapter is not None)
    model = AutoModelForCausalLM.from_pretrained(materialize(store, record, tmp_path / "files") / "model")
    assert sum(p.numel() for p in model.parameters()) == described["parameters"]
    assert not any("lora" in name for name in model.state_dict())
    attention = model.model.layers[0].self_attn
    assert (len(model.model.layers), attention.q_proj.weight.shape) == (1, (16, 32))
    teacher_record = find(store, "teacher", nodes["teacher"].fingerprint)
    assert teacher_record is not None
    teacher = AutoModelForCausalLM.from_pretrained(materialize(store, teacher_record, tmp_path / "teacher") / "model")
    same = torch.equal(model.model.embed_tokens.weight, teacher.model.embed_tokens.weight)
    assert same == (adapter is not None), "under adapters everything else stands still"
