"""Row identity of the teacher's work: the keys under which answers and soft labels are kept and found again.

Hashes over plain data, without torch: the stages compute rows by these keys, the plan counts which of them are there.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from kd_core.artifacts import Record
from kd_core.fingerprint import fingerprint
from kd_core.recipe import Answers, HiddenStates, Recipe, ServerTeacher, SoftLabels
from kd_core.summaries import ModelIdentity, TeacherSummary, of, plain

__all__ = [
    "about_answers",
    "about_hidden_states",
    "about_soft_labels",
    "answer_namespace",
    "answer_rows",
    "sampling_identity",
    "soft_label_key",
    "soft_label_namespace",
]


def sampling_identity(recipe: Recipe, answers: Answers) -> dict[str, Any]:
    """How one answer is sampled, as plain data. The likeliest tokens (temperature 0) depend on no seed and no top_p."""
    if answers.temperature == 0.0:
        return answers.model_dump(mode="json", exclude={"num_samples", "top_p"})
    return {**answers.model_dump(mode="json", exclude={"num_samples"}), "seed": recipe.seeds[0]}


def about_answers(recipe: Recipe, answers: Answers, teacher: Record) -> dict[str, Any]:
    """Describe what all answers of one row store share: who answers, how it samples, how prompts are worded, the seed."""
    task = recipe.text_task.model_dump(mode="json")
    template = {name: task[name] for name in ("template", "system")}
    if not isinstance(recipe.teacher, ServerTeacher):
        template["date"] = task["date"]  # a server words its prompts itself
    return {"teacher": _identity(teacher), "sampling": sampling_identity(recipe, answers), **template}


def _identity(teacher: Record) -> dict[str, Any]:
    return plain(of(teacher, TeacherSummary).teacher)


def answer_namespace(recipe: Recipe, answers: Answers, teacher: Record) -> str:
    """Name of the row store of these answers."""
    return fingerprint(about_answers(recipe, answers, teacher))


def answer_rows(recipe: Recipe, answers: Answers, teacher: Record, prompts: pa.Table) -> list[tuple[str, dict[str, Any]]]:
    """List (key, request) of every answer the recipe asks for, in prompt order.

    Args:
        recipe: the recipe.
        answers: its sampling.
        teacher: the finished teacher's record.
        prompts: PROMPT_SCHEMA; only training prompts are answered.
    """
    namespace = answer_namespace(recipe, answers, teacher)
    return [
        (fingerprint([namespace, row["prompt"], sample]), {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "sample_index": sample})
        for row in prompts.to_pylist()
        if row["split"] == "train"
        for sample in range(answers.num_samples)
    ]


def about_soft_labels(policy: SoftLabels, teacher: Record | ModelIdentity) -> dict[str, Any]:
    """Describe what all soft labels of one row store share: who scores, what is kept."""
    identity = plain(teacher) if isinstance(teacher, ModelIdentity) else _identity(teacher)
    return {"teacher": identity, "policy": policy.model_dump(mode="json", exclude={"max_refused_rows"})}


def soft_label_namespace(policy: SoftLabels, teacher: Record) -> str:
    """Name of the row store of these soft labels."""
    return fingerprint(about_soft_labels(policy, teacher))


def about_hidden_states(wanted: HiddenStates, teacher: Record) -> dict[str, Any]:
    """Describe what all hidden states of one row store share: who was asked, what is kept."""
    return {"teacher": _identity(teacher), "hidden_states": wanted.model_dump(mode="json")}


def soft_label_key(namespace: str, ids: Sequence[int], first_supervised: int) -> str:
    """Hash of the namespace (teacher identity and policy), token ids and first supervised position; of hidden states too."""
    return fingerprint([namespace, list(ids), first_supervised])
