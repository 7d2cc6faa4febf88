"""The training loop: one optimiser step at a time, exact under any split of the batch.

The loss is normalised by the supervised tokens of the whole optimiser step, over all micro-batches and ranks, so
``run.micro_batch_tokens``, packing and the number of devices change speed only. Everything that varies (rows, learning rate,
weights, random numbers) is a function of the seed, the step and the validations so far: a resumed run is the unbroken one.

Ranks (``kd_core.stages.ranks``, ``torchrun``, ``accelerate launch``) share the rows of a step; each holds whole copies of the weights, or
slices (``run.shard_weights``).
"""

import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from kd_core.errors import TrainingError
from kd_core.failpoints import reach
from kd_core.losses.objective import step_weights
from kd_core.progress import Pace, Tick, Ticker
from kd_core.recipe import Objective, Run, Training
from kd_core.summaries import TrainingRun, UsedRows
from kd_core.teacher.models import pick_device
from kd_core.tokens.packing import unpackable
from kd_core.train.batches import Feed, Layout
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.features import FeatureTask
from kd_core.train.row_order import TrainingData
from kd_core.train.schedules import Validations, learning_rate, weight_decay, without_a_best
from kd_core.train.sharding import shall_shard
from kd_core.train.speed import Meter
from kd_core.train.state import TrainingState, as_trained, refuse_launcher_options, refuse_unsupported
from kd_core.train.stopping import sigterm_waits

__all__ = ["TrainingResult", "train"]

_LOG_EVERY = 10
_PART_NORMS_EVERY = 250
_SPEED_READINGS = 100


@dataclass(frozen=True)
class TrainingResult:
    """Report of a training run, beside its weights.

    Attributes:
        metrics: one dict a logged step: step, the objective's parts (loss, hard, soft, feature), gradient_norm (of all
            that learns, projections of features too), learning_rate, weight_decay, temperature, the weights, loss_spikes and
            skipped_steps so far; some carry validation_nll, or the gradient norm of each part before its weight. Losses are means over
            supervised tokens, nats.
        speed: at most about 100 dicts: step, tokens_per_second and supervised_tokens_per_second of this rank, gemm_share,
            peak_memory_bytes. Not reproducible, so kept apart.
        validation_nll: of the weights that are kept, nats a token; None without validation rows.
        kept_step: optimiser steps after which these weights stood.
        steps: optimiser steps that were made, skipped ones included; fewer than asked for after early stopping.
        supervised_tokens: trained on, over all steps.
        seconds: of this process, after a resume only those since.
        resumed_from: step of the checkpoint this run started from; 0 for none.
        packed: whether documents were packed; False: padded.
        skipped: steps whose gradients were not finite.
        spikes: steps whose loss stood out from the 50 before them.
    """

    metrics: list[dict[str, float]]
    speed: list[dict[str, float]]
    validation_nll: float | None
    kept_step: int
    steps: int
    supervised_tokens: int
    seconds: float
    resumed_from: int
    packed: bool
    skipped: list[int]
    spikes: list[int]

    def summary(self, *, num_rows: int, used: UsedRows) -> TrainingRun:
        """Sum up the run for a record.

        Args:
            num_rows: given to it.
            used: of them, within its limit.
        """
        return TrainingRun(
            rows=num_rows,
            used_rows=used,
            steps=self.steps,
            kept_step=self.kept_step,
            resumed_from=self.resumed_from,
            supervised_tokens=self.supervised_tokens,
            validation_nll=self.validation_nll,
            skipped_steps=tuple(self.skipped),
            loss_spikes=tuple(self.spikes),
            packed=self.packed,
            seconds=self.seconds,
            speed=tuple(self.speed),
        )


