"""State of a training run, and the few things that are done with it: gradients, a step, a validation, a checkpoint.

Sums over ranks are made here and nowhere else. All ranks decide alike, because all see the same reduced numbers. Ranks hold whole
copies of the weights, or slices of a second copy (``run.shard_weights``), from which the model given gets its weights at the end.
"""

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.errors import TrainingError
from kd_core.losses.objective import StepWeights
from kd_core.recipe import Objective, Run, Training
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.packing import isolated_documents
from kd_core.train.averaging import Average
from kd_core.train.batches import Feed, Layout, StepPlan, dealt_batches
from kd_core.train.checkpoints import Checkpoints
from kd_core.train.features import FeatureTask
from kd_core.train.history import History
from kd_core.train.objective_model import ObjectiveModel, validation_sums
from kd_core.train.reading import Reading
from kd_core.train.row_order import TrainingData
from kd_core.train.schedules import best_validation
from kd_core.train.sharding import part_of, shard, slice_of, whole
from kd_core.train.speed import Meter

__all__ = ["TrainingState", "as_trained", "refuse_launcher_options", "refuse_unsupported"]

_PARTS = ("hard", "soft", "feature")
_Result = TypeVar("_Result")
_ASKED_BY_LAUNCHERS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "set run.micro_batch_tokens: it would divide every gradient"),
    "ACCELERATE_MIXED_PRECISION": ("no", "set training.dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "set run.compile"),
}
"""Variable -> the value that changes nothing, and what to do in place of another."""


def refuse_launcher_options() -> None:
    """Refuse what a launcher asks of accelerate that would change training behind the recipe's back; before an ``Accelerator`` reads it.

    Raises:
        TrainingError: it does.
    """
    for name, (allowed, instead) in _ASKED_BY_LAUNCHERS.items():
        if (asked := os.environ.get(name, allowed)).lower() != allowed:
            raise TrainingError(f"launched with {name}={asked}, which the recipe says nothing of; unset it, and {instead}")


def refuse_unsupported(accelerator: Accelerator, training: Training, data: TrainingData) -> None:
    """Refuse what this machine, this launch or these rows cannot do.

    Raises:
        TrainingError: no bfloat16 here, a launcher that does more than start ranks, or validations without rows.
    """
    if training.dtype == "bfloat16" and accelerator.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise TrainingError("training.dtype: bfloat16, and this device has no bfloat16; use float32")
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    if accelerator.distributed_type not in known:
        raise TrainingError(
            f"launched with {accelerator.distributed_type.value}: ranks hold whole copies of the weights here, or slices with "
            "run.shard_weights: true; launch with torchrun, or accelerate launch with --multi_gpu, --multi_cpu or --use_fsdp"
        )
    if training.validate_every_steps is not None and not data.validation:
        raise TrainingError("training.validate_every_steps: there are no validation rows; raise prompts.split.validation, or leave it out")


