"""What a recipe says of a training run: optimiser, learning rate, validations, guards."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, WrapSerializer, model_validator

from kd_core.recipe.fields import Fraction, Frozen
from kd_core.recipe.objective import Constant, Schedule

__all__ = ["Decay", "LearningRateSchedule", "ReduceOnPlateau", "Training", "WarmupStableDecay"]


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


class Training(Frozen):
    """One training run: AdamW with decoupled weight decay, linear warm-up, then a schedule."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_rows: int = Field(ge=1)
    """Rows an optimiser step, over all devices."""
    learning_rate: float = Field(gt=0.0, le=1.0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
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
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        return self

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
