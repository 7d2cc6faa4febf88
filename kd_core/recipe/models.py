"""What a recipe says of models: who teaches, who learns."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from kd_core.recipe.fields import Fraction, Frozen, Revision
from kd_core.recipe.prompts import Source
from kd_core.recipe.training import Training

__all__ = [
    "Adapter",
    "Architecture",
    "CharacterTokenizer",
    "ModelRef",
    "Narrower",
    "NewClassifier",
    "PretrainedStudent",
    "PretrainedTeacher",
    "ServerTeacher",
    "Student",
    "StudentFromConfig",
    "StudentFromTeacher",
    "Teacher",
    "TrainedClassifier",
    "TrainedTeacher",
    "Vocabulary",
    "WordPieces",
]


class CharacterTokenizer(Frozen):
    """One token a character, plus <pad> and <eos>: for small models made from scratch."""

    kind: Literal["characters"]
    alphabet: str = Field(min_length=1)
    """Every character that may occur, each once."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.alphabet)) != len(self.alphabet):
            raise ValueError("alphabet names a character twice; each may stand once")
        return self


class Architecture(Frozen):
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

    @model_validator(mode="before")
    @classmethod
    def _every_head_has_its_own(cls, data: Any) -> Any:
        """The default written out, so that a recipe which states it is the same one."""
        if isinstance(data, dict) and data.get("num_kv_heads") is None and "num_heads" in data:
            return {**data, "num_kv_heads": data["num_heads"]}
        return data

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"hidden_size {self.hidden_size} / num_heads {self.num_heads} must be an even whole number")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        return self

    def projected_columns(self, kind: Literal["queries", "keys", "values"]) -> int:
        """Columns of all heads' queries, keys or values, side by side.

        >>> Architecture(hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2, intermediate_size=8).projected_columns("keys")
        16
        """
        heads = self.num_heads if kind == "queries" else self.num_kv_heads or self.num_heads
        return self.hidden_size // self.num_heads * heads


class ModelRef(Frozen):
    """A pre-trained model."""

    model: str
    """A local directory (from the recipe's own folder; in --set from the working directory), pkg://package/path.gguf inside an installed
    package, or a hub id (then `revision` is required)."""
    revision: Revision | None = None
    """Commit of the hub repository, 40 hex digits; None for a local directory or pkg://."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which the weights are run."""


class PretrainedTeacher(ModelRef):
    """Any transformers causal language model: answers and soft labels."""

    kind: Literal["pretrained"]
    trust_remote_code: bool = False
    """Run code from the model's repository. Off unless you have read that code, which then is part of the teacher's identity."""


class TrainedTeacher(Frozen):
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


ConfigValue = bool | int | float | str | list[int] | list[float] | list[str]
"""A setting of a model's config."""


class WordPieces(Frozen):
    """The commonest words of the teacher's texts, and single characters that spell all others: for text models made from scratch."""

    size: int = Field(default=4096, ge=64, le=1_000_000)
    """Most words and characters that are kept."""


class NewClassifier(Frozen):
    """A classifier with random weights, of any family that transformers knows."""

    kind: Literal["new_classifier"]
    family: str
    """Model type in transformers: vit, resnet, convnext, bert, distilbert ..."""
    config: dict[str, ConfigValue] = Field(default_factory=dict)
    """Settings of the family's config by their names there, such as hidden_size and num_hidden_layers; others keep their defaults."""
    vocabulary: ClassVar[None] = None  # what other students may have
    adapter: ClassVar[None] = None


class TrainedClassifier(Frozen):
    """A classifier that this project trains first, from gold data: from random weights, or from a pre-trained model that is tuned."""

    kind: Literal["trained_classifier"]
    sources: tuple[Source, ...] | None = Field(default=None, min_length=1)
    """Gold data; rows without a class are dropped and counted. None: the recipe's own prompts.sources, without what is held out there."""
    family: str | None = None
    """Model type in transformers, for random weights: vit, resnet, convnext, bert, distilbert ..."""
    config: dict[str, ConfigValue] = Field(default_factory=dict)
    """Settings of the family's config by their names there; others keep their defaults."""
    word_pieces: WordPieces = WordPieces()
    """Tokenizer of a new text model; images have none, and a tuned model brings its own."""
    model: str | None = None
    """A pre-trained model to tune: a local directory, or a hub id (then `revision` is required)."""
    revision: Revision | None = None
    """Commit of the hub repository, 40 hex digits."""
    training: Training
    """How it is trained."""

    @model_validator(mode="after")
    def _begins_with_one(self) -> Self:
        if (self.family is None) == (self.model is None):
            raise ValueError("a teacher begins with new weights of a `family` or with those of a `model`; give one of the two")
        if self.model is not None and self.config:
            raise ValueError("config: a pre-trained model has its own; leave it out")
        return self

    @property
    def reference(self) -> ModelRef | None:
        """The pre-trained model that is tuned; None with random weights."""
        return None if self.model is None else ModelRef(model=self.model, revision=self.revision)


class ServerTeacher(Frozen):
    """A text-only teacher behind an OpenAI-compatible server: sequence-level distillation. Its address is run.teacher_url."""

    kind: Literal["server"]
    model: str
    """Model name in requests."""
    revision: str
    """Which weights the server runs, as you know them (commit, version or date): part of the teacher's identity."""
    price_per_million_tokens: float | None = Field(default=None, ge=0.0)
    """Price of generated tokens, in your currency, for the plan."""


Teacher = Annotated[PretrainedTeacher | TrainedTeacher | TrainedClassifier | ServerTeacher, Field(discriminator="kind")]


class Vocabulary(Frozen):
    """The student keeps the tokens that its data uses; rows and soft labels are mapped when they are read.

    Kept are the tokens of training and validation rows and of all prompts, special and added ones, those that spell any
    other text, and whatever these are merged from.
    """

    keep: Literal["data"]
    """data: what occurs in the rows and prompts of this recipe."""
    num_common: int = Field(default=0, ge=0)
    """Also keep this many of the tokenizer's most common tokens: what its first merges make, or its most likely pieces."""
    least_kept_mass: Fraction = 0.9
    """Mean share of the teacher's probability on kept tokens, measured on soft labels; training with less is refused."""


class StudentFromConfig(Frozen):
    """A new model with random weights and the teacher's tokenizer."""

    kind: Literal["config"]
    architecture: Architecture
    """Size of the student."""
    vocabulary: Vocabulary | None = Field(default=None, exclude_if=lambda value: value is None)
    """Which tokens the student keeps; None keeps all."""


class Adapter(Frozen):
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


class Narrower(Frozen):
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


class StudentFromTeacher(Frozen):
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
    vocabulary: Vocabulary | None = Field(default=None, exclude_if=lambda value: value is None)
    """Which tokens the student keeps; None keeps all."""

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
    vocabulary: Vocabulary | None = Field(default=None, exclude_if=lambda value: value is None)
    """Which tokens the student keeps; None keeps all."""


Student = Annotated[StudentFromConfig | StudentFromTeacher | PretrainedStudent | NewClassifier, Field(discriminator="kind")]
