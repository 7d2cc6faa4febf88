"""The typed recipe: what is distilled (identity) and where it runs (``run``).

One frozen model. Every field but ``description`` and ``run`` is identity: it decides *what* is computed and enters the
fingerprints. ``run`` decides where and how fast, and never does. Absent is None; there are no sentinels and no hidden
defaults that matter. Importable without torch. Loading from YAML and error lines live in ``recipe_io``.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "ARMS",
    "Adapter",
    "Answers",
    "Architecture",
    "Arm",
    "BetterThan",
    "Ceiling",
    "CharacterTokenizer",
    "Constant",
    "Curate",
    "DatasetSource",
    "Decay",
    "Dense",
    "Divergence",
    "Evaluation",
    "FileSource",
    "Floor",
    "ForwardKL",
    "Gate",
    "HeldOutSuite",
    "HiddenStates",
    "JensenShannon",
    "LearningRateSchedule",
    "ModelRef",
    "Narrower",
    "NotWorseThanChampion",
    "Objective",
    "PretrainedStudent",
    "PretrainedTeacher",
    "Prompts",
    "ReasoningGymSource",
    "Recipe",
    "ReduceOnPlateau",
    "ReverseKL",
    "Rule",
    "Run",
    "S3Options",
    "Sampled",
    "Schedule",
    "ServerTeacher",
    "SkewKL",
    "SoftLabels",
    "Source",
    "SourceSuite",
    "StudentFromConfig",
    "StudentFromTeacher",
    "Suite",
    "Task",
    "Teacher",
    "TopK",
    "TotalVariation",
    "TrainedTeacher",
    "Training",
    "WarmupStableDecay",
    "schedule_values",
]

Slug = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Arm = Literal["student", "baseline", "ablation_hard"]
ARMS: tuple[Arm, ...] = ("student", "baseline", "ablation_hard")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


# ---------------------------------------------------------------------------------------------- task and prompts


class Task(_Frozen):
    """How a prompt becomes tokens and an answer becomes right or wrong."""

    template: Literal["plain", "chat"]
    """plain: the prompt's own text. chat: the tokenizer's chat template, with the generation prompt added."""
    system: str | None = None
    """System message for the chat template; None sends none."""
    answer_marker: str | None = None
    """The final answer is what follows the last occurrence of this text (GSM8K: '####'); None: the whole answer."""
    verifier: Literal["math", "exact"]
    """math: equal as numbers or LaTeX (math-verify). exact: equal after trimming white space."""


class FileSource(_Frozen):
    """Rows of JSONL, JSON or Parquet files, local or s3://."""

    kind: Literal["file"]
    path: str
    """A path, a glob, or s3://bucket/key; .jsonl, .json or .parquet."""
    prompt: str
    """The prompt, as a template over columns: '{question}' or '{Body} {Question}'."""
    gold: str | None = None
    """The worked gold answer, as a template over columns; None where there is none."""
    reference: str | None = None
    """The final answer to verify against; None: what follows task.answer_marker in the gold answer."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` rows; None uses all."""


class DatasetSource(_Frozen):
    """A Hugging Face `datasets` id at a pinned revision."""

    kind: Literal["dataset"]
    id: str
    """Hub id, for example openai/gsm8k."""
    revision: Revision
    """Commit of the dataset repository, 40 hex digits."""
    config: str | None = None
    """Configuration name, where the data set has several."""
    split: str
    """Split name, for example train."""
    prompt: str
    """The prompt, as a template over columns."""
    gold: str | None = None
    """The worked gold answer, as a template over columns."""
    reference: str | None = None
    """The final answer, as a template over columns; None: what follows task.answer_marker in the gold answer."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` rows; None uses all."""


