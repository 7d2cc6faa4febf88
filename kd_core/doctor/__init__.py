"""Checks of a user's own recipe, models and cache against the known ways in which distillation goes silently wrong.

``examine`` takes a handful of the recipe's own rows through the very path that training takes (capture, codec, decode,
``collate``, the objective) and compares what must be equal: the teacher with itself, a batch with its parts, the cache
with the live teacher, one tokenizer with the other. Nothing is written, nothing is trained, nothing is fixed.

One module a theme: ``machine``, ``templates``, ``vocabulary``, ``trimming``, ``models``, ``labels``, ``divergence``, ``batches``;
``subject`` is what they examine.
"""

from collections.abc import Callable

from kd_core.doctor import batches, divergence, labels, machine, models, templates, trimming, vocabulary
from kd_core.doctor.findings import Finding, finding
from kd_core.doctor.subject import Subject, admit
from kd_core.progress import Tick, Ticker, silent
from kd_core.recipe import Recipe
from kd_core.store import Store

__all__ = ["Finding", "check_names", "examine"]

_FIRST = ("packages", "device", "compared_models", "template", "models")
_CHECKS: dict[str, Callable[[Subject], str]] = {
    "tokenizers": vocabulary.check_tokenizers,
    "control_tokens": templates.check_control_tokens,
    "supervision": vocabulary.check_supervision,
    "used_rows": vocabulary.check_used_rows,
    "end_token": vocabulary.check_end_token,
    "truncated_answers": vocabulary.check_truncated_answers,
    "model_modes": models.check_modes,
    "attention": models.check_attention,
    "tied_head": models.check_tied_head,
    "hidden_states": models.check_hidden_states,
    "trimmed_vocabulary": trimming.check_trimmed_vocabulary,
    "teacher_as_student": labels.check_teacher_as_student,
    "alignment": labels.check_alignment,
    "largest_ids": labels.check_largest_ids,
    "cached_soft_labels": labels.check_cached_soft_labels,
    "mass_outside": divergence.check_mass_outside,
    "slope": divergence.check_slope,
    "objective": batches.check_objective,
    "batch_split": batches.check_batch_split,
    "padding": batches.check_padding,
    "packing": batches.check_packing,
    "half_precision": batches.check_half_precision,
}


def check_names() -> tuple[str, ...]:
    """Names of all checks, in the order in which they run."""
    return (*_FIRST, *_CHECKS)


def examine(recipe: Recipe, store: Store, *, tick: Ticker = silent) -> tuple[Finding, ...]:
    """Run every check; one that breaks is a failed one and does not hide the others.

    Args:
        recipe: the recipe.
        store: where a trained teacher and soft labels may already be; only read.
        tick: progress, in checks.
    """
    findings: list[Finding] = []

    def run(name: str, check: Callable[[], str]) -> None:
        tick(Tick(len(findings), len(check_names()), "checks", name))
        findings.append(finding(name, check))

    run("packages", machine.check_packages)
    run("device", lambda: machine.check_device(recipe))
    run("compared_models", lambda: machine.check_compared_models(recipe, store))
    run("template", lambda: templates.check_chat_template(recipe))
    subjects: list[Subject] = []
    run("models", lambda: admit(recipe, store, subjects))
    for name, check in _CHECKS.items():
        if subjects:
            run(name, lambda check=check: check(subjects[0]))  # type: ignore[misc]
        else:
            findings.append(Finding(name, "skipped", "needs the models, which could not be loaded"))
    tick(Tick(len(findings), len(findings), "checks"))
    return tuple(findings)
