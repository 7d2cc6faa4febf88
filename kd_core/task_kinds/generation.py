"""Generated text: a prompt in, an answer out, token by token; a row is the tokens of both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from kd_core.curate import curate_answers, gold_rows, verify
from kd_core.errors import TrainingError
from kd_core.evaluate.measure import Measured, measure
from kd_core.prompts import PromptSet, collect_gold, collect_prompts
from kd_core.recipe import (
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    ServerTeacher,
    SoftLabels,
    StudentFromConfig,
    StudentFromTeacher,
    TrainedTeacher,
)
from kd_core.softlabels.capture import Scores, score_rows
from kd_core.student.activations import sample_rows
from kd_core.student.adapters import add_adapters
from kd_core.student.make import new_model, student_from_teacher, trainable
from kd_core.student.vocabulary import trim_model
from kd_core.summaries import ModelIdentity, TeacherSummary
from kd_core.task_kinds.protocol import Curation, NewTeacher, TaskModel, Workplace
from kd_core.teacher.models import LoadedModel, load_directory, load_model, load_tokenizer, pick_device, save_model, teacher_identity
from kd_core.teacher.reference import reference_identity
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import character_tokenizer, encode_answer, encode_gold, encode_prompt, num_columns, tokenizer_identity
from kd_core.tokens.templates import check_template
from kd_core.tokens.token_map import TokenMap, read_token_map
from kd_core.train.reading import TokenReading
from kd_core.train.stored_rows import file_rows

__all__ = ["Generation", "load_text_teacher", "rows_tokenizer"]


class Generation:
    """Text that a causal language model writes."""

    def collect(self, recipe: Recipe, directory: Path) -> PromptSet:
        """Prompts are texts: no file beside the tables."""
        return collect_prompts(recipe)

    def pretrained_teacher(self, work: Workplace) -> tuple[TaskModel, Mapping[str, Any]]:
        """Leave the tokenizer in model/."""
        teacher = work.recipe.teacher
        assert isinstance(teacher, PretrainedTeacher), "the recipe allows no other pre-trained teacher"
        tokenizer = load_tokenizer(teacher)
        check_template(tokenizer, work.recipe.text_task)
        loaded = load_model(teacher, device=pick_device(work.recipe.run.device), tokenizer=tokenizer)
        tokenizer.save_pretrained(work.directory / "model")
        return loaded, reference_identity(teacher)

    def new_teacher(self, work: Workplace) -> NewTeacher:
        """A Llama with a tokenizer of single characters, and worked gold answers."""
        recipe, teacher = work.recipe, work.recipe.teacher
        assert isinstance(teacher, TrainedTeacher), "the recipe allows no other trained teacher"
        gold, counts = collect_gold(
            teacher.sources,
            task=recipe.task,
            split=recipe.prompts.split,
            suites=recipe.evaluation.suites,
            max_characters=recipe.prompts.max_characters,
            s3=recipe.run.s3,
        )
        tokenizer = character_tokenizer(teacher.tokenizer)
        check_template(tokenizer, recipe.text_task)
        model = new_model(teacher.architecture, tokenizer, seed=recipe.seeds[0])
        rows = [_token_row(tokenizer, recipe, row) for row in gold.to_pylist()]
        return NewTeacher(LoadedModel(model, tokenizer, model.config.vocab_size), rows, counts)

    def save(self, model: TaskModel, directory: Path) -> None:
        """Weights, tokenizer and token map."""
        save_model(cast(LoadedModel, model), directory)

    def identity(self, model: TaskModel, weights: Mapping[str, Any]) -> ModelIdentity:
        """Weights, tokenizer and template, valid columns, dtype, engine family."""
        return teacher_identity(cast(LoadedModel, model), weights)

    def load_teacher(self, work: Workplace) -> TaskModel:
        """``load_text_teacher``."""
        return load_text_teacher(work)

    def load(self, work: Workplace, directory: Path) -> TaskModel:
        """A model with its own tokenizer."""
        tokenizer = load_tokenizer(directory, trust_remote_code=work.recipe.trusts_code)
        return load_directory(directory, device=pick_device(work.recipe.run.device), tokenizer=tokenizer)

    def student(self, work: Workplace, seed: int) -> TaskModel:
        """A student from a config, from the teacher or pre-trained; trimmed, and with adapters, where the recipe says so."""
        return _make_student(work, seed)

    def curate(self, work: Workplace, answers: pa.Table | None) -> Curation:
        """Verified answers and worked gold."""
        recipe, prompts = work.recipe, work.read_table("prompts", "prompts.parquet")
        tokenizer = _own_tokenizer(work)
        counts: dict[str, int] = {}
        rows: list[dict[str, Any]] = []
        rejected = None
        if answers is not None:
            curated = curate_answers(answers, prompts, curate=recipe.curate, task=recipe.text_task)
            rejected = curated.rejected
            counts.update(curated.counts)
            text_of = dict(zip(prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True))
            for row in curated.kept.to_pylist():
                prompt_ids = row["prompt_ids"] or encode_prompt(tokenizer, text_of[row["prompt_id"]], recipe.text_task)
                ended = row["finish_reason"] == "stop"
                ids = row["answer_ids"] or encode_answer(tokenizer, row["text"], ended=ended, task=recipe.text_task, prompt_ids=prompt_ids)
                rows.append(_row(row["prompt_id"], "teacher", row["sample_index"], row["finish_reason"], row["text"], prompt_ids, ids))
        gold = [_gold_row(tokenizer, row, recipe) for row in gold_rows(prompts, limit=recipe.curate.gold_rows).to_pylist()]
        validation = [_gold_row(tokenizer, row, recipe) for row in prompts.to_pylist() if row["split"] == "validation" and row["gold"]]
        return Curation([*rows, *gold], validation, rejected, {**counts, "gold": len(gold), "validation": len(validation)})

    def score(self, teacher: TaskModel, rows: Sequence[tuple[str, TokenRow]], policy: SoftLabels, *, micro_batch_tokens: int) -> Scores:
        """Teacher-forced, over packed rows."""
        return score_rows(cast(LoadedModel, teacher), rows, policy=policy, micro_batch_tokens=micro_batch_tokens)

    def reading(self, model: TaskModel) -> TokenReading:
        """Token rows."""
        return TokenReading()

    def is_right(self, recipe: Recipe, answer: str, reference: str) -> bool:
        """Ask the task's verifier."""
        return verify(answer, reference, recipe.text_task)

    def measure(
        self, work: Workplace, model: TaskModel, suites: Mapping[str, pa.Table], *, teacher: TaskModel | None, seed: int
    ) -> Measured:
        """Sampled answers, and the loss of gold ones."""
        recipe = work.recipe
        return measure(
            cast(LoadedModel, model),
            suites,
            seed=seed,
            answers=recipe.evaluation.generate,
            task=recipe.text_task,
            run=recipe.run,
            teacher=cast(LoadedModel | None, teacher),
            tick=work.tick,
        )


