"""Checks of tokens: one vocabulary on both sides, every answer token supervised once, rows short enough, answers that end."""

import numpy as np
import pyarrow.parquet as pq
import torch

from kd_core.artifacts import find
from kd_core.doctor.findings import Skipped
from kd_core.doctor.gradients import hard_gradient, norm
from kd_core.doctor.subject import Subject
from kd_core.errors import SourceError, TeacherError, TrainingError
from kd_core.stages.graph import build_graph
from kd_core.store.arrow import arrow_file_system
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow, collate
from kd_core.tokens.encoding import encode_prompt, end_token, num_columns, tokenizer_identity
from kd_core.tokens.lengths import expect_enough, row_limit, used_rows

__all__ = ["check_end_token", "check_supervision", "check_tokenizers", "check_truncated_answers", "check_used_rows"]

_CURATED_GROUPS = 4  # row groups of the curated rows that are read


def check_tokenizers(subject: Subject) -> str:
    """Same vocabulary, template and ids on both sides; logits cut to exactly the tokenizer's columns."""
    student, teacher = subject.student, subject.teacher
    ours = vars(tokenizer_identity(student.tokenizer))
    if teacher is not None:
        theirs = vars(tokenizer_identity(teacher.tokenizer))
        differ = [
            name for name in ours if ours[name] != theirs[name] and (name != "template" or subject.recipe.text_task.template == "chat")
        ]
        if differ:
            raise TeacherError(
                f"teacher's and student's tokenizers differ in {', '.join(differ)}; use a student with the teacher's tokenizer"
            )
        for text in subject.texts:
            pair = [encode_prompt(model.tokenizer, text, subject.recipe.text_task) for model in (teacher, student)]
            if pair[0] != pair[1]:
                raise TeacherError(f"teacher and student read {text[:40]!r} as different tokens: {pair[0][:12]} and {pair[1][:12]}")
    notes = [
        f"columns of the {name}: {_columns(name, model)}"
        for name, model in (("teacher", teacher), ("student", student))
        if model is not None
    ]
    template = f"template {ours['template'][:8]}" if subject.recipe.text_task.template == "chat" else "no template"
    return f"{'; '.join(notes)}; {template}, end token {ours['eos']}"


def _columns(name: str, loaded: LoadedModel) -> str:
    needed, there = num_columns(loaded.tokenizer), int(loaded.model.get_output_embeddings().weight.shape[0])
    if needed > there:
        raise TeacherError(
            f"the {name}'s tokenizer has ids up to {needed - 1}, and its logits only {there} columns; they do not belong together"
        )
    if loaded.num_columns != needed:
        raise TeacherError(
            f"the {name}'s logits are cut to {loaded.num_columns} columns, and its tokenizer has {needed}; cut before normalising"
        )
    return f"{needed} of {there}"


def check_supervision(subject: Subject) -> str:
    """Every answer token counts once, no other does, and a gold answer teaches its end."""
    rows, end = subject.rows, end_token(subject.student.tokenizer, subject.recipe.text_task)
    beyond = [i for row in rows for i in row.ids if i >= subject.student.num_columns]
    if beyond:
        raise SourceError(
            f"a row has token id {beyond[0]}, and there are {subject.student.num_columns} columns; use the model's own tokenizer"
        )
    batch = collate([(row.ids, row.first_supervised) for row in rows])
    counts, wanted = batch.predict_BT.sum(1).tolist(), [row.num_supervised for row in rows]
    labels = [i for row in rows for i in row.ids[row.first_supervised :]]
    before = [i for row in rows for i in row.ids[row.first_supervised - 1 : -1]]
    if counts != wanted or batch.labels_N.tolist() != labels:
        raise TrainingError(
            f"a mixed batch supervises {counts} tokens of its rows, {wanted} expected: prompt or padding counts, or answers are cut"
        )
    if batch.ids_BT[batch.predict_BT].tolist() != before:
        raise TrainingError("logits are taken at other positions than just before the supervised tokens: the shift is wrong")
    if not subject.has_gold:
        return f"{sum(counts)} supervised tokens in {len(rows)} prompts, none lost; no gold rows, so no end token to look for"
    if any(row.ids[-1] != end or end in row.ids[row.first_supervised : -1] for row in rows):
        raise TrainingError(
            f"a gold row does not end with the end token {end}, or holds it before its end: the student would not learn to stop"
        )
    return f"{sum(counts)} supervised tokens in {len(rows)} rows, none lost; each answer ends with the end token {end}, supervised"


