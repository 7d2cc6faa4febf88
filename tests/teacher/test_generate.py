"""Sampling in process: the same answer in any batch, nucleus by hand, and why an answer ended."""

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kd_core.fingerprint import fingerprint
from kd_core.recipe import Answers
from kd_core.teacher.generate import Generated, generate, sample_tokens
from kd_core.teacher.models import LoadedModel

PROMPTS = [[9, 12, 7, 14], [3], [5, 6, 7, 8, 9, 10, 11], [4, 4, 14], [9, 12, 7, 14], [16, 2, 13]]
KEYS = [fingerprint(i) for i in range(len(PROMPTS))]
SAMPLED = Answers(num_samples=1, temperature=1.0, max_tokens=12)
GREEDY = Answers(num_samples=1, temperature=0.0, max_tokens=12)


def uniforms(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def alone(loaded: LoadedModel, answers: Answers) -> list[Generated]:
    return [generate(loaded, [p], keys=[k], answers=answers)[0] for p, k in zip(PROMPTS, KEYS, strict=True)]


def by_hand(loaded: LoadedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy decoding with a whole forward pass a token: no cache, no padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + max_tokens:
        with torch.inference_mode():
            logits_V = loaded.model(input_ids=torch.tensor([ids], device=loaded.device)).logits[0, -1, : loaded.num_columns]
        ids.append(int(logits_V.argmax()))
        if ids[-1] in loaded.stop_ids:
            break
    return ids[len(prompt) :]


def test_greedy_is_argmax_with_left_padding_and_shrinking_batches(tiny_model, device: torch.device) -> None:
    loaded = tiny_model(seed=3)
    loaded.model.to(device)
    found = generate(loaded, PROMPTS, keys=KEYS, answers=GREEDY)
    assert [answer.ids for answer in found] == [by_hand(loaded, prompt, GREEDY.max_tokens) for prompt in PROMPTS]


def test_left_padding_does_not_move_positions(tiny_model) -> None:
    """With learnt absolute positions: rotary ones would forgive an offset."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5, bos_token_id=1, eos_token_id=1
    )
    loaded = LoadedModel(GPT2LMHeadModel(config).eval().requires_grad_(False), tiny_model().tokenizer, 17)
    found = generate(loaded, PROMPTS, keys=KEYS, answers=GREEDY)
    assert [answer.ids for answer in found] == [by_hand(loaded, prompt, GREEDY.max_tokens) for prompt in PROMPTS]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_answer_is_the_same_in_any_batch(tiny_model, device: torch.device, seed: int) -> None:
    loaded = tiny_model(seed=seed)
    loaded.model.to(device)
    expected = alone(loaded, SAMPLED)
    assert len({len(answer.ids) for answer in expected}) > 1  # rows leave the batch at different steps
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0], [4, 1, 3, 5, 0, 2]):
        found = generate(loaded, [PROMPTS[i] for i in order], keys=[KEYS[i] for i in order], answers=SAMPLED)
        assert found == [expected[i] for i in order]


def test_the_key_decides_the_stream(tiny_model) -> None:
    """Equal prompts under two keys differ, and a longer limit only continues the shorter answer."""
    loaded = tiny_model(seed=1)
    found = alone(loaded, SAMPLED)
    assert found[0].ids != found[4].ids
    longer = alone(loaded, SAMPLED.model_copy(update={"max_tokens": 20}))
    assert all(a.ids == b.ids[: len(a.ids)] for a, b in zip(found, longer, strict=True))


def test_finish_reasons_and_the_kept_stop_id(tiny_model) -> None:
    """Trap 5: an answer that met the limit carries no end token; one that stopped carries it exactly once, at its end."""
    reasons = set()
    for seed in range(6):
        loaded = tiny_model(seed=seed)
        (end,) = loaded.stop_ids
        for answer in generate(loaded, PROMPTS, keys=KEYS, answers=SAMPLED):
            reasons.add(answer.finish_reason)
            if answer.finish_reason == "stop":
                assert answer.ids.index(end) == len(answer.ids) - 1
            else:
                assert answer.finish_reason == "length"
                assert end not in answer.ids
                assert len(answer.ids) == SAMPLED.max_tokens
    assert reasons == {"stop", "length"}


def test_an_end_token_at_the_very_limit_is_a_stop(tiny_model) -> None:
    loaded = tiny_model(seed=0)
    stopped = next(answer for answer in alone(loaded, SAMPLED) if answer.finish_reason == "stop")
    index = next(i for i, answer in enumerate(alone(loaded, SAMPLED)) if answer is not None and answer.ids == stopped.ids)
    exact = SAMPLED.model_copy(update={"max_tokens": len(stopped.ids)})
    assert generate(loaded, [PROMPTS[index]], keys=[KEYS[index]], answers=exact) == [stopped]


def test_shipped_stop_ids_end_answers_and_other_shipped_defaults_are_ignored(tiny_model) -> None:
    """Trap 20: temperature, top_k and the rest of a generation config are not the recipe's."""
    loaded = tiny_model(seed=1)
    plain = alone(loaded, SAMPLED)
    loaded.model.generation_config.temperature = 0.01
    loaded.model.generation_config.top_k = 1
    loaded.model.generation_config.do_sample = False
    assert alone(loaded, SAMPLED) == plain
    second = next(answer.ids[1] for answer in plain if len(answer.ids) > 2)
    loaded.model.generation_config.eos_token_id = [1, second]
    assert loaded.stop_ids == tuple(sorted({1, second}))
    for before, after in zip(plain, alone(loaded, SAMPLED), strict=True):
        if second in before.ids:
            assert (after.ids, after.finish_reason) == (before.ids[: before.ids.index(second) + 1], "stop")
        else:
            assert after == before


def test_padded_columns_are_never_sampled(tiny_model) -> None:
    loaded = tiny_model(vocab_size=24)
    loaded.model.lm_head.weight.data[17:] *= 100.0
    hot = Answers(num_samples=1, temperature=5.0, max_tokens=12)
    for answer in alone(loaded, hot) + alone(loaded, GREEDY):
        assert max(answer.ids) < 17


def test_inversion_by_hand() -> None:
    """Sorted p = (0.5, 0.3, 0.2) over ids (2, 0, 1): cumulative 0.5, 0.8, 1."""
    logits_BV = torch.tensor([[0.3, 0.2, 0.5]]).log().expand(6, -1)
    found = sample_tokens(logits_BV, uniforms(0.0, 0.49, 0.51, 0.79, 0.81, 0.9999), temperature=1.0, top_p=1.0)
    assert found.tolist() == [2, 2, 0, 0, 1, 1]


def test_nucleus_by_hand() -> None:
    """top_p 0.6 keeps ids 2 and 0 with mass 0.8, so their shares are 5/8 and 3/8; 0.5 keeps id 2 alone."""
    logits_BV = torch.tensor([[0.3, 0.2, 0.5]]).double().log().expand(3, -1)
    assert sample_tokens(logits_BV, uniforms(0.62, 0.63, 0.9999), temperature=1.0, top_p=0.6).tolist() == [2, 0, 0]
    assert sample_tokens(logits_BV, uniforms(0.0, 0.5, 0.9999), temperature=1.0, top_p=0.4).tolist() == [2, 2, 2]
    assert sample_tokens(logits_BV, uniforms(0.0, 0.79, 0.9999), temperature=1.0, top_p=0.9).tolist() == [2, 0, 1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.7)])
