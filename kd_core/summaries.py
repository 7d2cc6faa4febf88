"""Summaries: what a stage hands to the others beside its files. One frozen dataclass a stage, kept in the record as plain data.

A stage returns its dataclass; ``plain`` is what the record holds of it, ``of`` reads it back. A record with a field too many, too
few or of another type is refused by name: nothing is guessed from it. Importable without torch.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from kd_core.errors import ArtifactError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "AnswersSummary",
    "ClassifierIdentity",
    "CurateSummary",
    "EvaluateSummary",
    "GateSummary",
    "Kind",
    "LedgerReference",
    "ModelIdentity",
    "PromptsSummary",
    "PublishSummary",
    "ReportSummary",
    "RowLimit",
    "RuleResult",
    "ScoringSummary",
    "ServerIdentity",
    "ShardedRows",
    "StudentReference",
    "Summary",
    "TeacherSummary",
    "TokenizerIdentity",
    "TrainSummary",
    "TrainingRun",
    "TrimmedVocabulary",
    "UsedRows",
    "VocabularySummary",
    "of",
    "parse",
    "plain",
    "shards_of",
]


class _Closed:
    """Marks a dataclass that is read with the very fields it has, none of them converted."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


# ---------------------------------------------------------------------------------------------- parts of several summaries


@dataclass(frozen=True)
class TokenizerIdentity(_Closed):
    """Identity of a tokenizer: two with the same one read every text alike.

    Attributes:
        vocabulary: fingerprint of token -> id, 32 hex.
        probe: fingerprint of the ids of a probe text; of no ids where the vocabulary is closed and refuses it.
        template: fingerprint of the chat template; of "" where there is none.
        eos: id of the end token; None where it has none.
    """

    vocabulary: str
    probe: str
    template: str
    eos: int | None


@dataclass(frozen=True)
class ModelIdentity(_Closed):
    """Identity of a teacher that runs here. It is part of the identity of its rows: a changed field is another row store.

    Attributes:
        weights: what pins them: checksum of their content, hub id and revision, or the fingerprint of their training.
        tokenizer: its tokenizer's.
        num_columns: logit columns that mean something, at least 1.
        dtype: in which it runs: 'float32', 'bfloat16'.
        engine: what runs it.
    """

    weights: Mapping[str, Any]
    tokenizer: TokenizerIdentity
    num_columns: int
    dtype: str
    engine: Literal["transformers"]


@dataclass(frozen=True)
class ServerIdentity(_Closed):
    """Identity of a teacher behind a server; part of the identity of its answers.

    Attributes:
        engine: what runs it.
        model: its name there.
        revision: its version, as the recipe states it.
    """

    engine: Literal["server"]
    model: str
    revision: str


@dataclass(frozen=True)
class ClassifierIdentity(_Closed):
    """Identity of a teacher that tells classes apart; part of the identity of its rows.

    Attributes:
        engine: what runs it.
        weights: what pins them, as for a model that writes text.
        processor: fingerprint of what prepares its inputs, 32 hex.
        classes: names of its columns, in their order.
        dtype: in which it runs.
    """

    engine: Literal["classifier"]
    weights: Mapping[str, Any]
    processor: str
    classes: tuple[str, ...]
    dtype: str


@dataclass(frozen=True)
class RowLimit(_Closed):
    """Length of the longest row that is learnt from.

    Attributes:
        tokens: prompt and answer together.
        by: what sets it: a field of the recipe, or a model's positions.
    """

    tokens: int
    by: str


@dataclass(frozen=True)
class UsedRows(_Closed):
    """Count of the rows that are within a limit.

    Attributes:
        rows, used: number of rows, and of those within it.
        positions, used_positions: their supervised tokens.
        limit: the limit.
    """

    rows: int
    used: int
    positions: int
    used_positions: int
    limit: RowLimit

    @property
    def share(self) -> float:
        """Share of the rows that are within the limit, 0 to 1; 1 where there are no rows."""
        return self.used / self.rows if self.rows else 1.0

    def __str__(self) -> str:
        left_out = f"; {self.rows - self.used:,} rows are left out, longer than {self.limit.by} = {self.limit.tokens:,}"
        return (
            f"{self.used:,} of {self.rows:,} rows ({self.share:.1%}) are learnt from, with {self.used_positions:,} of "
            f"{self.positions:,} supervised tokens{left_out if self.used < self.rows else ''}"
        )


