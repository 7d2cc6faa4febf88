"""The training loop: one optimiser step at a time, exact under any split of the batch.

Axes: B rows, T positions, V vocabulary columns, N supervised positions of a micro-batch.

The loss is normalised by the supervised tokens of the whole optimiser step, over all micro-batches and ranks, so
``run.micro_batch_tokens`` and the number of devices change speed only. Everything that varies (rows, learning rate,
weights, random numbers) is a function of (seed, step): a resumed run is the unbroken one.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kd_core.errors import TrainingError
from kd_core.failpoints import reach
from kd_core.losses.objective import StepWeights, step_weights, supervised_loss
from kd_core.progress import Tick, Ticker
from kd_core.recipe import Objective, Run, Training
from kd_core.softlabels.targets import Targets, move
from kd_core.teacher.models import pick_device
from kd_core.tokens import Batch, collate
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.data import Rows, TokenRow, TrainingData, step_rows, token_batches
from kd_core.train.schedules import learning_rate

__all__ = ["TrainingResult", "train", "validation_nll"]

_LOG_EVERY = 10
_PREFETCH_STEPS = 4


@dataclass(frozen=True)
class TrainingResult:
    """What a run reports beside its weights.

    Attributes:
        metrics: one dict a logged step: step, loss, hard, soft, gradient_norm, learning_rate, temperature, weights,
            tokens; some carry validation_nll. Losses are means over supervised tokens, nats.
        validation_nll: at the end, nats a token; None without validation rows.
        supervised_tokens: trained on, over all steps.
        seconds: of this process, after a resume only those since.
        resumed_from: step of the checkpoint this run started from; 0 for none.
        rows_too_long: rows left out because they have more than training.max_tokens tokens.
    """

    metrics: list[dict[str, float]]
    validation_nll: float | None
    supervised_tokens: int
    seconds: float
    resumed_from: int
    rows_too_long: int


def train(
    model: nn.Module,
    data: TrainingData,
    *,
    num_columns: int,
    training: Training,
    objective: Objective,
    seed: int,
    run: Run,
    checkpoints: Checkpoints,
    tick: Ticker,
) -> TrainingResult:
    """Train ``model`` in place.

    Args:
        model: a causal language model in float32.
        data: rows, soft labels, validation rows.
        num_columns: logit columns that count; the rest is cut off before normalising.
        training: steps, batch, optimiser.
        objective: what is minimised.
        seed: decides order and dropout.
        run: micro-batch size, checkpoint interval, device.
        checkpoints: where the state is kept.
        tick: progress.

    Raises:
        TrainingError: no rows, or gradients that are not finite.
        SoftLabelError: missing or invalid soft labels.
    """
    lengths = data.rows.num_tokens
    kept = np.flatnonzero(lengths <= training.max_tokens)
    supervised = (lengths - data.rows.first_supervised)[kept]
    if not len(kept):
        raise TrainingError(
            f"no rows to train on: {len(lengths)} rows, none within training.max_tokens = {training.max_tokens}; check the curate counts"
        )
    accelerator = Accelerator(cpu=pick_device(run.device).type == "cpu")
    device = accelerator.device
    if training.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainingError("training.dtype: bfloat16, and this device has no bfloat16; use float32")
    optimiser = torch.optim.AdamW(_parameter_groups(model, training.weight_decay), lr=0.0, betas=training.adam_betas, fused=True)
    model, optimiser = accelerator.prepare(model, optimiser)
    start, metrics, tokens = 0, [], 0
    if found := checkpoints.load_newest(device):
        start, state = found
        accelerator.unwrap_model(model).load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        metrics, tokens = json.loads(state["metrics"]), state["tokens"]
    began = time.perf_counter()
    autocast = torch.autocast(device.type, torch.bfloat16) if training.dtype == "bfloat16" else contextlib.nullcontext()
    model.train()
    tick(Tick(start, training.steps, "steps"))
    for step in range(start, training.steps):
        torch.manual_seed((seed << 32) + step)
        weights = step_weights(objective, step=step, steps=training.steps)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(training, step)
        picked = step_rows(len(kept), training.batch_rows, seed=seed, step=step)
        step_tokens = int(supervised[picked].sum())
        mine = kept[picked[accelerator.process_index :: accelerator.num_processes]].tolist()
        soon = step_rows(len(kept), training.batch_rows, seed=seed, step=step + _PREFETCH_STEPS)
        data.rows.prefetch(kept[soon[accelerator.process_index :: accelerator.num_processes]].tolist(), soft=weights.soft > 0.0)
        sums: dict[str, Tensor] = {}
        for batch, targets in _micro_batches(data.rows, mine, run.micro_batch_tokens, device, weights):
            with autocast:
                logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits
            loss, parts = supervised_loss(logits_BTV[batch.predict_BT][:, :num_columns], batch.labels_N, targets, weights)
            accelerator.backward(loss * (accelerator.num_processes / step_tokens))
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value
        norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm if training.clip_norm is not None else math.inf)
        if not torch.isfinite(norm):
            raise TrainingError(f"step {step + 1}: gradients are not finite; lower training.learning_rate or use training.dtype: float32")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        tokens += step_tokens
        last = step + 1 == training.steps
        if step % _LOG_EVERY == 0 or last:
            means = {name: float(value) / step_tokens for name, value in _over_ranks(accelerator, sums).items()}
            acting = {"hard_weight": weights.hard, "soft_weight": weights.soft, "temperature": weights.temperature}
            acting |= {"gradient_norm": float(norm), "learning_rate": learning_rate(training, step)}
            metrics.append({"step": step + 1, **means, **acting})
            tick(Tick(step + 1, training.steps, "steps", f"loss {means['loss']:.4f}"))
        if (step + 1) % run.checkpoint_every_steps == 0 and not last and accelerator.is_main_process:
            state = {"model": accelerator.unwrap_model(model).state_dict(), "optimiser": optimiser.state_dict()}
            checkpoints.save(step + 1, {**state, "metrics": json.dumps(metrics), "tokens": tokens})
        reach("train.step")
    nll = validation_nll(model, data.validation, num_columns=num_columns, micro_batch_tokens=run.micro_batch_tokens, device=device)
    if nll is not None:
        metrics[-1]["validation_nll"] = nll
    return TrainingResult(metrics, nll, tokens, time.perf_counter() - began, start, len(lengths) - len(kept))


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices only: norms and biases have one axis."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _micro_batches(
    rows: Rows, picked: list[int], budget_tokens: int, device: torch.device, weights: StepWeights
) -> Iterator[tuple[Batch, Targets | None]]:
    read = rows.read(picked)
    for part in token_batches(read, budget_tokens):
        batch = collate([(read[i].ids, read[i].first_supervised) for i in part]).to(device)
        targets = move(rows.targets([picked[i] for i in part]), device) if weights.soft > 0.0 else None
        yield batch, targets


def _over_ranks(accelerator: Accelerator, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    if accelerator.num_processes == 1:
        return sums
    return {name: accelerator.reduce(value, reduction="sum") for name, value in sums.items()}


@torch.inference_mode()
def validation_nll(
    model: nn.Module, rows: Sequence[TokenRow], *, num_columns: int, micro_batch_tokens: int, device: torch.device
) -> float | None:
    """Mean negative log-likelihood of the supervised tokens, nats; None without rows. Leaves the model in its mode."""
    if not rows:
        return None
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for part in token_batches(rows, micro_batch_tokens):
        batch = collate([(rows[i].ids, rows[i].first_supervised) for i in part]).to(device)
        logits_BTV = model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False).logits
        logits_NV = logits_BTV[batch.predict_BT][:, :num_columns].float()
        total += float(nn.functional.cross_entropy(logits_NV, batch.labels_N, reduction="sum"))
        count += len(batch.labels_N)
    model.train(was_training)
    return total / count