def test_samples_follow_the_stated_distribution(temperature: float, top_p: float) -> None:
    """Frequencies over 40,000 draws against softmax(logits / T) cut to its nucleus, within 5 standard errors."""
    repeats = 40_000
    logits_1V = torch.tensor([[0.0, 2.0, 1.0, -1.0, 0.5]])
    p_V = torch.softmax(logits_1V.double() / temperature, -1)[0]
    order = p_V.argsort(descending=True)
    before = p_V[order].cumsum(0) - p_V[order]
    nucleus_V = torch.zeros(5, dtype=torch.float64)
    nucleus_V[order[before < top_p]] = p_V[order[before < top_p]]
    nucleus_V /= nucleus_V.sum()
    uniform_B = torch.from_numpy(np.random.default_rng(0).random(repeats))
    found = sample_tokens(logits_1V.expand(repeats, -1), uniform_B, temperature=temperature, top_p=top_p)
    share_V = torch.bincount(found, minlength=5) / repeats
    assert bool(((share_V - nucleus_V).abs() <= 5 * (nucleus_V * (1 - nucleus_V) / repeats).sqrt()).all())


def test_tokens_are_told_of_step_by_step(tiny_model) -> None:
    told: list[int] = []
    found = generate(tiny_model(seed=3), PROMPTS, keys=KEYS, answers=SAMPLED, on_tokens=told.append)
    assert told[0] == len(PROMPTS)
    assert sum(told) == sum(len(answer.ids) for answer in found)
    assert len(told) == max(len(answer.ids) for answer in found)