class ReasoningGymSource(_Frozen):
    """A procedural family of the reasoning-gym package: row i depends on (seed, i) only, so a larger `num` keeps the first rows."""

    kind: Literal["reasoning_gym"]
    task: str
    """Task name in reasoning-gym, for example chain_sum."""
    config: dict[str, int | float | str | bool | list[int | float | str]] = {}
    """The task's own settings."""
    num: int = Field(ge=1, le=10_000_000)
    """Rows to generate, before cleaning and removal of duplicates."""
    seed: int = Field(ge=0)
    """Seed of the generator."""
    style: Literal["question", "running_totals"] = "question"
    """question: the task's own text, no worked gold. running_totals (chain_sum only): '7+5-9=' with the worked gold '7+5=12,12-9=3#3'."""


Source = Annotated[FileSource | DatasetSource | ReasoningGymSource, Field(discriminator="kind")]


class Split(_Frozen):
    """Shares of prompts held out, by a hash of the prompt's text: the same prompt is on the same side in every source and run."""

    validation: Fraction
    """Share used for choosing between students."""
    test: Fraction
    """Share used only by evaluation suites of kind held_out."""

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        if self.validation + self.test >= 1.0:
            raise ValueError(f"validation + test is {self.validation + self.test:g}; it must be below 1 to leave training prompts")
        return self


class Prompts(_Frozen):
    """Where prompts come from and what is removed."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Sources, read in order; on a doubled prompt the first one wins."""
    split: Split
    """Shares held out for validation and test."""
    max_characters: int = Field(default=20_000, ge=1)
    """Longer prompts are dropped and counted."""


# ---------------------------------------------------------------------------------------------- models


class CharacterTokenizer(_Frozen):
    """One token a character, plus <pad> and <eos>: for small models made from scratch."""

    kind: Literal["characters"]
    alphabet: str = Field(min_length=1)
    """Every character that may occur, each once."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError("alphabet names a character twice; each may stand once")
        return self


class Architecture(_Frozen):
    """A decoder-only Llama-style model made from scratch."""

    hidden_size: int = Field(ge=8)
    """Width of the residual stream."""
    num_layers: int = Field(ge=1)
    """Number of blocks."""
    num_heads: int = Field(ge=1)
    """Query heads; must divide hidden_size into an even head size."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key-value heads; None: as many as query heads."""
    intermediate_size: int = Field(ge=8)
    """Width of the gated feed-forward part."""
    max_positions: int = Field(default=512, ge=16)
    """Longest sequence, tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be an even whole number")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        return self


class ModelRef(_Frozen):
    """A pre-trained causal language model."""

    model: str
    """A local directory, pkg://package/path.gguf inside an installed package, or a hub id (then `revision` is required)."""
    revision: Revision | None = None
    """Commit of the hub repository, 40 hex digits; None for a local directory or pkg://."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which the weights are run."""


class Decay(_Frozen):
    """From the peak to `final_learning_rate` of it at the last step along a cosine or a line; constant stays at the peak."""

    kind: Literal["cosine", "linear", "constant"]


class WarmupStableDecay(_Frozen):
    """At the peak, and in the last part of the steps along a line to `final_learning_rate` of it."""

    kind: Literal["warmup_stable_decay"]
    decay_share: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of all steps in which it falls."""


class ReduceOnPlateau(_Frozen):
    """At the peak; lower each time that some validations in a row bring no new best. Never below `final_learning_rate` of the peak."""

    kind: Literal["plateau"]
    factor: float = Field(default=0.5, gt=0.0, lt=1.0)
    """What the learning rate is multiplied by."""
    patience: int = Field(default=2, ge=1)
    """Validations without a new best before it is."""


LearningRateSchedule = Annotated[Decay | WarmupStableDecay | ReduceOnPlateau, Field(discriminator="kind")]


class Training(_Frozen):
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
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay on matrices (not on norms and biases)."""
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradient norm limit; None does not clip."""
    max_tokens: int = Field(default=2048, ge=8)
    """Rows with more tokens are left out and counted."""
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


class PretrainedTeacher(ModelRef):
    """Any transformers causal language model: answers and soft labels."""

    kind: Literal["pretrained"]
    trust_remote_code: bool = False
    """Run code from the model's repository. Off unless you have read that code; recorded with the artifact."""


