"""What a recipe says of evidence: suites, what is compared, the rules of promotion."""

from typing import Annotated, Literal

from pydantic import Field

from kd_core.recipe.fields import Frozen, Slug, filled
from kd_core.recipe.prompts import Source
from kd_core.recipe.teaching import Answers

__all__ = ["BetterThan", "Ceiling", "Evaluation", "Floor", "Gate", "HeldOutSuite", "NotWorseThanChampion", "Rule", "SourceSuite", "Suite"]


class HeldOutSuite(Frozen):
    """The test split of the recipe's own prompts."""

    kind: Literal["held_out"]
    name: Slug
    """Name in reports."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` items in hash order; None uses all. A run needs 2 or more: one item says nothing of others."""


class SourceSuite(Frozen):
    """A benchmark of its own; prompts that overlap with it are removed from training."""

    kind: Literal["source"]
    name: Slug
    """Name in reports."""
    source: Source
    """Where its items come from."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` items in hash order; None uses all. A run needs 2 or more: one item says nothing of others."""


Suite = Annotated[HeldOutSuite | SourceSuite, Field(discriminator="kind")]


class Evaluation(Frozen):
    """What is measured, on which items, how sure we want to be."""

    suites: tuple[Suite, ...] = Field(min_length=1, json_schema_extra=filled("[{kind: held_out, name: held_out}]"))
    """Suites; a gate rule holds for each of them, unless it names one. The report begins with the first."""
    generate: Answers | None = Field(json_schema_extra=filled("one greedy answer; none without an answer_marker or a reference"))
    """Sampling for pass@1 / accuracy; None measures held-out NLL, KL and agreement only."""
    compare: tuple[Literal["teacher", "baseline", "ablation_hard"], ...] = Field(
        json_schema_extra=filled(
            "teacher unless it is a server; baseline where there are gold answers, else ablation_hard beside supervision: soft"
        )
    )
    """Models beside the student. baseline: gold labels only. ablation_hard: same rows, hard labels only. Same steps."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Coverage of every interval over new items and, with two seeds or more, new seeds; between 0.5 and 1."""


class BetterThan(Frozen):
    """The paired difference to another model of this run, over all seeds, with its whole interval above `by`.

    Against baseline and ablation_hard two recipes are compared, which needs two seeds or more. The teacher is one model.
    """

    kind: Literal["better_than"]
    metric: str
    """pass_at_1, nll, kl or agreement; for nll and kl, lower is better."""
    than: Literal["teacher", "baseline", "ablation_hard"]
    """The other model."""
    by: float = 0.0
    """Least improvement, in the metric's unit."""
    suite: Slug | None = None
    """Name of the suite it is about; None: it must hold on every suite."""


class NotWorseThanChampion(Frozen):
    """Paired non-inferiority of the seed that would be published to the current champion; passes when there is none."""

    kind: Literal["not_worse_than_champion"]
    metric: str
    """pass_at_1, nll, kl or agreement."""
    margin: float = Field(ge=0.0)
    """Largest acceptable loss, in the metric's unit."""
    suite: Slug | None = None
    """Name of the suite it is about; None: it must hold on every suite."""


class Floor(Frozen):
    """The low end of the interval of the seed that would be published is at least `minimum`."""

    kind: Literal["floor"]
    metric: str
    """pass_at_1 or agreement."""
    minimum: float
    """Least acceptable value."""
    suite: Slug | None = None
    """Name of the suite it is about; None: it must hold on every suite."""


class Ceiling(Frozen):
    """A cost of the student is at most `maximum`."""

    kind: Literal["ceiling"]
    metric: Literal["parameter_ratio", "parameters", "bytes", "truncated"]
    """parameter_ratio: student / teacher. truncated: share of answers that met max_tokens, of the seed that would be published."""
    maximum: float
    """Largest acceptable value."""
    suite: Slug | None = None
    """For truncated: name of the suite it is about; None: it must hold on every suite. Other costs have none."""


Rule = Annotated[BetterThan | NotWorseThanChampion | Floor | Ceiling, Field(discriminator="kind")]


class Gate(Frozen):
    """The rules of promotion; all must hold."""

    rules: tuple[Rule, ...] = Field(min_length=1, json_schema_extra=filled("as `gate` says"))
    """Rules: costs by their value, everything else by its interval."""
