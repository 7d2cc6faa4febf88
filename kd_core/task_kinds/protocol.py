"""Protocol of a kind of task: what the stages ask of it, so that order, cache, objective, training loop and gate know no modality."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from kd_core.artifacts import Record
from kd_core.evaluate.measure import Measured
from kd_core.progress import Ticker
from kd_core.prompts import PromptSet
from kd_core.recipe import Recipe, SoftLabels
from kd_core.softlabels.capture import Scores
from kd_core.store import Store
from kd_core.summaries import ClassifierIdentity, Kind, ModelIdentity
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.token_map import TokenMap
from kd_core.train.reading import Reading

__all__ = ["Curation", "NewTeacher", "TaskKind", "TaskModel", "Workplace"]


class Workplace(Protocol):
    """A node at work, as a kind of task sees it (``kd_core.stages.job.Job``)."""

    @property
    def recipe(self) -> Recipe:
        """The whole recipe."""
        ...

    @property
    def inputs(self) -> Mapping[str, Record]:
        """Role -> finished record of the upstream node."""
        ...

    @property
    def store(self) -> Store:
        """Where artifacts live."""
        ...

    @property
    def directory(self) -> Path:
        """Folder of the artifact that is made."""
        ...

    @property
    def tick(self) -> Ticker:
        """Progress."""
        ...

    def read_table(self, role: str, name: str) -> pa.Table:
        """Read a Parquet file of an upstream artifact, verified."""
        ...

    def files(self, record: Record) -> AbstractContextManager[Path]:
        """The files of an artifact as local files, for the time of the context."""
        ...

    def summary(self, role: str, kind: type[Kind]) -> Kind:
        """Read what an upstream node hands on beside its files."""
        ...


class TaskModel(Protocol):
    """A model ready to run, with what its kind of task needs beside it."""

    @property
    def model(self) -> PreTrainedModel:
        """The model itself."""
        ...

    @property
    def num_columns(self) -> int:
        """Logit columns that mean something."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def num_parameters(self) -> int:
        """Distinct parameters."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct parameters."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Tokens of a row that it was made for; None where that is no matter of rows."""
        ...

    @property
    def token_map(self) -> TokenMap | None:
        """Its ids against the teacher's; None where nothing was trimmed."""
        ...


@dataclass(frozen=True)
class NewTeacher:
    """A teacher that is about to be trained.

    Attributes:
        model: with its first weights.
        rows: gold rows.
        counts: what became of the rows that were read -> how many.
    """

    model: TaskModel
    rows: list[TokenRow]
    counts: dict[str, int]


@dataclass(frozen=True)
class Curation:
    """Rows that are learnt from, and those that are not.

    Attributes:
        rows: training rows, plain data of CURATED_SCHEMA.
        validation: validation rows, likewise.
        rejected: rows that are not learnt from, with reasons; None where the kind names none.
        counts: reason -> rows.
    """

    rows: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    rejected: pa.Table | None
    counts: dict[str, int]


class TaskKind(Protocol):
    """A kind of task. A row is a ``TokenRow``: numbers that name its input, and from ``first_supervised`` on what is to be predicted."""

    def collect(self, recipe: Recipe, directory: Path) -> PromptSet:
        """Collect prompts and suites; files for later stages go to the directory."""
        ...

    def pretrained_teacher(self, work: Workplace) -> tuple[TaskModel, Mapping[str, Any]]:
        """Load the recipe's pre-trained teacher and leave in ``work.directory`` what later stages need of it beside its weights.

        Returns:
            The teacher, and what pins its weights.
        """
        ...

    def new_teacher(self, work: Workplace) -> NewTeacher:
        """Make the teacher that the recipe trains."""
        ...

    def save(self, model: TaskModel, directory: Path) -> None:
        """Write model/ below a directory, in the Hugging Face layout."""
        ...

    def identity(self, model: TaskModel, weights: Mapping[str, Any]) -> ModelIdentity | ClassifierIdentity:
        """Content identity of a teacher, given what pins its weights."""
        ...

    def load_teacher(self, work: Workplace) -> TaskModel:
        """Load the teacher behind the upstream node 'teacher'."""
        ...

    def load(self, work: Workplace, directory: Path) -> TaskModel:
        """Load a model that this project wrote, or one in the same layout."""
        ...

    def student(self, work: Workplace, seed: int) -> TaskModel:
        """Make the student, ready to learn."""
        ...

    def curate(self, work: Workplace, answers: pa.Table | None) -> Curation:
        """Choose the rows that are learnt from, given the teacher's answers if the recipe has some."""
        ...

    def score(self, teacher: TaskModel, rows: Sequence[tuple[str, TokenRow]], policy: SoftLabels, *, micro_batch_tokens: int) -> Scores:
        """Soft labels of rows, by key."""
        ...

    def reading(self, model: TaskModel) -> Reading:
        """How the model reads rows in training."""
        ...

    def is_right(self, recipe: Recipe, answer: str, reference: str) -> bool:
        """Tell whether an answer is the reference's."""
        ...

    def measure(
        self, work: Workplace, model: TaskModel, suites: Mapping[str, pa.Table], *, teacher: TaskModel | None, seed: int
    ) -> Measured:
        """Measure a model on all suites; ``teacher`` is the one whose distribution it is compared with."""
        ...