def check_used_rows(subject: Subject) -> str:
    """Rows are within training.max_tokens and the positions of both models: those that are not are left out."""
    recipe, student, teacher = subject.recipe, subject.student, subject.teacher
    positions = {"student": student.max_positions, "teacher": None if teacher is None else teacher.max_positions}
    limit = row_limit(recipe.training, positions=positions)
    if not subject.has_gold:
        prompts = [tokens for tokens, _ in subject.lengths]
        if recipe.answers is None:
            raise Skipped("no prompt has a gold answer, and the teacher answers none")
        fits = sum(tokens + recipe.answers.max_tokens <= limit.tokens for tokens in prompts)
        return (
            f"{fits} of {len(prompts)} prompts leave room for an answer of answers.max_tokens = {recipe.answers.max_tokens} within "
            f"{limit.by} = {limit.tokens}; longer rows are left out"
        )
    tokens, supervised = np.array(subject.lengths, np.int64).T
    used = used_rows(tokens, supervised, limit)
    expect_enough(used, recipe.training)
    return f"of a sample of gold rows, {used}"


def check_end_token(subject: Subject) -> str:
    """The student learns to stop: a small step down the loss of end tokens alone makes them more likely."""
    student, end = subject.student, end_token(subject.student.tokenizer, subject.recipe.text_task)
    if student.model.get_input_embeddings().padding_idx == end:
        raise TrainingError(
            f"the embedding of the end token {end} is a padding_idx, which never learns; make the student with kd_core.student"
        )
    rows = [TokenRow(row.ids, len(row.ids) - 1) for row in (subject.rows[i] for i in subject.few) if row.ids[-1] == end]
    if not rows:
        raise Skipped("no row ends with the end token")
    loss, gradient = hard_gradient(student, rows)
    size = 0.1 * loss / norm(gradient) ** 2
    parameters = dict(student.model.named_parameters())
    before = _surprise(student, rows)
    with torch.no_grad():
        for name, g in gradient.items():
            parameters[name].sub_(g, alpha=size)
        after = _surprise(student, rows)
        for name, g in gradient.items():
            parameters[name].add_(g, alpha=size)
    numbers = f"-log p of the end token {end} over {len(rows)} rows: {before:.4f}, after a small step {after:.4f}"
    if not after < before:
        raise TrainingError(
            f"{numbers}; it must fall: end tokens are masked out, perhaps as padding (pad token {student.tokenizer.pad_token_id})"
        )
    return f"{numbers} (must fall)"


@torch.no_grad()
def _surprise(student: LoadedModel, rows: list[TokenRow]) -> float:
    """Mean -log p of each row's last token, nats, each row alone."""
    found = 0.0
    for row in rows:
        logits_V = student.model(input_ids=torch.tensor([row.ids[:-1]], device=student.device), use_cache=False).logits[0, -1]
        found -= float(torch.log_softmax(logits_V[: student.num_columns].float(), -1)[row.ids[-1]])
    return found / len(rows)


def check_truncated_answers(subject: Subject) -> str:
    """Answers that met max_tokens are not taught as complete."""
    node = build_graph(subject.recipe, subject.store)["curate"]
    record = find(subject.store, node.stage, node.fingerprint)
    if record is None:
        raise Skipped("the store has no curated rows of this recipe yet")
    key = f"{record.prefix}/rows.parquet"
    sizes = {f"{record.prefix}/{file.name}": file.size_bytes for file in record.files}
    files, _ = arrow_file_system(subject.store, {key: sizes[key]})
    with pq.ParquetFile(key, filesystem=files) as rows:
        groups = range(min(_CURATED_GROUPS, rows.num_row_groups))
        table = rows.read_row_groups(groups, columns=["finish_reason", "ids"])
    ends = {int(subject.student.tokenizer.eos_token_id), end_token(subject.student.tokenizer, subject.recipe.text_task)}
    cut = [ids for reason, ids in zip(table["finish_reason"].to_pylist(), table["ids"].to_pylist(), strict=True) if reason == "length"]
    ended = sum(ids[-1] in ends for ids in cut)
    numbers = f"{len(cut)} of {table.num_rows} curated rows met max_tokens, {ended} of them with an end token"
    if ended:
        raise TrainingError(f"{numbers}; none may have one: the student would learn to stop in the middle; compute the answers again")
    return f"{numbers} (none allowed)"
