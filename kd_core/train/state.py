"""What changes while a model is trained, and the few things that are done with it: gradients, a step, a validation, a checkpoint.

Sums over ranks are made here and nowhere else. All ranks decide alike, because all see the same reduced numbers.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.errors import TrainingError
from kd_core.losses.objective import StepWeights
from kd_core.packing import isolated_documents
from kd_core.recipe import Objective, Run, Training
from kd_core.train.averaging import Average
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.data import TokenRow, TrainingData
from kd_core.train.feed import Feed, Layout, StepPlan
from kd_core.train.history import History
from kd_core.train.meter import Meter
from kd_core.train.objective_model import ObjectiveModel, validation_sums
from kd_core.train.schedules import best_validation

__all__ = ["TrainingState", "as_trained", "refuse_unsupported"]


def refuse_unsupported(accelerator: Accelerator, training: Training, data: TrainingData) -> None:
    """Refuse what this machine, this launch or these rows cannot do.

    Raises:
        TrainingError: no bfloat16 here, sharded weights, or validations without rows.
    """
    if training.dtype == "bfloat16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainingError("training.dtype: bfloat16, and this device has no bfloat16; use float32")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise TrainingError(
            f"launched with {accelerator.distributed_type.value}: ranks hold whole copies of the weights here; launch with torchrun, or "
            "accelerate launch without sharding"
        )
    if training.validate_every_steps is not None and not data.validation:
        raise TrainingError("training.validate_every_steps: there are no validation rows; raise prompts.split.validation, or leave it out")


@contextlib.contextmanager
def as_trained(model: PreTrainedModel, *, packed: bool, run: Run) -> Iterator[None]:
    """Within: the model is in training mode, with the attention, checkpointing and compilation that ``run`` asks for."""
    if run.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise TrainingError(f"run.activation_checkpointing: {type(model).__name__} has no support for it; set it to false")
    backbone = model.get_decoder()
    model.train()
    with isolated_documents(model) if packed else contextlib.nullcontext():
        try:
            if run.activation_checkpointing:
                model.activation_checkpointing_enable()
            if run.compile:
                backbone.compile(dynamic=True)
            yield
        finally:
            backbone._compiled_call_impl = None
            if run.activation_checkpointing:
                model.activation_checkpointing_disable()


class TrainingState:
    """Weights, optimiser, their average, the best ones so far, and the history."""

    def __init__(
        self, model: PreTrainedModel, *, num_columns: int, training: Training, objective: Objective, accelerator: Accelerator
    ) -> None:
        self.history = History()
        self.objective_model = ObjectiveModel(
            model, num_columns=num_columns, divergence=objective.divergence, bf16=training.dtype == "bfloat16"
        )
        optimiser = torch.optim.AdamW(_parameter_groups(model, training.weight_decay), lr=0.0, betas=training.adam_betas, fused=True)
        self._accelerator, self._training, self._model = accelerator, training, model
        self._wrapped, self._optimiser = accelerator.prepare(self.objective_model, optimiser)
        self._average = None if training.ema_decay is None else Average(model.parameters(), training.ema_decay)
        self._best: dict[str, Tensor] | None = None

    # ------------------------------------------------------------------------------------------ one step

    def gradients(self, feed: Feed, plan: StepPlan, weights: StepWeights, meter: Meter | None = None) -> dict[str, float]:
        """Add up the gradient of a step's mean loss; the loss and its parts, means over the step's supervised tokens."""
        factor = self._accelerator.num_processes / plan.num_supervised  # data-parallel gradients are means over ranks
        sums: dict[str, Tensor] = {}
        for number in range(plan.num_passes):
            batch = feed.read(plan, number, soft=weights.soft > 0.0)
            last = number + 1 == plan.num_passes
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._wrapped):
                loss, parts = self._wrapped(batch, weights)
                self._accelerator.backward(loss * (batch.share * factor))
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + batch.share * value.double()
            if meter is not None:
                meter.count(tokens=batch.num_tokens, supervised=len(batch.labels_N))
        values = self._over_ranks(torch.stack(list(sums.values()))) / plan.num_supervised
        return dict(zip(sums, values.tolist(), strict=True))

    def part_norms(self, feed: Feed, plan: StepPlan, weights: StepWeights) -> dict[str, float]:
        """Norm of the gradient of each part of the objective, before its weight; nothing where there is one part only."""
        if weights.hard == 0.0 or weights.soft == 0.0:
            return {}
        found = {}
        for name, alone in (("hard", replace(weights, hard=1.0, soft=0.0)), ("soft", replace(weights, hard=0.0, soft=1.0))):
            self.gradients(feed, plan, alone)
            found[f"gradient_norm_{name}"] = float(self._accelerator.clip_grad_norm_(self._wrapped.parameters(), math.inf))
            self._optimiser.zero_grad(set_to_none=True)
        return found

    def step(self, step: int, learning_rate: float) -> float:
        """Clip, and move the weights (step is 0-based), or skip a step whose gradients are not finite; the gradient's norm.

        Raises:
            TrainingError: one such step more than training.max_skipped_steps.
        """
        limit = math.inf if self._training.clip_norm is None else self._training.clip_norm
        norm = float(self._accelerator.clip_grad_norm_(self._wrapped.parameters(), limit))
        if math.isfinite(norm):
            for group in self._optimiser.param_groups:
                group["lr"] = learning_rate
            self._optimiser.step()
            if self._average is not None:
                self._average.update(step)
        else:
            self.history.skipped.append(step + 1)
            allowed = self._training.max_skipped_steps
            if len(self.history.skipped) > allowed:
                earlier = f" (and at {allowed} steps before, as training.max_skipped_steps allows)" if allowed else ""
                raise TrainingError(
                    f"step {step + 1}: gradients are not finite{earlier}; lower training.learning_rate or use training.dtype: float32"
                )
        self._optimiser.zero_grad(set_to_none=True)
        return norm

    # ------------------------------------------------------------------------------------------ validation

    def validate(self, step: int, rows: list[TokenRow], layout: Layout) -> dict[str, float]:
        """Loss of the weights that would be kept after ``step`` steps; noted, and its weights held if they are the best.

        Args:
            step: optimiser steps done.
            rows: this rank's share of the validation rows.
            layout: of their batches.
        """
        with contextlib.nullcontext() if self._average is None else self._average.in_place():
            total, count = self._over_ranks(validation_sums(self.objective_model, rows, layout)).tolist()
            if count == 0:
                return {}
            nll = total / count if math.isfinite(total) else math.inf
            self.history.validation.append((step, nll))
            if self._training.keep == "best" and best_validation(self.history.validation) == (step, nll):
                self._best = {name: value.detach().cpu().clone() for name, value in self._model.state_dict().items()}
        return {"validation_nll": nll}

    def keep(self, step: int) -> tuple[int, float | None]:
        """Leave the model with the weights that are kept: (steps after which they stood, their validation loss)."""
        if self._best is not None:
            self._model.load_state_dict(self._best)
            best = best_validation(self.history.validation)
            assert best is not None, "weights are held at validations only"
            return best
        if self._average is not None:
            self._average.exchange()
        measured = self.history.validation[-1:]
        return step, measured[0][1] if measured and measured[0][0] == step else None

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Write all of it after ``step`` steps; one rank writes for all."""
        if self._accelerator.is_main_process:
            state: dict[str, Any] = {"model": self._model.state_dict(), "optimiser": self._optimiser.state_dict()}
            state |= {"history": self.history.dump(), "average": None if self._average is None else self._average.state()}
            checkpoints.save(step, {**state, "best": self._best})

    def resume(self, checkpoints: Checkpoints) -> int:
        """Take up the newest checkpoint; the steps that are done, 0 without one.

        Raises:
            TrainingError: ranks found different ones.
        """
        found = checkpoints.load_newest(torch.device("cpu"))
        steps = gather_object([0 if found is None else found[0]])
        if len(set(steps)) > 1:
            raise TrainingError(
                f"ranks found checkpoints after different steps, {sorted(set(steps))}: another run removes them; start again"
            )
        if found is None:
            return 0
        step, state = found
        self._model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.history = History.load(state["history"])
        if self._average is not None:
            self._average.load(state["average"])
        self._best = None if state["best"] is None else {name: value.cpu() for name, value in state["best"].items()}
        return step

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return sums if self._accelerator.num_processes == 1 else self._accelerator.reduce(sums, reduction="sum")


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on matrices only: norms and biases have one axis. Frozen parameters are not the optimiser's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