@dataclass(frozen=True)
class TrainingRun(_Closed):
    """Training of a model, teacher or student, as it went.

    Attributes:
        rows: given to it.
        used_rows: of them, within its limit.
        steps: optimiser steps that were made, skipped ones included; fewer than asked for after early stopping.
        kept_step: steps after which the kept weights stood.
        resumed_from: step of the checkpoint that the finishing process started from; 0 for none.
        supervised_tokens: trained on, over all steps.
        validation_nll: of the kept weights, nats a token; None without validation rows.
        skipped_steps: steps (1-based) whose gradients were not finite.
        loss_spikes: steps (1-based) whose loss stood out.
        packed: whether documents were packed; False: padded.
        seconds: of the finishing process, loading and saving left out.
        speed: readings now and then: step, tokens a second, share of the GEMM rate (0 to 1), peak memory in bytes.
    """

    rows: int
    used_rows: UsedRows
    steps: int
    kept_step: int
    resumed_from: int
    supervised_tokens: int
    validation_nll: float | None
    skipped_steps: tuple[int, ...]
    loss_spikes: tuple[int, ...]
    packed: bool
    seconds: float
    speed: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class ShardedRows(_Closed):
    """Rows of a record that lie in shards of the row store; it freezes the shards that hold them.

    Attributes:
        rows: that the record names, at least 0.
        rows_computed: of them, by the process that finished the stage.
        namespace: name of their row store, 32 hex.
        bytes: of the shards that hold them.
        commits: checksums of those shards, 64 hex each.
    """

    rows: int
    rows_computed: int
    namespace: str
    bytes: int
    commits: tuple[str, ...]


@dataclass(frozen=True)
class TrimmedVocabulary(_Closed):
    """Tokens of a student that was trimmed.

    Attributes:
        tokens: that it has.
        full_tokens: that it had.
        kept_mass: the teacher's mean probability of the kept tokens, 0 to 1; None where no soft labels are learnt from.
    """

    tokens: int
    full_tokens: int
    kept_mass: float | None


@dataclass(frozen=True)
class RuleResult(_Closed):
    """One rule on one suite in words, whether it holds, and the numbers: found and required."""

    rule: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class StudentReference(_Closed):
    """Reference to the student that the gate chose: its artifact, and the seed it was trained with."""

    stage: str
    fingerprint: str
    digest: str
    seed: int


@dataclass(frozen=True)
class LedgerReference(_Closed):
    """Reference to an entry of the promotion ledger that was seen: its number, from 1, and the digest of the bytes it made champion."""

    number: int
    digest: str


# ---------------------------------------------------------------------------------------------- one a stage


@dataclass(frozen=True)
class PromptsSummary(_Closed):
    """Summary of the stage prompts.

    Attributes:
        rows: prompts kept, of all splits.
        counts: what became of those that were read -> how many.
    """

    rows: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class TeacherSummary(_Closed):
    """Summary of the stage teacher.

    Attributes:
        teacher: identity of what answers and scores.
        parameters, bytes: distinct parameters and the bytes of their dtype; None behind a server.
        max_positions: that its authors made it for; None where it has no such number.
        counts: what became of its gold rows -> how many; empty where the recipe does not train it.
        training: how the recipe trained it; None where it did not.
    """

    teacher: Annotated[ModelIdentity | ServerIdentity | ClassifierIdentity, Field(discriminator="engine")]
    parameters: int | None
    bytes: int | None
    max_positions: int | None
    counts: Mapping[str, int]
    training: TrainingRun | None


@dataclass(frozen=True)
class AnswersSummary(_Closed):
    """Summary of the stage answers.

    Attributes:
        shards: the answers.
        tokens: of all answers; 0 of a server's, which come as text.
        finish_reasons: 'stop', 'length', 'error' (failed and left out) -> answers.
    """

    shards: ShardedRows
    tokens: int
    finish_reasons: Mapping[str, int]


@dataclass(frozen=True)
class CurateSummary(_Closed):
    """Summary of the stage curate.

    Attributes:
        rows: to learn from, at least 1.
        supervised_tokens: of them.
        tokens: of them, prompts included.
        counts: why answers were kept or rejected, gold and validation rows -> how many.
    """

    rows: int
    supervised_tokens: int
    tokens: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class ScoringSummary(_Closed):
    """Summary of the stages soft_labels and hidden_states: a pass of the teacher over the curated rows.

    Attributes:
        shards: what was kept of it.
        rows_refused: curated rows without it, as the teacher's output was not usable.
        supervised_tokens: of the rows that have it.
    """

    shards: ShardedRows
    rows_refused: int
    supervised_tokens: int


@dataclass(frozen=True)
class VocabularySummary(_Closed):
    """Summary of the stage vocabulary.

    Attributes:
        tokens: kept.
        full_tokens: of the whole tokenizer.
        seen_tokens: that occur in the texts.
        texts: that were read.
    """

    tokens: int
    full_tokens: int
    seen_tokens: int
    texts: int


@dataclass(frozen=True)
class TrainSummary(_Closed):
    """Summary of the stage train.

    Attributes:
        arm: which of the compared models.
        seed: of its initial weights and the order of its rows.
        parameters, bytes: distinct parameters and the bytes of their dtype.
        training: how it was trained.
        vocabulary: its tokens; None where all are kept.
        feature_blocks: (student's, teacher's) blocks that were compared, from 0; None without features.
    """

    arm: str
    seed: int
    parameters: int
    bytes: int
    training: TrainingRun
    vocabulary: TrimmedVocabulary | None
    feature_blocks: tuple[tuple[int, int], ...] | None


