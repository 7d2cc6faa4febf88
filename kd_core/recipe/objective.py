"""What a recipe says of the objective: weights and temperature over steps, the divergence, features of inner states."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from kd_core.recipe.fields import Fraction, Frozen, filled

__all__ = [
    "BlockPair",
    "Constant",
    "Divergence",
    "Features",
    "ForwardKL",
    "HiddenStateFeatures",
    "JensenShannon",
    "Objective",
    "Piecewise",
    "Ramp",
    "RelationFeatures",
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
    if not isinstance(value, Mapping | Frozen):
        raise ValueError(f"must be a number or a schedule, such as {{kind: linear, start: 1.0, end: 0.0}}, found {value!r}")
    return value


Schedule = Annotated[
    Constant | Ramp | Piecewise,
    Field(discriminator="kind"),
    BeforeValidator(_number_is_constant, json_schema_input_type=Annotated[float, Field(ge=0.0)] | Constant | Ramp | Piecewise),
]


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


_Divergence = ForwardKL | ReverseKL | JensenShannon | SkewKL | TotalVariation
_Name = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "total_variation"]
Divergence = Annotated[_Divergence, Field(discriminator="kind"), BeforeValidator(_name_is_kind, json_schema_input_type=_Name | _Divergence)]


class BlockPair(Frozen):
    """A block of the student that learns from a block of the teacher; block 0 is the first one above the embedding."""

    student: int = Field(ge=0)
    """Number of the student's block."""
    teacher: int = Field(ge=0)
    """Number of the teacher's block."""


class _Matched(Frozen):
    blocks: tuple[BlockPair, ...] | None = Field(default=None, min_length=1)
    """Which block learns from which, rising on both sides; None spaces them evenly, last to last (the plan shows the pairs)."""
    weight: Schedule = Constant(kind="constant", value=1.0)
    """Weight of the feature loss."""

    @model_validator(mode="after")
    def _pairs_rise(self) -> Self:
        for side in ("student", "teacher"):
            numbers = [getattr(pair, side) for pair in self.blocks or ()]
            if numbers != sorted(set(numbers)):
                raise ValueError(f"blocks: the {side}'s blocks must rise, each once, found {numbers}")
        return self


class HiddenStateFeatures(_Matched):
    """Outputs of the student's blocks, through a projection that is learned and then dropped, against those of the teacher's blocks."""

    kind: Literal["hidden_states"]
    source: Literal["cached", "live"]
    """cached: the int8 states that the recipe's hidden_states keeps. live: the teacher runs beside the student in every step."""
    loss: Literal["mse", "cosine", "normalised_mse"] = "normalised_mse"
    """mse: mean over columns of the squared difference. cosine: 1 - cosine. normalised_mse: squared distance over the teacher's squared
    norm."""


class RelationFeatures(_Matched):
    """Scaled dot products between positions, among queries, keys or values (MiniLM): any widths and head counts. The teacher runs live.

    As the projections give them: before rotary positions and norms of heads.
    """

    kind: Literal["relations"]
    between: tuple[Literal["queries", "keys", "values"], ...] = Field(default=("queries", "keys", "values"), min_length=1)
    """Whose products are compared, each with its own kind."""
    num_heads: int = Field(ge=1)
    """Relation heads: queries, keys and values of all heads are cut into so many, on both sides."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.between)) != len(self.between):
            raise ValueError(f"between: each may stand once, found {list(self.between)}")
        return self


Features = Annotated[HiddenStateFeatures | RelationFeatures, Field(discriminator="kind")]


class Objective(Frozen):
    """L = hard_weight * CE + soft_weight * T^2 * D(teacher_T || student_T) + features.weight * F, a mean over a step's tokens."""

    supervision: Literal["soft", "hard", "gold"] = Field(
        json_schema_extra=filled("soft; hard of a server teacher, or with soft_labels: null")
    )
    """soft: the full objective. hard: the same rows, CE alone. gold: gold rows only, CE alone."""
    hard_weight: Schedule = Field(default=Constant(kind="constant", value=1.0), json_schema_extra=filled("0.1 under supervision: soft"))
    """Weight of the hard labels' cross-entropy under supervision soft."""
    soft_weight: Schedule = Field(default=Constant(kind="constant", value=0.0), json_schema_extra=filled("0.9 under supervision: soft"))
    """Weight of the soft loss under supervision soft."""
    temperature: Schedule = Field(
        default=Constant(kind="constant", value=1.0),
        json_schema_extra=filled("the first that soft labels are stored at, under supervision: soft"),
    )
    """T of the soft loss; it must be among the temperatures at which soft labels are stored."""
    divergence: Divergence = ForwardKL(kind="forward_kl")
    """D: forward_kl, reverse_kl, jsd, skew_kl or total_variation."""
    features: Features | None = Field(default=None, exclude_if=lambda value: value is None)
    """F: what else the student learns from the teacher's inner states under supervision soft; None: nothing."""
