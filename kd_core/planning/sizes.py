"""Sizes of a recipe's models, from records, architectures or headers of model files. Needs no torch."""

from dataclasses import dataclass
from functools import cached_property

from kd_core.artifacts import Record, find
from kd_core.errors import RecipeError
from kd_core.planning.basis import Basis, teacher_columns
from kd_core.recipe import NewClassifier, PretrainedStudent, PretrainedTeacher, ServerTeacher, StudentFromConfig, Task, TrainedTeacher
from kd_core.stages.graph import champion
from kd_core.summaries import TeacherSummary, TrainSummary, VocabularySummary, of
from kd_core.teacher.columns import stored_columns
from kd_core.teacher.sizes import Size, llama_size, stored_size

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Parameters and vocabulary columns of a recipe's teacher and students; None is unknown."""

    basis: Basis

    @cached_property
    def teacher_size(self) -> Size | None:
        """Blocks and parameters of the teacher, from its architecture or its files' headers."""
        teacher = self.basis.recipe.teacher
        if isinstance(teacher, TrainedTeacher):
            return llama_size(teacher.architecture, len(teacher.tokenizer.alphabet) + 2)
        return stored_size(teacher) if isinstance(teacher, PretrainedTeacher) and isinstance(self.basis.recipe.task, Task) else None

    @cached_property
    def teacher_parameters(self) -> int | None:
        """Parameters of the teacher, from its record or its size."""
        if (record := self.basis.records["teacher"]) is not None:
            return of(record, TeacherSummary).parameters
        return None if self.teacher_size is None else self.teacher_size.parameters()

    @cached_property
    def num_columns(self) -> int | None:
        """Columns of the teacher's tokenizer; of a teacher on the hub None, until it was looked at."""
        teacher, record = self.basis.recipe.teacher, self.basis.records["teacher"]
        if isinstance(teacher, TrainedTeacher):
            return len(teacher.tokenizer.alphabet) + 2
        if isinstance(teacher, ServerTeacher):
            return None
        if record is not None:
            return teacher_columns(record)
        return stored_columns(teacher) if isinstance(teacher, PretrainedTeacher) and isinstance(self.basis.recipe.task, Task) else None

    @property
    def kept_tokens(self) -> int | None:
        """Tokens of a trimmed vocabulary; None before there is one."""
        record = self.basis.records.get("vocabulary")
        return None if record is None else of(record, VocabularySummary).tokens

    @cached_property
    def student_parameters(self) -> int | None:
        """Parameters of the student and of the compared models, which are of one size.

        Raises:
            RecipeError: the teacher cannot be made into such a student.
        """
        student = self.basis.recipe.student
        if isinstance(student, NewClassifier) or not isinstance(self.basis.recipe.task, Task):
            return self._trained_parameters
        if isinstance(student, StudentFromConfig):
            columns = self.num_columns if student.vocabulary is None else self.kept_tokens
            return None if columns is None else llama_size(student.architecture, columns).parameters()
        if isinstance(student, PretrainedStudent):
            size = stored_size(student) if student.vocabulary is None else None
            return None if size is None else size.parameters()
        if self.teacher_size is None:
            return None
        try:
            blocks = student.kept_blocks(len(self.teacher_size.blocks))
        except ValueError as error:
            raise RecipeError(f"student.{error}") from error
        if student.narrower or student.num_kv_heads:
            from kd_core.student.describe import teacher_config  # with transformers: seconds that only such a recipe pays
            from kd_core.student.shrink import shrunk_config

            config = teacher_config(self.basis.recipe)
            assert config is not None, "a server teacher has no size"
            shrunk_config(config, student)
        if student.narrower or student.num_kv_heads or student.share_embeddings or student.vocabulary:
            return None  # kd student describe counts these, from the config
        return self.teacher_size.parameters(blocks)

    @property
    def _trained_parameters(self) -> int | None:
        """Parameters of a student that was trained; None before."""
        records = (self.basis.records[f"student.{seed}"] for seed in self.basis.recipe.seeds)
        return next((of(record, TrainSummary).parameters for record in records if record is not None), None)

    def evaluated_parameters(self, model: str) -> int | None:
        """Parameters of the model behind 'evaluate.<model>'."""
        if model == "champion":
            holder = champion(self.basis.recipe, self.basis.store, self.basis.nodes)
            record = None if holder is None else find(self.basis.store, holder.artifact.stage, holder.artifact.fingerprint)
            return None if record is None else of(record, TrainSummary).parameters
        return self.teacher_parameters if model == "teacher" else self.student_parameters

    def same_teacher(self, record: Record) -> bool:
        """Tell whether the teacher above a record is this recipe's, or of its size."""
        if record.upstream["teacher"] == self.basis.nodes["teacher"].fingerprint:
            return True
        teacher = find(self.basis.store, "teacher", record.upstream["teacher"])
        if teacher is None or self.teacher_parameters is None:
            return False
        return of(teacher, TeacherSummary).parameters == self.teacher_parameters