@dataclass(frozen=True)
class EvaluateSummary(_Closed):
    """Summary of the stage evaluate.

    Attributes:
        parameters, bytes: distinct parameters of the model and the bytes of their dtype.
        items: of all suites.
        seeds: models that were measured on them, one a training seed.
        tokens_per_second: mean over the seeds; generated tokens, or scored ones where nothing was sampled.
        undecided_samples: of all seeds, that could not be graded.
        items_beyond_positions: that may need more tokens than the model has positions.
    """

    parameters: int
    bytes: int
    items: int
    seeds: int
    tokens_per_second: float
    undecided_samples: int
    items_beyond_positions: int


@dataclass(frozen=True)
class GateSummary(_Closed):
    """Summary of the stage gate: the verdict.

    Attributes:
        promote: whether the student becomes champion.
        headline: the verdict in one line.
        reasons: one a rule and suite.
        student: the one that is judged.
        champion: the entry whose bytes it was compared with; None where there was none.
    """

    promote: bool
    headline: str
    reasons: tuple[RuleResult, ...]
    student: StudentReference
    champion: LedgerReference | None


@dataclass(frozen=True)
class ReportSummary(_Closed):
    """Summary of the stage report: the gate's verdict, and its headline."""

    promote: bool
    headline: str


@dataclass(frozen=True)
class PublishSummary(_Closed):
    """Summary of the stage publish.

    Attributes:
        tracking: address of the registry, without a password.
        run_id: of MLflow's parent run.
        run_url: its page; None without a server.
        model: registered model name.
        version: of the student there, from 1.
        champion_version: that the alias champion points to; None where there is none.
        promoted: whether the verdict made this student champion.
        ledger: the newest entry that was seen; None where the ledger was empty.
    """

    tracking: str
    run_id: str
    run_url: str | None
    model: str
    version: int
    champion_version: int | None
    promoted: bool
    ledger: LedgerReference | None


Summary = (
    PromptsSummary
    | TeacherSummary
    | AnswersSummary
    | CurateSummary
    | ScoringSummary
    | VocabularySummary
    | TrainSummary
    | EvaluateSummary
    | GateSummary
    | ReportSummary
    | PublishSummary
)

_KINDS: Mapping[str, type[Summary]] = {
    "prompts": PromptsSummary,
    "teacher": TeacherSummary,
    "answers": AnswersSummary,
    "curate": CurateSummary,
    "soft_labels": ScoringSummary,
    "hidden_states": ScoringSummary,
    "vocabulary": VocabularySummary,
    "train": TrainSummary,
    "evaluate": EvaluateSummary,
    "gate": GateSummary,
    "report": ReportSummary,
    "publish": PublishSummary,
}


# ---------------------------------------------------------------------------------------------- to plain data and back


class _Stored(Protocol):
    """Holder of a summary: a record."""

    @property
    def stage(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def summary(self) -> Mapping[str, Any]: ...


Kind = TypeVar("Kind", bound=Summary)
"""Class of a summary."""


def plain(summary: "DataclassInstance") -> dict[str, Any]:
    """Write a dataclass as plain data, as it comes back from a record: tuples are lists."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(summary)))
    return found


def of(record: _Stored, kind: type[Kind]) -> Kind:
    """Read the summary in the record of a stage that hands on such a one.

    Raises:
        ArtifactError: the record is of another stage, or holds another summary than this code writes.
    """
    found = parse(record)
    if not isinstance(found, kind):
        raise ArtifactError(f"{record.stage} {record.fingerprint}: expected a {kind.__name__}, and that stage has a {type(found).__name__}")
    return found


def shards_of(record: _Stored) -> ShardedRows | None:
    """Find the rows that a record froze in a row store; None for a stage without.

    Raises:
        ArtifactError: as ``of``.
    """
    if _KINDS.get(record.stage) not in (AnswersSummary, ScoringSummary):
        return None
    found = parse(record)
    return found.shards if isinstance(found, AnswersSummary | ScoringSummary) else None


def parse(record: _Stored) -> Summary:
    """Read the summary in a record of any stage.

    Raises:
        ArtifactError: a field is missing, unknown or of another type; or there is no such stage.
    """
    stage, fingerprint = record.stage, record.fingerprint
    if stage not in _KINDS:
        raise ArtifactError(f"{stage} {fingerprint}: no stage of this name; the stages are {', '.join(_KINDS)}")
    try:
        found: Summary = _adapter(stage).validate_json(json.dumps(dict(record.summary)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        what = {"missing": "is missing", "unexpected_keyword_argument": "is unknown"}.get(first["type"], f"is wrong: {first['msg']}")
        raise ArtifactError(
            f"{stage} {fingerprint}: field {field!r} of its summary {what}; another version of this code wrote the record: use another "
            f"store, or delete artifacts/{stage}/{fingerprint}/record.json from it, and the next run computes the stage again"
        ) from error
    return found


@cache
def _adapter(stage: str) -> TypeAdapter[Any]:
    return TypeAdapter(_KINDS[stage])
