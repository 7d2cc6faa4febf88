"""What a recipe says of the objective: weights and temperature over steps, and the divergence."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from kd_core.recipe.fields import Fraction, Frozen

__all__ = [
    "Constant",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "Objective",
    "Piecewise",
    "Ramp",
    "ReverseKL",
    "Schedule",
    "SkewKL",
    "TotalVariation",
    "schedule_values",
]


class Constant(Frozen):
    """The same value at every step."""

    kind: Literal["constant"]
    value: float = Field(ge=0.0)
    """The value."""


class Ramp(Frozen):
    """From `start` at the first step to `end` at the last."""

    kind: Literal["linear", "cosine"]
    start: float = Field(ge=0.0)
    """Value at the first step."""
    end: float = Field(ge=0.0)
    """Value at the last step."""


class Piecewise(Frozen):
    """values[i] from share at[i-1] of the steps to share at[i]."""

    kind: Literal["piecewise"]
    values: tuple[Annotated[float, Field(ge=0.0)], ...] = Field(min_length=1)
    """One value a piece."""
    at: tuple[Fraction, ...]
    """Shares of the steps at which the value changes, rising; one fewer than values."""

    @model_validator(mode="after")
    def _pieces_match(self) -> Self:
        if len(self.at) != len(self.values) - 1 or list(self.at) != sorted(set(self.at)):
            raise ValueError(f"at must hold {len(self.values) - 1} rising shares, one fewer than values")
        return self


def _number_is_constant(value: Any) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {"kind": "constant", "value": value}
    return value


Schedule = Annotated[Constant | Ramp | Piecewise, Field(discriminator="kind"), BeforeValidator(_number_is_constant)]


def schedule_values(schedule: Constant | Ramp | Piecewise) -> tuple[float, ...] | None:
    """All values a schedule takes, or None where it runs through a continuum."""
    match schedule:
        case Constant():
            return (schedule.value,)
        case Piecewise():
            return schedule.values
        case Ramp():
            return (schedule.start,) if schedule.start == schedule.end else None


class ForwardKL(Frozen):
    """KL(teacher || student): the student covers whatever the teacher may say. The only one that sampled labels allow."""

    kind: Literal["forward_kl"]


class ReverseKL(Frozen):
    """KL(student || teacher): the student says only what the teacher finds likely."""

    kind: Literal["reverse_kl"]


class JensenShannon(Frozen):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student."""

    kind: Literal["jsd"]
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """The teacher's share of m."""


class SkewKL(Frozen):
    """KL(teacher || alpha teacher + (1 - alpha) student): forward KL that stays finite where the student has no mass."""

    kind: Literal["skew_kl"]
    alpha: float = Field(default=0.1, gt=0.0, lt=1.0)
    """The teacher's share of the mixture."""


class TotalVariation(Frozen):
    """Half the sum of |teacher - student|: at most 1, and robust where the teacher is wrong."""

    kind: Literal["total_variation"]


def _name_is_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Divergence = Annotated[
    ForwardKL | ReverseKL | JensenShannon | SkewKL | TotalVariation, Field(discriminator="kind"), BeforeValidator(_name_is_kind)
]


class Objective(Frozen):
    """L = hard_weight * CE + soft_weight * T^2 * D(teacher_T || student_T), a mean over supervised tokens of the step."""

    supervision: Literal["soft", "hard", "gold"]
    """soft: the full objective. hard: the same rows, CE alone. gold: gold rows only, CE alone."""
    hard_weight: Schedule = Constant(kind="constant", value=1.0)
    """Weight of the hard labels' cross-entropy under supervision soft."""
    soft_weight: Schedule = Constant(kind="constant", value=0.0)
    """Weight of the soft loss under supervision soft."""
    temperature: Schedule = Constant(kind="constant", value=1.0)
    """T of the soft loss; it must be among the temperatures at which soft labels are stored."""
    divergence: Divergence = ForwardKL(kind="forward_kl")
    """D: forward_kl, reverse_kl, jsd, skew_kl or total_variation."""