@contextlib.contextmanager
def as_trained(model: PreTrainedModel, backbone: nn.Module, *, packed: bool, run: Run) -> Iterator[None]:
    """Within: the model is in training mode, with the attention, checkpointing and compilation that ``run`` asks for."""
    if run.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise TrainingError(f"run.activation_checkpointing: {type(model).__name__} has no support for it; set it to false")
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
        self,
        model: PreTrainedModel,
        *,
        num_columns: int,
        training: Training,
        objective: Objective,
        accelerator: Accelerator,
        reading: Reading,
        sharded: bool = False,
        features: FeatureTask | None = None,
        seed: int = 0,
    ) -> None:
        self.history = History()
        self._accelerator, self._training, self._sharded, self._given = accelerator, training, sharded, model
        self.model = copy.deepcopy(model) if sharded else model
        self.feature_loss = None if features is None else features.loss(self.model, seed=seed)
        self.objective_model = reading.objective_model(
            self.model,
            num_columns=num_columns,
            divergence=objective.divergence,
            bf16=training.dtype == "bfloat16",
            feature_loss=self.feature_loss,
            places=() if features is None else features.student_places(self.model),
        )
        self._wrapped = self._prepared()
        groups = _parameter_groups(self.model)
        if self.feature_loss is not None:
            groups.append({"params": list(self.feature_loss.parameters()), "weight_decay": 0.0})
        self._optimiser = torch.optim.AdamW(groups, lr=0.0, betas=training.adam_betas, fused=True)
        self._average = None if training.ema_decay is None else Average(self.model.parameters(), training.ema_decay)
        self._best: dict[str, Tensor] | None = None

    def _prepared(self) -> Any:
        if not self._sharded:
            return self._accelerator.prepare(self.objective_model)
        ranks = self._accelerator.num_processes
        blocks = list(self.model._no_split_modules or ())
        return shard(self.objective_model, blocks, device=self._accelerator.device, num_ranks=ranks, methods=("within",))

    # ------------------------------------------------------------------------------------------ one step

    def gradients(self, feed: Feed, plan: StepPlan, weights: StepWeights, meter: Meter | None = None) -> dict[str, float]:
        """Add up the gradient of a step's mean loss; the loss and its parts, means over the step's supervised tokens."""
        torch.manual_seed(plan.seed)
        factor = self._accelerator.num_processes / plan.num_supervised  # data-parallel gradients are means over ranks
        sums: dict[str, Tensor] = {}
        for number in range(plan.num_passes):
            batch = feed.read(plan, number, soft=weights.soft > 0.0, features=weights.feature > 0.0)
            last = number + 1 == plan.num_passes
            whole_copies_wait = not self._sharded and not last  # slices are summed after each pass: a whole gradient may not fit
            with self._accelerator.no_sync(self._wrapped) if whole_copies_wait else contextlib.nullcontext():
                loss, parts = self._wrapped(batch, weights)
                self._accelerator.backward(loss * (batch.share * factor))
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + batch.share * value.double()
            if meter is not None:
                meter.count(tokens=batch.num_tokens, supervised=len(batch.labels_N))
        values = self._over_ranks(torch.stack(list(sums.values()))) / plan.num_supervised
        return dict(zip(sums, values.tolist(), strict=True))

    def part_norms(self, feed: Feed, plan: StepPlan, weights: StepWeights) -> dict[str, float]:
        """Norm of the student's gradient of each part of the objective, before its weight; nothing where there is one part only."""
        acting = [name for name in _PARTS if getattr(weights, name) > 0.0]
        found: dict[str, float] = {}
        for name in acting if len(acting) > 1 else ():
            self.gradients(feed, plan, replace(weights, **{part: float(part == name) for part in _PARTS}))
            if self.feature_loss is not None:
                self.feature_loss.zero_grad(set_to_none=True)
            found[f"gradient_norm_{name}"] = self._clip(math.inf)
            self._optimiser.zero_grad(set_to_none=True)
        return found

    def step(self, step: int, *, learning_rate: float, weight_decay: float) -> float:
        """Clip, and move the weights (step is 0-based), or skip a step whose gradients are not finite; the gradient's norm.

        Raises:
            TrainingError: one such step more than training.max_skipped_steps.
        """
        limit = math.inf if self._training.clip_norm is None else self._training.clip_norm
        norm = self._clip(limit)
        if math.isfinite(norm):
            for group in self._optimiser.param_groups:
                group["lr"] = learning_rate
            self._optimiser.param_groups[0]["weight_decay"] = weight_decay
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

    def _clip(self, limit: float) -> float:
        """Norm of the whole gradient, which is scaled to the limit where it is above."""
        return float(whole(nn.utils.clip_grad_norm_(self._wrapped.parameters(), limit)))

    # ------------------------------------------------------------------------------------------ validation

    def check(self, rows: list[TokenRow], layout: Layout) -> None:
        """Compare our logits with the model's own; all ranks with the same rows."""
        self.objective_model.eval()
        self._within(lambda model: model.check(rows, layout))

    def validate(self, step: int, rows: Sequence[TokenRow], layout: Layout) -> dict[str, float]:
        """Loss of the weights that would be kept after ``step`` steps; noted, and its weights held if they are the best.

        Args:
            step: optimiser steps done.
            rows: all validation rows; ranks deal them out.
            layout: of their batches.
        """
        batches = dealt_batches(rows, layout, rank=self._accelerator.process_index, num_ranks=self._accelerator.num_processes)
        with contextlib.nullcontext() if self._average is None else self._average.in_place():
            sums = self._within(lambda model: validation_sums(model, batches, layout))
            total, count = self._over_ranks(sums).tolist()
            if count == 0:
                return {}
            nll = total / count if math.isfinite(total) else math.inf
            self.history.validation.append((step, nll))
            if self._training.keep == "best" and best_validation(self.history.validation) == (step, nll):
                self._best = {name: slice_of(value).detach().cpu().clone() for name, value in self.model.state_dict().items()}
        return {"validation_nll": nll}

    def keep(self, step: int) -> tuple[int, float | None]:
        """Leave the model given with the weights that are kept: (steps after which they stood, their validation loss).

        Raises:
            TrainingError: that loss is not finite: the run diverged, and these weights are no model.
        """
        if self._best is not None:
            best = best_validation(self.history.validation)
            assert best is not None, "weights are held at validations only"
            self._put(self._best, self.model.state_dict())
            kept: tuple[int, float | None] = best
        else:
            if self._average is not None:
                self._average.exchange()
            kept = step, dict(self.history.validation).get(step)
        if kept[1] == math.inf:
            raise TrainingError(f"the validation loss after step {kept[0]} is not finite: the run diverged; lower training.learning_rate")
        if self._sharded:
            given = self._given.state_dict()
            for name, value in self.model.state_dict().items():
                given[name].copy_(whole(value))
        return kept

    def _within(self, function: Callable[[ObjectiveModel], _Result]) -> _Result:
        found = self.objective_model.within(function)
        if self._sharded:
            self._wrapped.reshard()  # what lies outside of blocks stays gathered until a backward pass, and there is none
        return found

    @staticmethod
    @torch.no_grad()
    def _put(slices: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        for name, value in into.items():
            slice_of(value).copy_(slices[name])

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self, checkpoints: Checkpoints, step: int) -> None:
        """Write all of it after ``step`` steps; one rank writes for all, and slices are gathered for it."""
        main = self._accelerator.is_main_process
        if not main and not self._sharded:
            return

        def kept(tensor: Tensor, like: Tensor | None = None) -> Tensor:
            full = whole(tensor, like)
            return full if main else full.new_empty(0)

        weights, optimiser = self.model.state_dict(), self._optimiser.state_dict()
        state = {
            "model": {name: kept(value) for name, value in weights.items()},
            "optimiser": {**optimiser, "state": {i: {n: kept(v) for n, v in one.items()} for i, one in optimiser["state"].items()}},
            "history": self.history.dump(),
            "average": None if self._average is None else [kept(value) for value in self._average.state()],
            "best": None if self._best is None else {name: kept(value, weights[name]) for name, value in self._best.items()},
        }
        if self.feature_loss is not None:
            state["feature_loss"] = {name: kept(value) for name, value in self.feature_loss.state_dict().items()}
        if main:
            checkpoints.save(step, state)

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
        weights = self.model.state_dict()
        parameters = [parameter for group in self._optimiser.param_groups for parameter in group["params"]]
        moments = {
            i: {name: part_of(value, parameters[i]) if value.ndim else value for name, value in one.items()}
            for i, one in state["optimiser"]["state"].items()
        }
        self._put(_slices(state["model"], weights), weights)
        if self.feature_loss is not None:
            learned = self.feature_loss.state_dict()
            self._put(_slices(state["feature_loss"], learned), learned)
        self._optimiser.load_state_dict({**state["optimiser"], "state": moments})
        self.history = History.load(state["history"])
        if self._average is not None:
            self._average.load([slice_of(part_of(v, p)) for v, p in zip(state["average"], self._average.state(), strict=True)])
        self._best = None if state["best"] is None else _slices(state["best"], weights)
        return step

    def any_rank(self, said: bool) -> bool:
        """Tell whether one of the ranks says so; all get the same answer."""
        if self._accelerator.num_processes == 1:
            return said
        return bool(self._over_ranks(torch.tensor([float(said)], device=self._accelerator.device)).item())

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return sums if self._accelerator.num_processes == 1 else self._accelerator.reduce(sums, reduction="sum")


def _slices(full: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: slice_of(part_of(value, like[name])).cpu() for name, value in full.items()}


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest: norms and biases have one axis. Frozen parameters are not the optimiser's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