class TrainedTeacher(_Frozen):
    """A teacher that this project trains first, from plenty of gold data; validation and test prompts are left out by hash."""

    kind: Literal["trained"]
    sources: tuple[Source, ...] = Field(min_length=1)
    """Gold data; rows without a worked gold answer are dropped and counted."""
    tokenizer: CharacterTokenizer
    """Tokenizer of teacher and student."""
    architecture: Architecture
    """Size of the teacher."""
    training: Training
    """How it is trained."""


class ServerTeacher(_Frozen):
    """A text-only teacher behind an OpenAI-compatible server: sequence-level distillation. Its address is run.teacher_url."""

    kind: Literal["server"]
    model: str
    """Model name in requests."""
    revision: str
    """Which weights the server runs, as you know them (commit, version or date): part of the teacher's identity."""
    price_per_million_tokens: float | None = Field(default=None, ge=0.0)
    """Price of generated tokens, in your currency, for the plan."""


Teacher = Annotated[PretrainedTeacher | TrainedTeacher | ServerTeacher, Field(discriminator="kind")]


class StudentFromConfig(_Frozen):
    """A new model with random weights and the teacher's tokenizer."""

    kind: Literal["config"]
    architecture: Architecture
    """Size of the student."""


class Adapter(_Frozen):
    """Low-rank updates learn and the student's own weights stand still; they are merged before the student is written."""

    kind: Literal["lora", "dora"]
    """lora: W + alpha / rank * B A. dora: that, with the norm of each row of W learnt apart from its direction."""
    rank: int = Field(ge=1, le=4096)
    """Rows of A and columns of B."""
    alpha: float = Field(gt=0.0)
    """Scale of the update, over rank."""
    dropout: Fraction = 0.0
    """Share of an adapter's inputs that are dropped in training."""
    modules: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    """Projections that get an adapter, in every block."""

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if self.dropout == 1.0:
            raise ValueError("dropout 1 drops all inputs, so nothing is learnt; use a share below 1")
        if len(set(self.modules)) != len(self.modules):
            raise ValueError(f"modules: each may stand once, found {list(self.modules)}")
        return self


class Narrower(_Frozen):
    """Parts of the teacher's width that the student keeps: those that write most on training rows, in the order they stood in."""

    hidden_size: int | None = Field(default=None, ge=2)
    """Channels of the residual stream, the same in all blocks; None keeps all."""
    num_heads: int | None = Field(default=None, ge=1)
    """Query heads a block, as many in each group of a key-value head; where every head has its own, they go together. None keeps all."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Hidden units of the feed-forward part, chosen block by block; None keeps all."""
    sample_rows: int = Field(default=128, ge=1, le=4096)
    """Curated rows, drawn by the student's seed, on which the teacher's activations are measured."""

    @model_validator(mode="after")
    def _narrows(self) -> Self:
        if self.hidden_size is None and self.num_heads is None and self.intermediate_size is None:
            raise ValueError("nothing becomes narrower; give hidden_size, num_heads or intermediate_size, or leave narrower out")
        return self


