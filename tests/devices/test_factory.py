"""The whole factory on a device: every stage of a small recipe, and the doctor's checks of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kd_core.artifacts import find
from kd_core.doctor import examine
from kd_core.progress import silent
from kd_core.recipe import Recipe, Run
from kd_core.recipe.files import load_recipe
from kd_core.stages import evaluate, teacher, train  # noqa: F401  `runs_on` must find them
from kd_core.stages.graph import build_graph
from kd_core.stages.run import run_node
from kd_core.store import LocalStore
from kd_core.teacher.models import LoadedModel, save_model

OTHERS = [pytest.param("pretended", marks=pytest.mark.pretended), pytest.param("cuda", marks=pytest.mark.gpu)]
"""Than the CPU, which the other tests are about."""
pytestmark = pytest.mark.parametrize("device", OTHERS, indirect=True)

FEW = (
    "prompts.sources.0.num=60",
    "teacher.sources.0.num=60",
    "teacher.training={steps: 4, batch_rows: 8, learning_rate: 0.003, dtype: float32}",
    "training={steps: 4, batch_rows: 8, learning_rate: 0.003, validate_every_steps: 2}",
    "answers.max_tokens=8",
    "curate.gold_rows=20",
    "evaluation.suites.0.limit=6",
    "evaluation.generate.max_tokens=8",
    "evaluation.compare=[teacher]",
    "gate.rules=[{kind: ceiling, metric: parameter_ratio, maximum: 1}]",
)
STUDENTS = {
    "sampled": (),
    "topk and features": (
        "soft_labels={kind: topk, k: 4, temperatures: [1.0]}",
        "hidden_states={blocks: [1]}",
        "objective={supervision: soft, hard_weight: 0.5, soft_weight: 0.5, features: {kind: hidden_states, source: cached, weight: 0.1}}",
    ),
    "dense, and a narrower student": (
        "soft_labels={kind: dense}",
        "student={kind: from_teacher, last_blocks: 1, narrower: {num_heads: 1, intermediate_size: 24, sample_rows: 8}}",
    ),
}


@pytest.mark.parametrize("overrides", STUDENTS.values(), ids=STUDENTS.keys())
def test_every_stage_and_every_check_runs(
    small_recipe: Path, tmp_path: Path, runs_on: Callable[[str], Run], overrides: tuple[str, ...]
) -> None:
    everything(load_recipe(small_recipe, [*FEW, *overrides]), LocalStore(tmp_path), runs_on)


def test_a_student_of_fewer_tokens_runs_beside_its_live_teacher(
    small_recipe: Path, bpe_tokenizer, tmp_path: Path, runs_on: Callable[[str], Run]
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=420, initializer_range=0.5, bos_token_id=None, eos_token_id=0, pad_token_id=0, **sizes)
    save_model(LoadedModel(LlamaForCausalLM(config), bpe_tokenizer, 420), tmp_path)
    overrides = (
        f"teacher={{kind: pretrained, model: {tmp_path / 'model'}}}",
        "student={kind: from_teacher, vocabulary: {keep: data, least_kept_mass: 0}}",
        "objective={supervision: soft, hard_weight: 0.5, soft_weight: 0.5, temperature: 2,"
        " features: {kind: relations, num_heads: 2, weight: 0.1}}",
    )
    everything(load_recipe(small_recipe, [*FEW[:1], *FEW[3:], *overrides]), LocalStore(tmp_path), runs_on)


def everything(recipe: Recipe, store: LocalStore, runs_on: Callable[[str], Run]) -> None:
    """Every stage but those that ask for no device, and every check."""
    nodes = build_graph(recipe, store)
    for node in nodes.values():
        if node.stage not in ("publish", "report"):
            run = recipe.run.model_copy(update={"device": runs_on("device").device})
            run_node(recipe.model_copy(update={"run": run}), nodes, node.name, store=store, tick=silent, extra={})
            assert find(store, node.stage, node.fingerprint) is not None
    runs_on("device")
    found = examine(recipe.model_copy(update={"run": run}), store)
    assert [f"{check.name}: {check.detail}" for check in found if check.status == "failed"] == []
