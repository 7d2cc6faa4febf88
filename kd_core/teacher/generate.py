"""Sampling answers from a causal language model in process.

Axes: B sequences, T positions, V vocabulary columns.

Every sequence draws from its own counter-based random stream, named by its row key, so an answer does not depend on
which rows share its batch (up to floating-point ties) and a resumed run gives what an unbroken one would have given.
Generation defaults shipped with a model are not used: only what the recipe says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kd_core.recipe import Answers
from kd_core.teacher.models import LoadedModel

__all__ = ["Generated", "generate"]


@dataclass(frozen=True)
class Generated:
    """One answer: its token ids (with the end token if it stopped by itself) and why it ended: 'stop' or 'length'."""

    ids: list[int]
    finish_reason: str


def _uniforms(key: str, count: int) -> np.ndarray:
    """``count`` uniform numbers in [0, 1) that belong to a row key (32 hex digits), float64."""
    stream = np.random.Generator(np.random.Philox(key=int(key[:32], 16)))
    return stream.random(count)


def sample_tokens(logits_BV: Tensor, uniform_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """One token a row by inverting the cumulative distribution.

    Args:
        logits_BV: float logits, already cut to the valid columns.
        uniform_B: one number in [0, 1) a row, float64.
        temperature: 0 takes the largest logit.
        top_p: keep the smallest set of tokens whose probability reaches this.

    Returns:
        Token ids, int64, shape (B,).
    """
    if temperature == 0.0:
        return logits_BV.argmax(-1)
    probs_BV = torch.softmax(logits_BV.double() / temperature, -1)
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    cumulative_BV = sorted_BV.cumsum(-1)
    mass_B1 = cumulative_BV[:, -1:]
    if top_p < 1.0:
        last_B1 = (cumulative_BV < top_p).sum(-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
        mass_B1 = cumulative_BV.gather(-1, last_B1)
    position_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * mass_B1, right=True)
    token_B1: Tensor = order_BV.gather(-1, position_B1.clamp(max=logits_BV.shape[-1] - 1))
    return token_B1[:, 0]


@torch.inference_mode()
def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    keys: Sequence[str],
    answers: Answers,
    on_tokens: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Answer a batch of prompts.

    Args:
        loaded: the model.
        prompts: token ids of each prompt, not empty.
        keys: a row key (32 hex digits) a prompt: names its random stream.
        answers: temperature, top_p, max_tokens (num_samples is the caller's business).
        on_tokens: hears after every step how many tokens it made; None: nobody does.

    Returns:
        One answer a prompt, in order.
    """
    model, device = loaded.model, loaded.device
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
    mask_BT = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
    for b, prompt in enumerate(prompts):
        ids_BT[b, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_BT[b, width - len(prompt) :] = 1
    uniforms_BT = torch.tensor(np.stack([_uniforms(key, answers.max_tokens) for key in keys]), device=device)
    stop_ids = torch.tensor(loaded.stop_ids, device=device)
    results: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    alive = list(range(len(prompts)))  # rows of the current batch, as indices into prompts
    cache = DynamicCache(config=model.config)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    for step in range(answers.max_tokens):
        out = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV = out.logits[:, -1, : loaded.num_columns].float()
        uniform_B = uniforms_BT[torch.tensor(alive, device=device), step]
        token_B = sample_tokens(logits_BV, uniform_B, temperature=answers.temperature, top_p=answers.top_p)
        stopped_B = torch.isin(token_B, stop_ids)
        for row, token, stopped in zip(alive, token_B.tolist(), stopped_B.tolist(), strict=True):
            results[row].append(token)
            if stopped:
                reasons[row] = "stop"
        if on_tokens is not None:
            on_tokens(len(alive))
        going_B = (~stopped_B).nonzero()[:, 0]
        if len(going_B) == 0:
            break
        if len(going_B) < len(alive):
            alive = [alive[i] for i in going_B.tolist()]
            cache.batch_select_indices(going_B)
            token_B, mask_BT, positions_BT = token_B[going_B], mask_BT[going_B], positions_BT[going_B]
        ids_BT = token_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], -1)
        positions_BT = positions_BT[:, -1:] + 1
    return [Generated(ids, reason) for ids, reason in zip(results, reasons, strict=True)]
