"""The scoring pass equals a direct forward of the teacher, whatever shares the batch, cut to the tokenizer first."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, Gemma3TextConfig, GraniteConfig, MambaConfig, PhiConfig

from kd_core.errors import SoftLabelError, TeacherError
from kd_core.recipe import Dense, Sampled, TopK
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.softlabels.forward import Head
from kd_core.softlabels.targets import DenseTargets, SampledTargets
from kd_core.tokens.batches import TokenRow

DENSE = Dense(kind="dense")
ROWS = [
    TokenRow((9, 12, 7, 14, 9, 12, 7, 14, 3, 4, 1), 4),
    TokenRow((3, 14, 1), 2),
    TokenRow((5, 6, 7, 8, 9, 10, 11, 1), 1),
    TokenRow((5, 6, 7, 8, 9, 10, 11, 1), 7),
]
KEYED = [(row_key("n", row), row) for row in ROWS]


def direct_logprobs(loaded, row: TokenRow, columns: int) -> torch.Tensor:
    """log p(. | ids[:t]) at each supervised t, one unpadded row at a time, in float64."""
    with torch.inference_mode():
        logits_TV = loaded.model(input_ids=torch.tensor([row.ids], device=loaded.device)).logits[0]
    return torch.log_softmax(logits_TV[row.first_supervised - 1 : -1, :columns].double().cpu(), -1)


@pytest.mark.parametrize("budget", [1, 16, 1000])
def test_capture_is_the_teachers_log_softmax(tiny_model, device: torch.device, budget: int) -> None:
    loaded = tiny_model()
    loaded.model.to(device)
    found = score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=budget)
    assert found.refused == {}
    for (_, row), scored in zip(KEYED, found.scored, strict=True):
        assert isinstance(scored.targets, DenseTargets)
        exact_NV = direct_logprobs(loaded, row, loaded.num_columns)
        assert len(exact_NV) == row.num_supervised
        torch.testing.assert_close(scored.targets.logprobs_NV.cpu().double(), exact_NV, atol=2e-5, rtol=0)
        labels_N = torch.tensor(row.ids[row.first_supervised :])
        gold_N = exact_NV.gather(-1, labels_N[:, None])[:, 0]
        torch.testing.assert_close(scored.targets.common.gold_logprob_N.cpu().double(), gold_N, atol=2e-5, rtol=0)


def test_the_vocabulary_is_cut_before_it_is_normalised(tiny_model) -> None:
    """Trap 6: with the padded columns left in, 17 columns hold less than all the mass."""
    loaded = tiny_model(vocab_size=24)
    row = KEYED[0]
    (scored,) = score_rows(loaded, [row], policy=DENSE, micro_batch_tokens=64).scored
    assert isinstance(scored.targets, DenseTargets)
    assert scored.targets.logprobs_NV.shape[-1] == loaded.num_columns == 17
    torch.testing.assert_close(scored.targets.logprobs_NV.exp().sum(-1), torch.ones(row[1].num_supervised))
    uncut_NV = direct_logprobs(loaded, row[1], 24)[:, :17]
    assert float((scored.targets.logprobs_NV.double() - uncut_NV).abs().max()) > 0.01


def test_draws_follow_the_key_and_not_the_batch(tiny_model) -> None:
    loaded = tiny_model()
    policy = Sampled(kind="sampled", num_draws=7, temperature=2.0)

    def drawn(rows, budget):
        found = {s.key: s.targets for s in score_rows(loaded, rows, policy=policy, micro_batch_tokens=budget).scored}
        assert all(isinstance(t, SampledTargets) for t in found.values())
        return {key: (t.ids_E.tolist(), t.counts_E.tolist()) for key, t in found.items()}

    assert drawn(KEYED, 1000) == drawn(KEYED[::-1], 1)
    other = [(row_key("another namespace", row), row) for row in ROWS]
    assert list(drawn(KEYED, 1000).values()) != list(drawn(other, 1000).values())


def refusal(loaded) -> str:
    with pytest.raises(TeacherError) as error:
        score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=64)
    return str(error.value)


def test_a_teacher_in_training_mode_is_refused(tiny_model) -> None:
    """Trap 20: even one module of it."""
    loaded = tiny_model()
    loaded.model.model.layers[1].mlp.train()
    assert "model.layers.1.mlp is training" in refusal(loaded)


def test_a_teacher_set_up_to_train_is_refused(tiny_model) -> None:
    loaded = tiny_model()
    loaded.model.activation_checkpointing_enable()
    assert "gradient checkpointing" in refusal(loaded)


def test_a_teacher_with_an_adapter_is_refused(tiny_model) -> None:
    """An adapter is a module of peft; here a stand-in of that name, as peft is no dependency."""
    loaded = tiny_model()
    adapter = type("LoraLayer", (torch.nn.Module,), {"__module__": "peft.tuners.lora.layer"})()
    loaded.model.model.layers[0].self_attn.add_module("lora", adapter.eval())
    assert "carries an adapter (model.layers.0.self_attn.lora)" in refusal(loaded)


def test_a_head_that_is_not_known_is_refused(tiny_model) -> None:
    """Parity with the model's own logits, before the first label: a head with a scale that no configuration names."""
    loaded = tiny_model()
    loaded.model.lm_head.register_forward_hook(lambda module, inputs, logits: 1.1 * logits)
    assert "logits of the scoring pass are 0.091 of their spread away" in refusal(loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_between_documents_is_refused(tiny_model, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    loaded = tiny_model()
    loaded.model.to(dtype)
    monkeypatch.setattr("kd_core.tokens.packing.Documents.groups", lambda self: iter([(0, 1, sum(self.lengths))]))
    assert "of their spread away from the model's own" in refusal(loaded)


def test_a_sliding_window_that_is_not_kept_is_refused(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**WIDE, sliding_window=4)).eval()
    monkeypatch.setattr("kd_core.tokens.packing._window_mask", lambda length, *_: torch.ones(length, length, dtype=torch.bool).tril())
    assert "of their spread away from the model's own" in refusal(replace(tiny_model(), model=model))


def test_another_tokenizers_rows_are_refused(tiny_model) -> None:
    row = TokenRow((3, 17, 1), 1)
    with pytest.raises(SoftLabelError, match="token id 17 is beyond the teacher's 17 columns"):
        score_rows(tiny_model(), [(row_key("n", row), row)], policy=DENSE, micro_batch_tokens=64)


def test_a_row_that_is_not_finite_is_refused_alone(tiny_model) -> None:
    """Token 14 is poison, and its row shares the buffer with sound ones: they come out as without it."""
    loaded = tiny_model()
    sound = {scored.key: scored for scored in score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=1000).scored}
    loaded.model.model.embed_tokens.weight[14] = torch.nan
    found = score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=1000)
    poisoned = [key for key, row in KEYED if 14 in row.ids[:-1]]
    assert found.refused == {
        poisoned[0]: "the teacher gave NaN or infinite logits at 7 of 7 positions",
        poisoned[1]: "the teacher gave NaN or infinite logits at 1 of 1 positions",
    }
    assert [scored.key for scored in found.scored] == [key for key, _ in KEYED if key not in poisoned]
    for scored in found.scored:
        assert torch.equal(scored.targets.logprobs_NV, sound[scored.key].targets.logprobs_NV)


