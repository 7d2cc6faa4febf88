"""What is examined: the recipe's models and a handful of its own rows, loaded the way the stages load them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from kd_core.artifacts import Record, find
from kd_core.doctor.findings import Skipped
from kd_core.errors import SoftLabelError, SourceError
from kd_core.progress import silent
from kd_core.prompts import collect_prompts
from kd_core.recipe import (
    PretrainedStudent,
    PretrainedTeacher,
    Ramp,
    Recipe,
    Sampled,
    ServerTeacher,
    SoftLabels,
    StudentFromConfig,
    StudentFromTeacher,
    TopK,
    TrainedTeacher,
    schedule_values,
)
from kd_core.softlabels import Targets, decode_rows, encode_rows, parse_model
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.stages.graph import build_graph
from kd_core.stages.job import Job
from kd_core.store import Store
from kd_core.student.make import new_model, student_from_teacher
from kd_core.task_kinds.generation import load_text_teacher
from kd_core.teacher.models import LoadedModel, load_model, load_tokenizer, pick_device
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import character_tokenizer, encode_gold, encode_prompt, num_columns

__all__ = ["SCORE_TOKENS", "Subject", "admit", "captured", "temperatures_of", "through_codec"]

SCORE_TOKENS = 192
"""Tokens a scoring pass: other than a batch of the checks, so that padding is different too."""
_ROWS, _TOKENS, _CANDIDATES = 12, 384, 256
_FEW = 3  # rows of the checks that run a model several times


@dataclass(frozen=True)
class Subject:
    """What is examined: models, a handful of rows, and where the teacher's weights are from.

    Attributes:
        teacher: None for a server teacher.
        record: the finished teacher in the store, if there is one.
        rows: prompts with their gold answers; where no prompt has gold, prompts with their second half supervised.
        has_gold: which of the two.
        lengths: (tokens, supervised tokens) of up to 256 rows like them, not chosen by their length.
        note: what the reader must know about the teacher's weights; may be empty.
    """

    recipe: Recipe
    store: Store
    teacher: LoadedModel | None
    record: Record | None
    student: LoadedModel
    texts: tuple[str, ...]
    rows: tuple[TokenRow, ...]
    has_gold: bool
    lengths: tuple[tuple[int, int], ...]
    note: str

    def scored(self) -> tuple[LoadedModel, SoftLabels]:
        """The teacher and the policy of soft labels; skips where one of them is missing."""
        if self.teacher is None:
            raise Skipped("a server teacher only speaks text: there is nothing to score here")
        if self.recipe.soft_labels is None:
            raise Skipped("the recipe keeps no soft labels")
        return self.teacher, self.recipe.soft_labels

    @property
    def few(self) -> list[int]:
        """Indices of a few rows, the shortest and the longest among them."""
        last = len(self.rows) - 1
        return sorted({i * last // (_FEW - 1) for i in range(_FEW)})

    @cached_property
    def targets(self) -> list[Targets]:
        """Soft labels of the rows, through capture, encoding and decoding."""
        teacher, policy = self.scored()
        return captured(teacher, self.rows, policy)


def admit(recipe: Recipe, store: Store, subjects: list[Subject]) -> str:
    """Load models and rows, append them to ``subjects``, and describe them."""
    teacher, record, note = _teacher(recipe, store)
    if teacher is not None:
        tokenizer = teacher.tokenizer
    else:
        assert isinstance(recipe.student, PretrainedStudent), "the recipe allows no other student beside a server teacher"
        tokenizer = load_tokenizer(recipe.student)
    texts, rows, has_gold, lengths = _rows(recipe, tokenizer)
    student = _student(recipe, teacher, rows)
    subjects.append(Subject(recipe, store, teacher, record, student, texts, rows, has_gold, lengths, note))
    who = "a server" if teacher is None else f"{teacher.num_parameters:,} parameters{note}"
    tokens = sorted(len(row.ids) for row in rows)
    what = f"{len(rows)} {'gold rows' if has_gold else 'prompts (none has a gold answer)'} of {tokens[0]} to {tokens[-1]} tokens"
    return f"teacher: {who}; student: {student.num_parameters:,} parameters; {what}"


def _teacher(recipe: Recipe, store: Store) -> tuple[LoadedModel | None, Record | None, str]:
    """The teacher ready to run, its record, and a note on its weights."""
    spec, node = recipe.teacher, build_graph(recipe, store)["teacher"]
    if isinstance(spec, ServerTeacher):
        return None, None, ""
    _ = recipe.text_task  # raises for a recipe whose student writes no text
    record = find(store, node.stage, node.fingerprint)
    if record is not None:
        return load_text_teacher(Job(recipe, node, store, {"teacher": record}, Path(), silent)), record, ""
    device = pick_device(recipe.run.device)
    if isinstance(spec, PretrainedTeacher):
        loaded = load_model(spec, device=device, tokenizer=load_tokenizer(spec))
        return loaded, None, ""
    assert isinstance(spec, TrainedTeacher), "the recipe allows no other teacher of text"
    tokenizer = character_tokenizer(spec.tokenizer)
    model = new_model(spec.architecture, tokenizer, seed=recipe.seeds[0])
    loaded = LoadedModel(model.to(device).eval().requires_grad_(False), tokenizer, num_columns(tokenizer))
    _give_opinions(loaded, max(temperatures_of(recipe)))
    return loaded, None, " (not trained yet: its architecture with random weights)"


def _give_opinions(loaded: LoadedModel, temperature: float) -> None:
    """Scale the tied embeddings of random weights so that a token repeats itself with probability near e / (e + 1) at T.

    Fresh weights give every token the same probability, and then the labels of any position fit at every other.
    """
    head = loaded.model.get_output_embeddings().weight.data
    num_columns, hidden_size = head.shape
    head *= temperature * (math.log(num_columns) + 1.0) / (float(head.square().mean().sqrt()) * hidden_size)


def _student(recipe: Recipe, teacher: LoadedModel | None, rows: Sequence[TokenRow]) -> LoadedModel:
    """The student before its first step, in float32, in eval mode, on the recipe's device."""
    spec = recipe.student
    if isinstance(spec, PretrainedStudent):
        loaded = load_model(spec, device=pick_device("cpu"), tokenizer=load_tokenizer(spec))
    else:
        assert teacher is not None, "the recipe allows only a pre-trained student beside a server teacher"
        if isinstance(spec, StudentFromConfig):
            model = new_model(spec.architecture, teacher.tokenizer, seed=recipe.seeds[0])
            loaded = LoadedModel(model, teacher.tokenizer, num_columns(teacher.tokenizer))
        else:
            assert isinstance(spec, StudentFromTeacher), "the recipe allows no other student of text"
            model = student_from_teacher(teacher, spec, rows=lambda num_rows: rows[:num_rows])
            loaded = LoadedModel(model, teacher.tokenizer, teacher.num_columns)
    loaded.model.float().to(pick_device(recipe.run.device)).eval().requires_grad_(True)
    return loaded