def rows_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer in which rows are written, from its source: the teacher's, or the student's beside a server teacher.

    Raises:
        TeacherError: it cannot be loaded.
    """
    if isinstance(recipe.teacher, TrainedTeacher):
        return character_tokenizer(recipe.teacher.tokenizer)
    if isinstance(recipe.teacher, PretrainedTeacher):
        return load_tokenizer(recipe.teacher)
    assert isinstance(recipe.student, PretrainedStudent), "the recipe allows no other student beside a server teacher"
    return load_tokenizer(recipe.student)


def load_text_teacher(work: Workplace) -> LoadedModel:
    """The teacher behind the upstream node 'teacher', ready to run.

    Raises:
        TeacherError: it cannot be loaded here.
    """
    teacher = work.recipe.teacher
    device = pick_device(work.recipe.run.device)
    with work.files(work.inputs["teacher"]) as files:
        tokenizer = load_tokenizer(files / "model", trust_remote_code=work.recipe.trusts_code)
        if isinstance(teacher, PretrainedTeacher):
            return load_model(teacher, device=device, tokenizer=tokenizer)
        return load_directory(files / "model", device=device, tokenizer=tokenizer)


def _own_tokenizer(work: Workplace) -> PreTrainedTokenizerBase:
    recipe = work.recipe
    if isinstance(recipe.teacher, ServerTeacher) and isinstance(recipe.student, PretrainedStudent):
        return load_tokenizer(recipe.student)
    with work.files(work.inputs["teacher"]) as files:
        return load_tokenizer(files / "model", trust_remote_code=recipe.trusts_code)


def _token_row(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, row: Mapping[str, Any]) -> TokenRow:
    prompt_ids = encode_prompt(tokenizer, row["prompt"], recipe.text_task)
    gold_ids = encode_gold(tokenizer, row["gold"], recipe.text_task, prompt_ids=prompt_ids)
    return TokenRow((*prompt_ids, *gold_ids), len(prompt_ids))


def _gold_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    prompt_ids = encode_prompt(tokenizer, row["prompt"], recipe.text_task)
    gold_ids = encode_gold(tokenizer, row["gold"], recipe.text_task, prompt_ids=prompt_ids)
    return _row(row["prompt_id"], "gold", 0, "stop", row["gold"], prompt_ids, gold_ids)


def _row(prompt_id: str, source: str, sample: int, reason: str, text: str, prompt_ids: list[int], answer_ids: list[int]) -> dict[str, Any]:
    ids = {"ids": [*prompt_ids, *answer_ids], "first_supervised": len(prompt_ids)}
    return {"prompt_id": prompt_id, "source": source, "sample_index": sample, "finish_reason": reason, "text": text, **ids}


def _make_student(work: Workplace, seed: int) -> LoadedModel:
    spec = work.recipe.student
    if isinstance(spec, StudentFromTeacher):
        teacher = load_text_teacher(work)

        def rows(num_rows: int) -> list[TokenRow]:
            with work.files(work.inputs["curate"]) as files:
                curated = file_rows(files / "rows.parquet", None)
                return sample_rows(curated, num_rows, max_tokens=work.recipe.training.max_tokens, seed=seed)

        student = LoadedModel(student_from_teacher(teacher, spec, rows=rows), teacher.tokenizer, teacher.num_columns)
    elif isinstance(spec, StudentFromConfig):
        tokenizer, token_map = _student_tokenizer(work)
        return LoadedModel(new_model(spec.architecture, tokenizer, seed=seed), tokenizer, num_columns(tokenizer), token_map)
    else:
        assert isinstance(spec, PretrainedStudent), "the recipe allows no classifier that writes text"
        student = _pretrained_student(work, spec)
    if spec.vocabulary is not None:
        tokenizer, token_map = _student_tokenizer(work)
        assert token_map is not None, "the vocabulary stage writes one"
        student = LoadedModel(trim_model(student.model, token_map), tokenizer, num_columns(tokenizer), token_map)
    if spec.adapter is not None:
        add_adapters(student.model, spec.adapter, seed=seed)
    return student


def _student_tokenizer(work: Workplace) -> tuple[PreTrainedTokenizerBase, TokenMap | None]:
    """The teacher's, or what the vocabulary stage kept."""
    role, folder = ("vocabulary", "tokenizer") if "vocabulary" in work.inputs else ("teacher", "model")
    with work.files(work.inputs[role]) as files:
        return load_tokenizer(files / folder, trust_remote_code=work.recipe.trusts_code), read_token_map(files / folder)


def _pretrained_student(work: Workplace, spec: PretrainedStudent) -> LoadedModel:
    tokenizer = load_tokenizer(spec)
    if not isinstance(work.recipe.teacher, ServerTeacher):
        teacher, ours = work.summary("teacher", TeacherSummary).teacher, tokenizer_identity(tokenizer)
        assert isinstance(teacher, ModelIdentity), "a teacher that is no server runs here"
        if (teacher.tokenizer.vocabulary, teacher.tokenizer.probe) != (ours.vocabulary, ours.probe):
            raise TrainingError("teacher and student have different tokenizers; use a student with the teacher's tokenizer")
    loaded = load_model(spec, device=pick_device("cpu"), tokenizer=tokenizer)
    trainable(loaded.model)
    return loaded