class StudentFromTeacher(_Frozen):
    """Blocks of the teacher, perhaps narrower, with its embeddings, final norm and head: every n-th, some at the ends, or a list."""

    kind: Literal["from_teacher"]
    every_nth_block: int = Field(default=1, ge=1)
    """3 keeps blocks 0, 3, 6 ...; 1 keeps all."""
    first_blocks: int | None = Field(default=None, ge=1)
    """Keep this many blocks next to the embeddings (and last_blocks), in place of every n-th."""
    last_blocks: int | None = Field(default=None, ge=1)
    """Keep this many blocks next to the head (and first_blocks), in place of every n-th."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """Keep these blocks, by number from 0, in place of every n-th."""
    narrower: Narrower | None = None
    """Parts of the width to keep; None keeps all."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key-value heads: neighbours are averaged to this many; None leaves them as they are."""
    share_embeddings: bool = False
    """Use the input embeddings as the head too; where the teacher does so already, nothing changes."""
    adapter: Adapter | None = None
    """Train adapters in place of all weights; None trains all."""

    @model_validator(mode="after")
    def _blocks_are_chosen_once(self) -> Self:
        ends = self.first_blocks is not None or self.last_blocks is not None
        if (self.every_nth_block > 1) + ends + (self.blocks is not None) > 1:
            raise ValueError("blocks are chosen twice; use one of every_nth_block, first_blocks with last_blocks, or blocks")
        if self.blocks is not None and list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks must rise, each once, found {list(self.blocks)}")
        return self

    def kept_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """Numbers of the kept blocks of a teacher with `num_blocks`, rising.

        Raises:
            ValueError: the teacher has too few; the message begins with the field.

        >>> StudentFromTeacher(kind="from_teacher", first_blocks=2, last_blocks=1).kept_blocks(6)
        (0, 1, 5)
        """
        first, last = self.first_blocks or 0, self.last_blocks or 0
        if first + last > num_blocks:
            raise ValueError(f"first_blocks + last_blocks: {first + last}, and the teacher has {num_blocks} blocks; use fewer")
        if first + last:
            return (*range(first), *range(num_blocks - last, num_blocks))
        if self.blocks is not None:
            if self.blocks[-1] >= num_blocks:
                raise ValueError(
                    f"blocks: {self.blocks[-1]}, and the teacher has {num_blocks} blocks; use numbers from 0 to {num_blocks - 1}"
                )
            return self.blocks
        if self.every_nth_block > max(1, num_blocks - 1):
            found = f"every_nth_block: {self.every_nth_block}, and the teacher has {num_blocks} blocks"
            raise ValueError(f"{found}; use at most {max(1, num_blocks - 1)}")
        return tuple(range(0, num_blocks, self.every_nth_block))


class PretrainedStudent(ModelRef):
    """A pre-trained model that goes on learning. With soft labels it must share the teacher's tokenizer."""

    kind: Literal["pretrained"]
    adapter: Adapter | None = None
    """Train adapters in place of all weights; None trains all."""


