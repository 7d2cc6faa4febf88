"""The loss from hidden states is the one of the model's own logits, for heads with a bias, a scale or a cap, packed or padded."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, MistralConfig, PhiConfig, Qwen2Config

from kd_core.errors import TrainingError
from kd_core.losses.divergences import FORWARD_KL
from kd_core.losses.objective import StepWeights
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.packing import isolated_documents, unpackable
from kd_core.train.batches import TokenLayout
from kd_core.train.objective_model import ObjectiveModel, check_logits

CPU = torch.device("cpu")
ROWS = [TokenRow((9, 12, 7, 14, 3, 4, 1), 3), TokenRow((3, 14, 1), 2), TokenRow((5, 6, 7, 8, 9, 10, 11, 1), 1)]
SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "initializer_range": 0.5}
HARD = StepWeights(hard=1.0, soft=0.0, temperature=1.0)
CONFIGS = {
    "llama, tied": LlamaConfig(**SIZES, **SPECIAL, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, **SPECIAL, num_key_value_heads=1),
    "mistral, window": MistralConfig(**SIZES, **SPECIAL, num_key_value_heads=1, sliding_window=3),
    "granite, scale": GraniteConfig(**SIZES, **SPECIAL, logits_scaling=4.0),
    "cohere, scale": CohereConfig(**SIZES, **SPECIAL, logit_scale=0.3),
    "gemma2, cap": Gemma2Config(**SIZES, **SPECIAL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0),
    "phi, bias": PhiConfig(**SIZES, **SPECIAL),
}


def make(name: str) -> ObjectiveModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager" if "cap" in name else "sdpa").eval()
    return ObjectiveModel(model, num_columns=17, divergence=FORWARD_KL)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_are_those_of_the_model_s_own_logits(name: str) -> None:
    """Within 1e-5 of the gradient's norm; each row alone is the reference."""
    wrapped = make(name)
    model = wrapped.model
    total = torch.zeros(())
    for row in ROWS:
        logits_NV = model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, row.first_supervised - 1 : -1, :17]
        total = total + torch.nn.functional.cross_entropy(logits_NV, torch.tensor(row.ids[row.first_supervised :]), reduction="sum")
    total.backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    packable = unpackable(model) is None
    assert packable is (name != "gemma2, cap")
    for layout in [TokenLayout(False, 64, CPU), *([TokenLayout(True, 64, CPU)] if packable else [])]:
        check_logits(wrapped, ROWS[:2], layout)
        model.zero_grad(set_to_none=True)
        if layout.packed:
            with isolated_documents(model):
                loss, parts = wrapped(layout.batch(ROWS), HARD)
        else:
            loss, parts = wrapped(layout.batch(ROWS), HARD)
        loss.backward()
        assert float(parts["hard"]) == pytest.approx(float(total.detach()), rel=1e-5)
        off = max(float((p.grad - expected[key]).norm() / norm) for key, p in model.named_parameters() if key in expected)
        assert off < 1e-5, (layout, off)


def test_a_head_that_is_not_known_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = make("granite, scale")
    monkeypatch.setattr("kd_core.train.objective_model.logit_scale", lambda config: 1.0)
    with pytest.raises(TrainingError, match="GraniteForCausalLM: logits of a row of 7 tokens are 3 of their spread away"):
        check_logits(wrapped, ROWS[:2], TokenLayout(True, 64, CPU))