def _rows(recipe: Recipe, tokenizer: Any) -> tuple[tuple[str, ...], tuple[TokenRow, ...], bool, tuple[tuple[int, int], ...]]:
    """Prompt texts, rows of mixed length within a small budget of tokens, whether they are gold rows, and lengths of all that were read."""
    prompts = [row for row in collect_prompts(recipe).table.to_pylist() if row["split"] == "train"]
    golds = [row for row in prompts if row["gold"]]
    candidates: list[tuple[str, TokenRow]] = []
    for prompt in (golds or prompts)[:_CANDIDATES]:
        ids = encode_prompt(tokenizer, prompt["prompt"], recipe.text_task)
        row = (
            TokenRow((*ids, *encode_gold(tokenizer, prompt["gold"], recipe.text_task)), len(ids))
            if golds
            else TokenRow(tuple(ids), max(1, len(ids) // 2))
        )
        candidates += [(prompt["prompt"], row)] if row.num_supervised >= 2 else []
    if not candidates:
        raise SourceError("no prompt has two tokens to supervise; check prompts.sources and task.template")
    lengths = tuple((len(row.ids), row.num_supervised) for _, row in candidates)
    candidates.sort(key=lambda item: (len(item[1].ids), item[1].ids))
    picked = [candidates[i * len(candidates) // _ROWS] for i in range(_ROWS)] if len(candidates) > _ROWS else candidates
    while len(picked) > 2 and sum(len(row.ids) for _, row in picked) > _TOKENS:
        picked.pop()
    return tuple(text for text, _ in picked), tuple(row for _, row in picked), bool(golds), lengths


def captured(teacher: LoadedModel, rows: Sequence[TokenRow], policy: SoftLabels) -> list[Targets]:
    """Soft labels of rows by this teacher, through capture, encoding and decoding, one entry a row.

    Raises:
        SoftLabelError: a row cannot be scored.
    """
    keyed = [(row_key("doctor", row), row) for row in rows]
    scores = score_rows(teacher, keyed, policy=policy, micro_batch_tokens=SCORE_TOKENS)
    if scores.refused:
        raise SoftLabelError(f"{len(scores.refused)} of {len(rows)} rows cannot be scored: {next(iter(scores.refused.values()))}")
    labels = [np.array(row.ids[row.first_supervised :], np.int64) for row in rows]
    return through_codec([scored.targets for scored in scores.scored], labels)


def through_codec(targets: Sequence[Targets], labels: Sequence[np.ndarray]) -> list[Targets]:
    """Targets of rows, encoded and decoded again; ``labels`` are the tokens that stand at their positions."""
    model, blobs = encode_rows(targets, labels)
    parsed = parse_model(model)
    return [decode_rows(parsed, [blob], [gold]) for blob, gold in zip(blobs, labels, strict=True)]


def temperatures_of(recipe: Recipe) -> tuple[float, ...]:
    """Temperatures at which the recipe uses its soft labels; those they are kept at where the objective has no soft part."""
    if recipe.objective.supervision == "soft":
        schedule = recipe.objective.temperature
        return (schedule.start, schedule.end) if isinstance(schedule, Ramp) else tuple(sorted(set(schedule_values(schedule) or ())))
    match recipe.soft_labels:
        case Sampled():
            return (recipe.soft_labels.temperature,)
        case TopK():
            return recipe.soft_labels.temperatures
        case _:
            return (1.0,)
