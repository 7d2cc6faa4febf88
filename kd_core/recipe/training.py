"""What a recipe says of a training run: its length, optimiser, learning rate, validations, guards.

A ``Training`` has a number of steps. A ``StudentTraining`` may name epochs in their place: how many rows there are is known when curation
is done, and ``for_rows`` makes a ``Training`` of it.
"""

from math import ceil, floor
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, WrapSerializer, model_validator

from kd_core.recipe.fields import Fraction, Frozen, filled
from kd_core.recipe.objective import Constant, Schedule

__all__ = ["AnyTraining", "Decay", "LearningRateSchedule", "ReduceOnPlateau", "StudentTraining", "Training", "WarmupStableDecay"]


class Decay(Frozen):
    """From the peak to `final_learning_rate` of it at the last step along a cosine or a line; constant stays at the peak."""

    kind: Literal["cosine", "linear", "constant"]


class WarmupStableDecay(Frozen):
    """At the peak, and in the last part of the steps along a line to `final_learning_rate` of it."""

    kind: Literal["warmup_stable_decay"]
    decay_share: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of all steps in which it falls."""


class ReduceOnPlateau(Frozen):
    """At the peak; lower each time that some validations in a row bring no new best. Never below `final_learning_rate` of the peak."""

    kind: Literal["plateau"]
    factor: float = Field(default=0.5, gt=0.0, lt=1.0)
    """What the learning rate is multiplied by."""
    patience: int = Field(default=2, ge=1)
    """Validations without a new best before it is."""


LearningRateSchedule = Annotated[Decay | WarmupStableDecay | ReduceOnPlateau, Field(discriminator="kind")]


def _constant_as_number(schedule: Schedule, dump: SerializerFunctionWrapHandler) -> Any:
    """A constant is written as its number: how it is spelt in a recipe is no part of what it means."""
    return schedule.value if isinstance(schedule, Constant) else dump(schedule)


class AnyTraining(Frozen):
    """What any training run has, but for its length: AdamW with decoupled weight decay, linear warm-up, then a schedule."""

    batch_rows: int = Field(ge=1)
    """Rows an optimiser step, over all devices."""
    learning_rate: float = Field(gt=0.0, le=1.0)
    """Peak learning rate."""
    learning_rate_schedule: LearningRateSchedule = Decay(kind="cosine")
    """What follows the warm-up: cosine, linear, constant, warmup_stable_decay or plateau."""
    final_learning_rate: Fraction = 0.1
    """Learning rate at the last step, as a share of the peak; constant has no use for it."""
    weight_decay: Annotated[Schedule, WrapSerializer(_constant_as_number)] = Constant(kind="constant", value=0.01)
    """Decoupled weight decay on matrices (not on norms and biases), times the learning rate a step: a number, or a schedule over steps."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradient norm limit; None does not clip."""
    max_tokens: int = Field(default=2048, ge=8)
    """Rows with more tokens, or more than the models have positions, are left out and counted."""
    least_rows_share: Fraction = 0.9
    """Least share of rows that must be short enough; the run stops below it. A condition, and no part of what is computed."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast with fp32 weights; refused on a device without it."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """The weights that are validated and kept are an exponential moving average with this decay a step; None: the weights themselves."""
    validate_every_steps: int | None = Field(default=None, ge=1)
    """Steps between validations; None validates at the end only."""
    keep: Literal["last", "best"] = "last"
    """last: the weights after the last step. best: those with the least validation loss."""
    stop_after_validations: int | None = Field(default=None, ge=1)
    """Stop after so many validations in a row without a new best; None runs all steps."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """Steps that may be skipped because their gradients are NaN or infinite; one more is an error."""

    @model_validator(mode="after")
    def _validations_are_there(self) -> Self:
        readers = {
            "keep: best": self.keep == "best",
            "stop_after_validations": self.stop_after_validations is not None,
            "learning_rate_schedule: plateau": isinstance(self.learning_rate_schedule, ReduceOnPlateau),
        }
        asked = [name for name, asks in readers.items() if asks]
        if asked and self.validate_every_steps is None:
            raise ValueError(f"{', '.join(asked)} goes by validations while training; set validate_every_steps")
        return self


class _Steps(Frozen):
    steps: int = Field(ge=1)
    """Optimiser steps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""


class Training(AnyTraining, _Steps):
    """A training run of so many steps: AdamW with decoupled weight decay, linear warm-up, then a schedule."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self


class _StepsOrEpochs(Frozen):
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; None: as many as `epochs` says."""
    epochs: float | None = Field(default=None, gt=0.0, le=100_000.0, json_schema_extra=filled("3, of a new model 10; none beside steps"))
    """Passes over the curated rows, before any is left out for its length, in place of `steps`. Compared models take the same steps."""
    least_steps: int | None = Field(
        default=None, ge=1, json_schema_extra=filled("50, of a new model 500; none beside steps or epochs of your own")
    )
    """With `epochs`: at least so many optimiser steps, where there are few rows; None: no more than the epochs take."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up, beside `steps`; None: as many as `warmup_share` says."""
    warmup_share: float | None = Field(default=None, ge=0.0, lt=1.0, json_schema_extra=filled("0.05; none beside warmup_steps"))
    """Share of the steps that is linear warm-up, rounded down, in place of `warmup_steps`; from 0 to below 1."""


class StudentTraining(AnyTraining, _StepsOrEpochs):
    """How students are trained, so many steps or epochs: AdamW with decoupled weight decay, linear warm-up, then a schedule."""

    batch_rows: int = Field(ge=1, json_schema_extra=filled("16, of a new model 32"))
    """Rows an optimiser step, over all devices."""
    learning_rate: float = Field(
        gt=0.0,
        le=1.0,
        json_schema_extra=filled(
            "0.00005 of a pre-trained student, 0.0002 with adapters or made from the teacher, of a new model 0.024 / sqrt(hidden_size)"
        ),
    )
    """Peak learning rate."""

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give one of steps and epochs, and leave the other out")
        if self.least_steps is not None and self.epochs is None:
            raise ValueError("least_steps goes with epochs; leave it out beside steps")
        if self.warmup_steps is not None and self.warmup_share is not None:
            raise ValueError("give one of warmup_steps and warmup_share, and leave the other out")
        if self.warmup_steps is not None and self.steps is None:
            raise ValueError("warmup_steps goes with steps; give a warmup_share beside epochs")
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self

    @property
    def length(self) -> str:
        """How long it trains, in words: '500 steps', '3 epochs, at least 50 steps'."""
        if self.epochs is None:
            return f"{self.steps} steps"
        return f"{self.epochs:g} epochs" + ("" if self.least_steps is None else f", at least {self.least_steps} steps")

    def for_rows(self, num_rows: int) -> Training:
        """The training of a student with so many curated rows, its steps and warm-up counted out.

        >>> training = StudentTraining(epochs=2, batch_rows=8, learning_rate=0.1, warmup_share=0.1)
        >>> counted = training.for_rows(101)
        >>> counted.steps, counted.warmup_steps
        (26, 2)
        """
        steps = self.steps
        if steps is None:
            assert self.epochs is not None, "there are steps or epochs"
            steps = max(ceil(self.epochs * num_rows / self.batch_rows), self.least_steps or 1)
        warmup = self.warmup_steps if self.warmup_steps is not None else floor((self.warmup_share or 0.0) * steps)
        shared = {name: getattr(self, name) for name in AnyTraining.model_fields}
        return Training(steps=steps, warmup_steps=warmup, **shared)