def train(
    model: PreTrainedModel,
    data: TrainingData,
    *,
    num_columns: int,
    training: Training,
    objective: Objective,
    seed: int,
    run: Run,
    checkpoints: Checkpoints,
    tick: Ticker,
    features: FeatureTask | None = None,
) -> TrainingResult:
    """Train ``model`` in place.

    Args:
        model: a causal language model in float32; parameters that need no gradient stay as they are.
        data: rows, soft labels, validation rows.
        num_columns: logit columns that count; the rest is cut off before normalising.
        training: steps, batch, optimiser, schedule, what is kept.
        objective: what is minimised.
        seed: decides order and dropout.
        run: micro-batch size, checkpoint interval, device.
        checkpoints: where the state is kept.
        tick: progress.
        features: what the objective's features need: block pairs and the teacher's side; None where it has none.

    Raises:
        TrainingError: no rows, more non-finite gradients than allowed, a model whose logits cannot be made here, or SIGTERM: then there
            is a checkpoint after the step that was at work.
        SoftLabelError: missing or invalid soft labels.
    """
    began = time.perf_counter()
    refuse_launcher_options()
    accelerator = Accelerator(cpu=pick_device(run.device).type == "cpu", mixed_precision="no")
    num_ranks = accelerator.num_processes
    refuse_unsupported(accelerator, training, data)
    packed = unpackable(model) is None and not run.compile and (features is None or features.source.packable)
    layout = Layout(packed, run.micro_batch_tokens, accelerator.device)
    source, rank = None if features is None else features.source, accelerator.process_index
    feed = Feed(data.rows, training, layout, seed=seed, rank=rank, num_ranks=num_ranks, features=source)
    state = TrainingState(
        model,
        num_columns=num_columns,
        training=training,
        objective=objective,
        accelerator=accelerator,
        sharded=shall_shard(run, num_ranks),
        features=features,
        seed=seed,
    )
    start = state.resume(checkpoints)
    state.check(feed.first_rows(start, 2), layout)
    products = torch.bfloat16 if training.dtype == "bfloat16" else torch.float32
    meter = Meter(model, num_columns=num_columns, device=accelerator.device, dtype=products)
    history, done, pace = state.history, start, Pace()
    tick(Tick(start, training.steps, "steps"))
    stopped = False
    with sigterm_waits() as stop, as_trained(state.model, packed=packed, run=run):
        for step in range(start, training.steps):
            weights = step_weights(objective, step=step, steps=training.steps)
            rate, decay = learning_rate(training, step, history.validation), weight_decay(training, step)
            plan = feed.plan(step, soft=weights.soft > 0.0, features=weights.feature > 0.0)
            norms = state.part_norms(feed, plan, weights) if step % _PART_NORMS_EVERY == 0 else {}
            means = state.gradients(feed, plan, weights, meter)
            norms["gradient_norm"] = state.step(step, learning_rate=rate, weight_decay=decay)
            done, history.supervised_tokens = step + 1, history.supervised_tokens + plan.num_supervised
            pace.add(rows=training.batch_rows, tokens=plan.num_tokens)
            spike = history.is_spike(done, means["loss"])
            due = training.validate_every_steps is not None and done % training.validate_every_steps == 0
            validated = state.validate(done, data.validation, layout) if due or done == training.steps else {}
            last = done == training.steps or _shall_stop(training, history.validation)
            if last or due or spike or step % _LOG_EVERY == 0 or done in history.skipped:
                acting = {"hard_weight": weights.hard, "soft_weight": weights.soft, "temperature": weights.temperature}
                acting |= {} if features is None else {"feature_weight": weights.feature}
                history.log(done, {**means, **norms, **acting, "learning_rate": rate, "weight_decay": decay, **validated})
                tick(Tick(done, training.steps, "steps", f"loss {means['loss']:.4f}, {pace.read()}"))
            if last or done % max(_LOG_EVERY, training.steps // _SPEED_READINGS) == 0:
                history.speed.append({"step": done, **meter.read()})
            saved = not last and done % run.checkpoint_every_steps == 0
            if saved:
                state.save(checkpoints, done)
            reach("train.step")
            stopped = not last and state.any_rank(stop.requested)
            if stopped and not saved:
                state.save(checkpoints, done)
            if last or stopped:
                break
    if stopped:  # whoever handles the signal has not ended this process
        raise TrainingError(f"stopped by SIGTERM after step {done} of {training.steps}, with a checkpoint; run again to go on")
    kept_step, nll = state.keep(done)
    return TrainingResult(
        metrics=history.metrics,
        speed=history.speed,
        validation_nll=nll,
        kept_step=kept_step,
        steps=done,
        supervised_tokens=history.supervised_tokens,
        seconds=time.perf_counter() - began,
        resumed_from=start,
        packed=packed,
        skipped=history.skipped,
        spikes=history.spikes,
    )


def _shall_stop(training: Training, validation: Validations) -> bool:
    return training.stop_after_validations is not None and without_a_best(validation) >= training.stop_after_validations
