"""Figures of a student before there is one, against the models themselves: their parameters, counted products, a real cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from kd_core.errors import TeacherError
from kd_core.recipe import StudentFromTeacher
from kd_core.recipe.files import load_recipe
from kd_core.student.describe import describe, model_figures
from kd_core.student.make import student_from_teacher
from kd_core.teacher.models import save_model
from kd_core.tokens.batches import TokenRow

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SMALL = {"every_nth_block": 2, "num_kv_heads": 1, "narrower": {"hidden_size": 8, "num_heads": 1, "intermediate_size": 10}}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2"])
def test_figures_are_the_models_own(model_type: str, tied: bool) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    if model_type == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 16}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=24, tie_word_embeddings=tied, **sizes, **special)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    found = model_figures(config, torch.float32)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes == 4 * found.parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cache = model(input_ids=torch.tensor([[3]]), use_cache=True).past_key_values
    assert counter.get_total_flops() == found.flops_a_token + found.attention_flops_a_token
    assert found.kv_cache_bytes_a_token == sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


def test_a_student_is_described_as_it_would_be_made(tiny_model, tmp_path: Path) -> None:
    teacher = tiny_model(num_layers=4)
    save_model(teacher, tmp_path)
    model = {"kind": "pretrained", "model": str(tmp_path / "model"), "dtype": "bfloat16"}
    recipe = load_recipe(str(QUICKSTART), [f"teacher={model}", f"student={ {'kind': 'from_teacher', **SMALL} }"])
    found = describe(recipe)
    assert found.teacher is not None
    assert (found.teacher.parameters, found.teacher.bytes) == (teacher.num_parameters, 2 * teacher.num_parameters)
    spec = StudentFromTeacher.model_validate({"kind": "from_teacher", **SMALL})
    student = student_from_teacher(teacher, spec, rows=lambda num_rows: [TokenRow((2, 3, 4), 1)])
    assert found.student.parameters == sum(p.numel() for p in student.parameters())
    assert found.student.kv_cache_bytes_a_token == 2 * 2 * 1 * 8 * 4
    ratios = found.ratios()
    assert ratios is not None
    assert ratios["parameters"] == found.student.parameters / teacher.num_parameters


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("{}", "^model '.*': its config cannot be read: Unrecognized model"),
        ('{"model_type": "llama", "hidden_size": "x"}', "^model '.*': its config cannot be read: Validation error for field 'hidden_size'"),
        (
            '{"model_type": "llama", "hidden_size": 63, "num_attention_heads": 4}',
            "its config cannot be read: Class validation error .* size .63. is not",
        ),
        ('{"model_type": "t5"}', "^a t5 of this config is no causal language model: Unrecognized configuration class"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, config: str, line: str) -> None:
    (tmp_path / "config.json").write_text(config)
    recipe = load_recipe(str(QUICKSTART), [f"student={ {'kind': 'pretrained', 'model': str(tmp_path)} }"])
    with pytest.raises(TeacherError, match=line) as caught:
        describe(recipe)
    assert "\n" not in str(caught.value)
