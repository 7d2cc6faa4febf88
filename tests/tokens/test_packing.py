"""Packed rows: the same logits and gradients as each row alone, whatever lies beside it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from kd_core.errors import TeacherError
from kd_core.tokens.packing import (
    Documents,
    Pack,
    equal_length_batches,
    isolated_documents,
    pack_batches,
    pack_rows,
    packed_attention,
    unpackable,
)

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.4}
GQA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
PACKED = {
    "llama": LlamaConfig(**GQA),
    "llama-one-kv-head": LlamaConfig(**{**GQA, "num_key_value_heads": 1}),
    "mistral-window-4": MistralConfig(**GQA, sliding_window=4),
    "gemma3-window-4": Gemma3TextConfig(**GQA, sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "qwen3": Qwen3Config(**GQA),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=48, hidden_dropout=0.0, attention_dropout=0.0),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, initializer_range=0.4),
}


def make(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def random_rows(*lengths: int, seed: int = 1) -> list[tuple[list[int], int]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, 50, (length,), generator=generator).tolist(), 1) for length in lengths]


def alone(model: PreTrainedModel, rows: list[tuple[list[int], int]]) -> torch.Tensor:
    return torch.cat([model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids, _ in rows])


def packed(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    with isolated_documents(model):
        return model(**pack.to(model.device).inputs()).logits[0]


ROWS = random_rows(12, 9, 9, 5, 3, 3, 3, 2)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packed_logits_are_those_of_each_row_alone(name: str, device: torch.device) -> None:
    """Trap 15. Without isolation the same buffer gives something else: the test could fail."""
    model = make(PACKED[name]).to(device)
    assert unpackable(model) is None
    pack = pack_rows(ROWS)
    torch.testing.assert_close(packed(model, pack), alone(model, ROWS), atol=2e-5, rtol=0)
    leaking_TV = model(input_ids=pack.batch.ids_BT.to(device)).logits[0]
    assert float((leaking_TV - alone(model, ROWS)).abs().max()) > 0.1
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_document_does_not_feel_another_ones_tokens() -> None:
    model = make(PACKED["llama"])
    changed = [random_rows(12, seed=7)[0], *ROWS[1:]]
    before_TV, after_TV = packed(model, pack_rows(ROWS)), packed(model, pack_rows(changed))
    assert torch.equal(before_TV[12:], after_TV[12:])
    assert not torch.equal(before_TV[:12], after_TV[:12])


@torch.no_grad()
def test_bfloat16_packed_is_within_rounding_of_alone() -> None:
    """bf16 has 8 bits: logits with a spread of 2 may differ by some 2^-6 of it after three layers; a leak moves them by more than 1."""
    model = make(PACKED["llama"]).bfloat16()
    difference_TV = packed(model, pack_rows(ROWS)).float() - alone(model, ROWS).float()
    assert float(difference_TV.abs().max()) < 0.1


@pytest.mark.parametrize("name", ["llama", "mistral-window-4"])
def test_gradients_packed_are_those_of_each_row_alone(name: str) -> None:
    model = make(PACKED[name])
    weight_TV = torch.randn(sum(len(ids) for ids, _ in ROWS), 50, generator=torch.Generator().manual_seed(2))
    gradients = []
    for logits_TV in (packed(model, pack_rows(ROWS)), alone(model, ROWS)):
        model.zero_grad()
        (logits_TV * weight_TV).sum().backward()
        gradients.append({parameter_name: p.grad.clone() for parameter_name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 20
    for parameter_name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][parameter_name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1), "recurrent"),
        (Gemma2Config(**GQA), "soft-caps attention scores"),
        (LlamaConfig(**GQA, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "longest row of a batch"),
    ],
)
def test_what_cannot_be_packed_is_known_by_name(config: PreTrainedConfig, reason: str) -> None:
    found = unpackable(make(config))
    assert found is not None
    assert reason in found


def test_attention_without_its_documents_is_an_error() -> None:
    """An architecture that drops keyword arguments on the way must not fall back to one long document."""
    model = make(PACKED["llama"])
    with isolated_documents(model), pytest.raises(TeacherError, match="did not pass on where they lie"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_attention_of_another_kind_is_an_error() -> None:
    heads = torch.randn(1, 2, 3, 4)
    with pytest.raises(TeacherError, match="uses softcap"):
        packed_attention(torch.nn.Identity(), heads, heads, heads, None, documents=Documents((3,)), softcap=30.0)


def test_positions_restart_and_supervised_tokens_stay() -> None:
    pack = pack_rows([([5, 6, 7, 8], 2), ([9, 10], 1), ([11, 12], 1)])
    assert pack.batch.ids_BT.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert pack.position_BT.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1]]
    assert pack.batch.predict_BT.nonzero()[:, 1].tolist() == [1, 2, 4, 6]
    assert pack.batch.labels_N.tolist() == [7, 8, 10, 12]
    assert list(pack.documents.groups()) == [(0, 1, 4), (4, 2, 2)]


@given(lengths=st.lists(st.integers(1, 30), max_size=40), budget=st.integers(1, 60))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    for plan in (pack_batches, equal_length_batches):
        batches = list(plan(lengths, budget))
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= budget for batch in batches)
    assert all(len({lengths[i] for i in batch}) == 1 for batch in equal_length_batches(lengths, budget))
    tokens = [sum(lengths[i] for i in batch) for batch in pack_batches(lengths, budget)]
    assert all(first + second > budget for first, second in pairwise(tokens))  # none could have been one
