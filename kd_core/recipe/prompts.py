"""What a recipe says of its task and of where prompts come from."""

import datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from kd_core.recipe.fields import Fraction, Frozen, Revision, filled

__all__ = [
    "AnyTask",
    "ClassificationTask",
    "DatasetSource",
    "FileSource",
    "FolderSource",
    "Prompts",
    "ReasoningGymSource",
    "ScikitLearnSource",
    "Source",
    "Split",
    "Task",
]


class Task(Frozen):
    """Generated text: how a prompt becomes tokens and an answer becomes right or wrong."""

    kind: Literal["generation"] = Field(default="generation", exclude_if=lambda value: value == "generation")
    """The student writes text."""
    template: Literal["plain", "chat"] = Field(json_schema_extra=filled("plain beside a trained teacher, else chat"))
    """plain: the prompt's own text. chat: the tokenizer's chat template, with the generation prompt added. Control tokens that a prompt
    spells stay text in both."""
    system: str | None = None
    """System message for the chat template, for prompts that have none of their own; None sends none."""
    date: datetime.date | None = None
    """The day that a chat template writes where it asks for today's, for example 2026-01-01; needed by templates that ask."""
    answer_marker: str | None = None
    """The final answer is what follows the last occurrence of this text (GSM8K: '####'); None: the whole answer."""
    verifier: Literal["math", "exact"] = Field(
        json_schema_extra=filled("exact where there is no answer_marker and no reference to verify by; else say it")
    )
    """math: equal as numbers or LaTeX (math-verify). exact: equal after trimming white space."""


class ClassificationTask(Frozen):
    """Classes: a text or an image in, a probability for each class out. A row's gold answer is the name of its class.

    A training row without one is learnt by the class that the teacher finds likeliest.
    """

    kind: Literal["classification"]
    """The student tells classes apart."""
    input: Literal["text", "image"]
    """What is classified: the prompt's own text; or an image, whose path a file's prompt is, seen from that file."""


def _kind_of_task(task: Any) -> str:
    """The tag of a task, given as data or as a model: generation where it says none."""
    kind = task.get("kind", "generation") if isinstance(task, dict) else getattr(task, "kind", "generation")
    return str(kind)


AnyTask = Annotated[
    Annotated[Task, Tag("generation")] | Annotated[ClassificationTask, Tag("classification")],
    Discriminator(_kind_of_task),
]
"""Every kind of task; what the stages do for one is its file in ``kd_core.task_kinds``."""


_Columns = TypeVar("_Columns", "FileSource", "DatasetSource")


def _one_of_prompt_and_messages(source: _Columns) -> _Columns:
    if (source.prompt is None) == (source.messages is None):
        raise ValueError("say either prompt, such as '{question}', or messages, the column of chat turns")
    if source.messages is not None and source.gold is not None:
        raise ValueError("gold: the last assistant turn of messages is the gold answer; leave gold out")
    return source


class FileSource(Frozen):
    """Rows of JSONL, JSON, CSV, TSV or Parquet files, local or s3://."""

    kind: Literal["file"]
    path: str
    """A path from the recipe's own folder (in --set: from the working directory), a glob ('**' is any folders), or s3://bucket/key.
    Names end in .jsonl, .json, .csv, .tsv or .parquet, and may go on with .gz or .zst."""
    prompt: str | None = None
    """The prompt, as a template over columns: '{question}' or '{Body} {Question}'; None where `messages` is given."""
    gold: str | None = None
    """The worked gold answer, as a template over columns; None where there is none."""
    messages: str | None = None
    """A column of chat turns, {role, content} or ShareGPT's {from, value}, in place of `prompt` and `gold`. The last assistant turn is
    the gold answer, and alone is learnt; all before it is the prompt, in the chat template. A row that ends in a user or tool turn has
    no gold answer; a system message of a row goes before task.system."""
    reference: str | None = None
    """The final answer to verify against; None: what follows task.answer_marker in the gold answer."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` rows; None uses all."""

    _prompts_are_said = model_validator(mode="after")(_one_of_prompt_and_messages)


class DatasetSource(Frozen):
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
    prompt: str | None = None
    """The prompt, as a template over columns; None where `messages` is given."""
    gold: str | None = None
    """The worked gold answer, as a template over columns."""
    messages: str | None = None
    """A column of chat turns in place of `prompt` and `gold`, as in a source of kind file."""
    reference: str | None = None
    """The final answer, as a template over columns; None: what follows task.answer_marker in the gold answer."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` rows; None uses all."""

    _prompts_are_said = model_validator(mode="after")(_one_of_prompt_and_messages)


class ReasoningGymSource(Frozen):
    """A procedural family of the reasoning-gym package: row i depends on (seed, i) only, so a larger `num` keeps the first rows."""

    kind: Literal["reasoning_gym"]
    task: str
    """Task name in reasoning-gym, for example chain_sum."""
    config: dict[str, int | float | str | bool | list[int | float | str]] = Field(default_factory=dict)
    """The task's own settings."""
    num: int = Field(ge=1, le=10_000_000)
    """Rows to generate, before cleaning and removal of duplicates."""
    seed: int = Field(ge=0)
    """Seed of the generator."""
    style: Literal["question", "running_totals"] = "question"
    """question: the task's own text, no worked gold. running_totals (chain_sum only): '7+5-9=' with the worked gold '7+5=12,12-9=3#3'."""


class FolderSource(Frozen):
    """Images in a folder with one folder a class; images that lie beside these folders have no class."""

    kind: Literal["folder"]
    path: str
    """The folder: PATH/<class>/<image>, for PNG, JPEG, WebP, BMP, GIF and TIFF. Names that begin with a dot are passed over."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` images in the order of their names, each class in turn; None uses all."""


class ScikitLearnSource(Frozen):
    """Images that the scikit-learn package brings along."""

    kind: Literal["scikit_learn"]
    dataset: Literal["digits"]
    """digits: 1,797 handwritten digits, 8 x 8 grey pixels, classes '0' to '9'."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first `limit` images; None uses all."""


Source = Annotated[FileSource | DatasetSource | ReasoningGymSource | FolderSource | ScikitLearnSource, Field(discriminator="kind")]


class Split(Frozen):
    """Shares of prompts held out, by a hash of the prompt's words: the same words are on the same side in every source and run, and
    near copies are on the side of one of them."""

    validation: Fraction = Field(json_schema_extra=filled("0.05"))
    """Share used for choosing between students."""
    test: Fraction = Field(json_schema_extra=filled("0.1; 0 where no suite is held_out"))
    """Share used only by evaluation suites of kind held_out."""

    @model_validator(mode="after")
    def _leaves_train(self) -> Self:
        if self.validation + self.test >= 1.0:
            raise ValueError(f"validation + test is {self.validation + self.test:g}; it must be below 1 to leave training prompts")
        return self


class Prompts(Frozen):
    """Where prompts come from and what is removed."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Sources, read in order; of duplicate prompts the first one wins."""
    split: Split = Field(json_schema_extra=filled("{validation: 0.05, test: 0.1}"))
    """Shares held out for validation and test."""
    max_characters: int = Field(default=20_000, ge=1)
    """Longer prompts are dropped and counted."""