Student = Annotated[StudentFromConfig | StudentFromTeacher | PretrainedStudent, Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------------- teacher's work


class Answers(_Frozen):
    """How the teacher answers prompts."""

    num_samples: int = Field(ge=1, le=1024)
    """Answers a prompt."""
    temperature: float = Field(ge=0.0, le=10.0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Nucleus: the smallest set of tokens with this probability."""
    max_tokens: int = Field(ge=1)
    """Longest answer, tokens; longer ones end with finish reason 'length'."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.temperature == 0.0 and self.num_samples > 1:
            raise ValueError("temperature 0 gives the same answer every time; set num_samples: 1 or a temperature above 0")
        return self


class Curate(_Frozen):
    """Which rows the student learns from."""

    keep_unverified: bool = False
    """Keep answers whose prompt has no reference to verify against. Wrong answers are never kept."""
    verify: bool = True
    """False keeps wrong answers too (a teacher that is no expert in the task, taught as a language model)."""
    keep_truncated: bool = False
    """Keep answers that met max_tokens, without an end token."""
    gold_rows: int | None = Field(default=None, ge=0)
    """Worked gold answers mixed in (the first in hash order); None: all there are, 0: none."""
    max_answers_per_prompt: int | None = Field(default=None, ge=1)
    """Distinct kept answers a prompt; None keeps all."""


class _Refusable(_Frozen):
    max_refused_rows: int = Field(default=0, ge=0)
    """Rows that may be left out because the teacher gave NaN or infinite logits on them; one more is an error."""


class Sampled(_Refusable):
    """Unbiased soft labels: N systematic draws from the teacher at one temperature."""

    kind: Literal["sampled"]
    num_draws: int = Field(ge=1, le=65_535)
    """Draws a position; 25 beat 50 independent draws on average."""
    temperature: float = Field(gt=0.0, le=100.0)
    """T0: the only temperature at which these labels may be trained on."""


class TopK(_Refusable):
    """The k most likely tokens, with the exact tail mass at every temperature of a grid."""

    kind: Literal["topk"]
    k: int = Field(ge=1, le=65_535)
    """Ids a position (at most the vocabulary)."""
    temperatures: tuple[Annotated[float, Field(gt=0.0, le=100.0)], ...] = Field(min_length=1, max_length=16)
    """Temperatures at which the normaliser is stored: training may use these and no others."""


class Dense(_Refusable):
    """All log-probabilities, for small vocabularies: valid at every temperature."""

    kind: Literal["dense"]


SoftLabels = Annotated[Sampled | TopK | Dense, Field(discriminator="kind")]


class HiddenStates(_Frozen):
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


# ---------------------------------------------------------------------------------------------- objective


class Constant(_Frozen):
    """The same value at every step."""

    kind: Literal["constant"]
    value: float = Field(ge=0.0)
    """The value."""


class Ramp(_Frozen):
    """From `start` at the first step to `end` at the last."""

    kind: Literal["linear", "cosine"]
    start: float = Field(ge=0.0)
    """Value at the first step."""
    end: float = Field(ge=0.0)
    """Value at the last step."""


class Piecewise(_Frozen):
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


class ForwardKL(_Frozen):
    """KL(teacher || student): the student covers whatever the teacher may say. The only one that sampled labels allow."""

    kind: Literal["forward_kl"]


class ReverseKL(_Frozen):
    """KL(student || teacher): the student says only what the teacher finds likely."""

    kind: Literal["reverse_kl"]


class JensenShannon(_Frozen):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student."""

    kind: Literal["jsd"]
    beta: float = Field(default=0.5, gt=0.0, lt=1.0)
    """The teacher's share of m."""


class SkewKL(_Frozen):
    """KL(teacher || alpha teacher + (1 - alpha) student): forward KL that stays finite where the student has no mass."""

    kind: Literal["skew_kl"]
    alpha: float = Field(default=0.1, gt=0.0, lt=1.0)
    """The teacher's share of the mixture."""


class TotalVariation(_Frozen):
    """Half the sum of |teacher - student|: at most 1, and robust where the teacher is wrong."""

    kind: Literal["total_variation"]


def _name_is_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Divergence = Annotated[
    ForwardKL | ReverseKL | JensenShannon | SkewKL | TotalVariation, Field(discriminator="kind"), BeforeValidator(_name_is_kind)
]


class Objective(_Frozen):
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


# ---------------------------------------------------------------------------------------------- evaluation and gate


class HeldOutSuite(_Frozen):
    """The test split of the recipe's own prompts."""

    kind: Literal["held_out"]
    name: Slug
    """Name in reports."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` items in hash order; None uses all."""


class SourceSuite(_Frozen):
    """A benchmark of its own; prompts that overlap with it are removed from training."""

    kind: Literal["source"]
    name: Slug
    """Name in reports."""
    source: Source
    """Where its items come from."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` items in hash order; None uses all."""


Suite = Annotated[HeldOutSuite | SourceSuite, Field(discriminator="kind")]


class Evaluation(_Frozen):
    """What is measured, on which items, how sure we want to be."""

    suites: tuple[Suite, ...] = Field(min_length=1)
    """Suites; the first is the one that gate rules and the headline use."""
    generate: Answers | None
    """Sampling for pass@1 / accuracy; None measures held-out NLL, KL and agreement only."""
    compare: tuple[Literal["teacher", "baseline", "ablation_hard"], ...] = ("teacher", "baseline")
    """Models beside the student. baseline: gold labels only. ablation_hard: same rows, hard labels only. Same steps."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """Coverage of every interval."""


class BetterThan(_Frozen):
    """The paired difference to another model of this run, with its whole interval above `by`."""

    kind: Literal["better_than"]
    metric: str
    """pass_at_1, nll, kl or agreement; for nll and kl, lower is better."""
    than: Literal["teacher", "baseline", "ablation_hard"]
    """The other model."""
    by: float = 0.0
    """Least improvement, in the metric's unit."""


class NotWorseThanChampion(_Frozen):
    """Paired non-inferiority to the current champion; passes when there is none."""

    kind: Literal["not_worse_than_champion"]
    metric: str
    """pass_at_1, nll, kl or agreement."""
    margin: float = Field(ge=0.0)
    """Largest acceptable loss, in the metric's unit."""


class Floor(_Frozen):
    """The low end of the student's interval is at least `minimum`."""

    kind: Literal["floor"]
    metric: str
    """pass_at_1 or agreement."""
    minimum: float
    """Least acceptable value."""


class Ceiling(_Frozen):
    """A cost of the student is at most `maximum`."""

    kind: Literal["ceiling"]
    metric: Literal["parameter_ratio", "parameters", "bytes", "truncated"]
    """parameter_ratio: student / teacher. truncated: share of answers that met max_tokens."""
    maximum: float
    """Largest acceptable value."""


Rule = Annotated[BetterThan | NotWorseThanChampion | Floor | Ceiling, Field(discriminator="kind")]


class Gate(_Frozen):
    """The rules of promotion; all must hold."""

    rules: tuple[Rule, ...] = Field(min_length=1)
    """Rules: costs by their value, everything else by its interval."""


# ---------------------------------------------------------------------------------------------- run


class S3Options(_Frozen):
    """How to reach an S3-compatible server. Credentials come from the environment or a role, never from here."""

    endpoint: str | None = None
    """http(s):// address; None is AWS."""
    region: str = "us-east-1"
    """Region name."""
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    """when_required for servers that refuse the default checksums."""


class Run(_Frozen):
    """Where and how fast. Nothing here changes a result, so nothing here enters a fingerprint."""

    store: str = ".kd/store"
    """A local directory, or s3://bucket/prefix."""
    s3: S3Options = S3Options()
    """Options of an s3:// store and of s3:// sources."""
    tracking: str | None = None
    """MLflow tracking URI; None: MLFLOW_TRACKING_URI, or else sqlite:///.kd/mlflow.db."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch; None leaves its default."""
    micro_batch_tokens: int = Field(default=16_384, ge=64)
    """Tokens a forward pass, padding included, in training and scoring."""
    generate_rows: int = Field(default=256, ge=1)
    """Sequences decoded together."""
    shard_rows: int = Field(default=512, ge=1)
    """Rows a committed shard of answers or soft labels: what a kill can cost."""
    num_workers: int = Field(default=1, ge=1)
    """Processes that run this recipe at the same time and share the teacher's work, each with its own `worker`."""
    worker: int = Field(default=0, ge=0)
    """Which of them this is, 0-based. Any of them can finish the work alone."""
    disk_cache: str = ".kd/cache"
    """Directory on this machine for parts of a remote store that training has read."""
    disk_cache_bytes: int = Field(default=20 * 2**30, ge=0)
    """Its largest size; 0 keeps none, so that every epoch reads from the store."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept; each holds the best weights so far as well."""
    activation_checkpointing: bool = False
    """Keep no activations inside blocks and compute them again for the gradient: less memory, a third more time."""
    compile: bool = False
    """Run the student's blocks through torch.compile; its first steps are slow."""
    teacher_url: str | None = None
    """Base URL of the server teacher, for example http://127.0.0.1:8000/v1."""
    teacher_concurrency: int = Field(default=32, ge=1, le=1024)
    """Requests in flight to a server teacher."""
    score_tokens_per_second: float | None = Field(default=None, gt=0.0)
    """Rate of the scoring pass, tokens a second, prompts included, for the plan; None: as finished records measured it."""
    price_per_hour: float | None = Field(default=None, ge=0.0)
    """Price of this machine, for the plan and the report."""
    price_per_gb_month: float | None = Field(default=None, ge=0.0)
    """Price of 10^9 bytes kept in the store for a month, for the plan."""
    price_per_thousand_requests: float | None = Field(default=None, ge=0.0)
    """Price of a thousand requests to the store, for the plan: reads and writes alike, so state the dearer one."""

    @model_validator(mode="after")
    def _is_one_of_the_workers(self) -> Self:
        if self.worker >= self.num_workers:
            raise ValueError(f"worker {self.worker} is not one of num_workers {self.num_workers}; they are counted from 0")
        return self


# ---------------------------------------------------------------------------------------------- the recipe


class Recipe(_Frozen):
    """A recipe goes in, a promoted student with its evidence comes out."""

    name: Slug
    """Name of the recipe; part of no fingerprint but the publication's."""
    description: str = ""
    """For readers."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(min_length=1)
    """One student (and one of each compared model) is trained a seed; the first also seeds the teacher and its answers."""
    task: Task
    """Template, answer form and verifier."""
    prompts: Prompts
    """Prompts for the teacher."""
    teacher: Teacher
    """Who teaches."""
    answers: Answers | None
    """How the teacher answers; None: no teacher answers, the student learns from gold rows (with soft labels on them)."""
    curate: Curate = Curate()
    """Which rows are kept."""
    soft_labels: SoftLabels | None
    """How the teacher's distribution is stored; None: sequence-level distillation."""
    hidden_states: HiddenStates | None = None
    """Teacher's hidden states to keep beside the soft labels; None keeps none."""
    student: Student
    """Who learns."""
    objective: Objective
    """What is minimised."""
    training: Training
    """How the student is trained."""
    evaluation: Evaluation
    """What is measured."""
    gate: Gate
    """When the student is promoted."""
    publish: Slug
    """Registered model name; its alias 'champion' moves when the gate says so."""
    run: Run = Run()
    """Where and how fast; no part of identity."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        problem = next(_unsupported(self), None)
        if problem:
            raise ValueError(problem)
        return self

    def arm(self, arm: Arm) -> "Recipe":
        """The recipe of a compared model: this recipe with one changed field, ``objective.supervision``."""
        if arm == "student":
            return self
        supervision: Literal["hard", "gold"] = "hard" if arm == "ablation_hard" else "gold"
        objective = self.objective.model_copy(update={"supervision": supervision})
        return self.model_copy(update={"objective": objective})

    def arms(self) -> tuple[Arm, ...]:
        """The student and the compared models that are trained, in a fixed order."""
        return tuple(arm for arm in ARMS if arm == "student" or arm in self.evaluation.compare)


def _unsupported(recipe: Recipe) -> Iterator[str]:
    """Every combination that would be meaningless or silently wrong, as 'path: what is wrong; what is allowed'."""
    yield from _unsupported_targets(recipe)
    yield from _unsupported_validations(recipe)
    if len(set(recipe.seeds)) != len(recipe.seeds):
        yield "seeds: a seed stands twice; each may stand once"
    if isinstance(recipe.teacher, ServerTeacher) and isinstance(recipe.student, StudentFromTeacher):
        yield "student.kind: from_teacher needs the teacher's weights, and a server teacher has none here; use pretrained or config"
    if isinstance(recipe.teacher, ServerTeacher) and recipe.hidden_states is not None:
        yield "hidden_states: a server teacher has none to give; leave them out"
    if isinstance(recipe.teacher, ServerTeacher) and isinstance(recipe.student, StudentFromConfig):
        yield "student.kind: config takes the teacher's tokenizer, and a server teacher has none here; use pretrained"
    if recipe.answers is None and recipe.curate.gold_rows == 0:
        yield "curate.gold_rows: 0 with answers: null leaves no rows to learn from; allow gold rows or ask for answers"
    if "ablation_hard" in recipe.evaluation.compare and recipe.objective.supervision != "soft":
        yield "evaluation.compare: ablation_hard compares with objective.supervision: soft, and this recipe has none"
    if "baseline" in recipe.evaluation.compare and recipe.curate.gold_rows == 0:
        yield "evaluation.compare: baseline learns from gold rows, and curate.gold_rows is 0; allow gold rows or leave baseline out"
    if "teacher" in recipe.evaluation.compare and isinstance(recipe.teacher, ServerTeacher):
        yield "evaluation.compare: teacher cannot be measured here, as a server teacher has no weights here; leave it out"
    names = [suite.name for suite in recipe.evaluation.suites]
    if len(set(names)) != len(names):
        yield f"evaluation.suites: names must differ, found {names}"
    held_out = any(isinstance(suite, HeldOutSuite) for suite in recipe.evaluation.suites)
    if held_out and recipe.prompts.split.test == 0.0:
        yield "prompts.split.test: 0 leaves nothing for the held_out suite; use a share above 0, for example 0.1"
    if len(recipe.seeds) > 1 and recipe.prompts.split.validation == 0.0:
        yield "prompts.split.validation: 0 leaves nothing to choose the published seed by; use a share above 0, for example 0.05"
    metrics = {"nll"} if recipe.evaluation.generate is None else {"nll", "pass_at_1"}
    if not isinstance(recipe.teacher, ServerTeacher):
        metrics |= {"kl", "agreement"}
    for i, rule in enumerate(recipe.gate.rules):
        if isinstance(rule, BetterThan) and rule.than not in recipe.evaluation.compare:
            yield f"gate.rules[{i}].than: {rule.than} is not in evaluation.compare {list(recipe.evaluation.compare)}"
        allowed = metrics - {"nll", "kl"} if isinstance(rule, Floor) else metrics  # less is better there
        if not isinstance(rule, Ceiling) and rule.metric not in allowed:
            yield f"gate.rules[{i}].metric: {rule.metric} is not measured by this recipe or not for this rule; allowed: {_listed(allowed)}"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _unsupported_validations(recipe: Recipe) -> Iterator[str]:
    if isinstance(recipe.teacher, TrainedTeacher) and recipe.teacher.training.validate_every_steps is not None:
        yield "teacher.training.validate_every_steps: a trained teacher has no validation rows; leave it out"
    if recipe.training.validate_every_steps is not None and recipe.prompts.split.validation == 0.0:
        yield "prompts.split.validation: 0 leaves nothing for training.validate_every_steps; use a share above 0, for example 0.05"


def _unsupported_targets(recipe: Recipe) -> Iterator[str]:
    labels, objective = recipe.soft_labels, recipe.objective
    if objective.supervision != "soft":
        return
    if isinstance(recipe.teacher, ServerTeacher):
        yield "objective.supervision: soft needs a teacher that can score text, and a server teacher only speaks it; use hard"
    if labels is None:
        yield "soft_labels: objective.supervision: soft needs them; choose sampled, topk or dense, or set supervision: hard"
        return
    if schedule_values(objective.soft_weight) == (0.0,):
        yield "objective.soft_weight: 0 under supervision: soft trains on hard labels alone; give it a weight, or set supervision: hard"
    temperature = objective.temperature
    used = schedule_values(temperature)
    reached = (temperature.start, temperature.end) if isinstance(temperature, Ramp) else used or ()
    if min(reached) <= 0.0:
        yield "objective.temperature: must be above 0 at every step"
    if isinstance(labels, Sampled) and not isinstance(objective.divergence, ForwardKL):
        yield (
            f"objective.divergence: {objective.divergence.kind} is not linear in the teacher's probabilities, so draws of them would make "
            "it biased; use forward_kl with soft_labels.kind: sampled, or keep topk or dense soft labels"
        )
    allowed: tuple[float, ...] | None
    match labels:
        case Sampled():
            allowed = (labels.temperature,)
        case TopK():
            allowed = labels.temperatures
        case Dense():
            allowed = None
    if allowed is not None and (used is None or not set(used) <= set(allowed)):
        found = "a ramp" if used is None else "/".join(f"{t:g}" for t in used)
        stored = ", ".join(f"{t:g}" for t in allowed)
        yield f"objective.temperature: {found} is not among the temperatures stored by soft_labels.{labels.kind}: {stored}"
