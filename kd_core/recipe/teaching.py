"""What a recipe says of the teacher's work: answers, what is kept of them, soft labels, hidden states."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kd_core.recipe.fields import Frozen, filled

__all__ = ["Answers", "Curate", "Dense", "HiddenStates", "Sampled", "SoftLabels", "TopK"]


class Answers(Frozen):
    """How the teacher answers prompts."""

    num_samples: int = Field(ge=1, le=1024, json_schema_extra=filled("1; 4 of a server teacher"))
    """Answers a prompt."""
    temperature: float = Field(ge=0.0, le=10.0, json_schema_extra=filled("0.7; 0 in evaluation, where num_samples is 1"))
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus: the smallest set of tokens with this probability."""
    max_tokens: int = Field(
        ge=1,
        json_schema_extra=filled("256, of a server teacher 512, at most half the positions of a trained one; in evaluation as in answers"),
    )
    """Longest answer, tokens; longer ones end with finish reason 'length'."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.temperature == 0.0 and self.num_samples > 1:
            raise ValueError("temperature 0 gives the same answer every time; set num_samples: 1 or a temperature above 0")
        return self


class Curate(Frozen):
    """Which rows the student learns from."""

    keep_unverified: bool = Field(
        default=False, json_schema_extra=filled("true where no answer_marker and no reference says what a final answer is")
    )
    """Keep answers whose prompt has no reference to verify against. Wrong answers are never kept."""
    verify: bool = Field(
        default=True, json_schema_extra=filled("false where no answer_marker and no reference says what a final answer is")
    )
    """False keeps wrong answers too (a teacher that is no expert in the task, taught as a language model)."""
    keep_truncated: bool = False
    """Keep answers that met max_tokens, without an end token."""
    gold_rows: int | None = Field(default=None, ge=0)
    """Worked gold answers mixed in (the first in hash order); None: all there are, 0: none."""
    max_answers_per_prompt: int | None = Field(default=None, ge=1)
    """Distinct kept answers a prompt; None keeps all."""


class _Refusable(Frozen):
    max_refused_rows: int = Field(default=0, ge=0)
    """Rows that may be left out because the teacher gave NaN or infinite logits, or hidden states, on them; one more is an error."""


class Sampled(_Refusable):
    """Unbiased soft labels: N systematic draws from the teacher at one temperature."""

    kind: Literal["sampled"]
    num_draws: int = Field(ge=1, le=65_535, json_schema_extra=filled("25"))
    """Draws a position; 25 beat 50 independent draws on average."""
    temperature: float = Field(gt=0.0, le=100.0, json_schema_extra=filled("that of the objective, or 1"))
    """T0: the only temperature at which these labels may be trained on."""


class TopK(_Refusable):
    """The k most likely tokens, with the exact tail mass at every temperature of a grid."""

    kind: Literal["topk"]
    k: int = Field(ge=1, le=65_535, json_schema_extra=filled("64"))
    """Ids a position (at most the vocabulary)."""
    temperatures: tuple[Annotated[float, Field(gt=0.0, le=100.0)], ...] = Field(
        min_length=1, max_length=16, json_schema_extra=filled("those of the objective, or 1")
    )
    """Temperatures at which the normaliser is stored: training may use these and no others."""


class Dense(_Refusable):
    """All log-probabilities, for small vocabularies: valid at every temperature."""

    kind: Literal["dense"]


SoftLabels = Annotated[Sampled | TopK | Dense, Field(discriminator="kind")]


class HiddenStates(Frozen):
    """Outputs of chosen teacher blocks at supervised positions, in int8: feature distillation without a live teacher."""

    blocks: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Blocks whose output is kept, by number; block 0 is the first one above the embedding."""
    width: int | None = Field(default=None, ge=1)
    """Columns kept; None keeps all."""
    reduce: Literal["slice", "project"] = "slice"
    """slice: the first `width` columns. project: a fixed random projection to `width` columns, which keeps inner products."""

    @model_validator(mode="after")
    def _projection_has_a_width(self) -> Self:
        if self.reduce == "project" and self.width is None:
            raise ValueError("reduce: project needs a width")
        if list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks must rise, each once, found {list(self.blocks)}")
        return self