def test_a_row_longer_than_the_teachers_positions_is_refused_alone(tiny_model) -> None:
    loaded = tiny_model()
    loaded.model.config.max_position_embeddings = 10
    found = score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=64)
    assert found.refused == {KEYED[0][0]: "11 tokens, and the teacher has 10 positions"}
    assert len(found.scored) == 3


SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
WIDE = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**WIDE, final_logit_softcapping=3.0, sliding_window=4),
        Gemma3TextConfig(**WIDE, final_logit_softcapping=3.0, sliding_window=4),
        CohereConfig(**{k: v for k, v in WIDE.items() if k != "head_dim"}, logit_scale=0.3),
        GraniteConfig(**{k: v for k, v in WIDE.items() if k != "head_dim"}, logits_scaling=4.0),
        PhiConfig(**SMALL, intermediate_size=32),
        MambaConfig(vocab_size=24, hidden_size=16, num_hidden_layers=2, initializer_range=0.5),
    ],
    ids=lambda config: config.model_type,
)
def test_heads_with_a_cap_a_scale_or_a_bias_and_models_that_cannot_be_packed(config, tiny_model, caplog) -> None:
    """Gemma 2 and Mamba are run over rows of equal length, and the log says so."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    loaded = replace(tiny_model(), model=model)
    with caplog.at_level("INFO", "kd_core"):
        found = score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=1000)
    assert ("scored by equal length" in caplog.text) == (config.model_type in ("gemma2", "mamba"))
    for (_, row), scored in zip(KEYED, found.scored, strict=True):
        exact_NV = direct_logprobs(loaded, row, loaded.num_columns)
        torch.testing.assert_close(scored.targets.logprobs_NV.double(), exact_NV, atol=3e-5, rtol=0)


def test_a_bfloat16_teachers_logits_are_not_rounded_to_bfloat16(tiny_model) -> None:
    """Trap 19: the same hidden states through the head in float32 and in bfloat16. Products of bf16 factors are exact in float32."""
    loaded = tiny_model()
    loaded.model.bfloat16()
    head = Head(loaded)
    hidden_NH = 8 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact_NV = hidden_NH.double() @ loaded.model.lm_head.weight[:17].double().T
    assert float((head.logits(hidden_NH) - exact_NV).abs().max()) < 1e-4
    assert float((loaded.model.lm_head(hidden_NH)[:, :17].double() - exact_NV).abs().max()) > 1e-2
    found = score_rows(loaded, KEYED, policy=DENSE, micro_batch_tokens=1000).scored
    loaded.model.float()  # the same rounded weights, computed on in float32
    for (_, row), scored in zip(KEYED, found, strict=True):
        exact_NV = direct_logprobs(loaded, row, 17)
        kl_N = (exact_NV.exp() * (exact_NV - scored.targets.logprobs_NV.double())).sum(-1)
        assert float(kl_N.max()) < 5e-3


@pytest.mark.parametrize(
    "policy", [DENSE, Sampled(kind="sampled", num_draws=9, temperature=2.0), TopK(kind="topk", k=3, temperatures=(2.0,))]
)
def test_tiles_of_logits_change_nothing(policy, tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile for all, and one of three positions."""
    loaded = tiny_model()
    whole = score_rows(loaded, KEYED, policy=policy, micro_batch_tokens=1000).scored
    monkeypatch.setattr("kd_core.softlabels.capture._TILE_BYTES", 3 * 4 * 17)
    for one, other in zip(whole, score_rows(loaded, KEYED, policy=policy, micro_batch_tokens=1000).scored, strict=True):
        torch.testing.assert_close(vars(other.targets.common), vars(one.targets.common), atol=1e-6, rtol=1e-6)
        others = {k: v for k, v in vars(other.targets).items() if k != "common"}
        torch.testing.assert_close(others, {k: v for k, v in vars(one.targets).items() if k != "common"}, atol=1e-6, rtol=1e-6)


def test_keys_differ_for_each_row_and_namespace() -> None:
    keys = [key for key, _ in KEYED]
    assert len({*keys, row_key("other", ROWS[0])}) == len(keys) + 1


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_keys_are_equal_across_processes(hash_seed: str) -> None:
    """Trap 17: Python salts hash() by process; ours must not notice."""
    code = f"from kd_core.rows.keys import soft_label_key\nprint(soft_label_key('n', {ROWS[0].ids!r}, {ROWS[0].first_supervised}))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == KEYED[0][0]
