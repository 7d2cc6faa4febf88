"""Notes of a plan on feature distillation: which block learns from which, and what the teacher's side takes a step.

Needs no torch: blocks are counted from the recipe or from the headers of model files. What cannot be counted here is said to be found
when training starts.
"""

from collections.abc import Iterator

from kd_core.errors import RecipeError
from kd_core.planning.costs import forward_seconds
from kd_core.planning.known import Known
from kd_core.recipe import HiddenStateFeatures, NewClassifier, PretrainedStudent, StudentFromConfig
from kd_core.recipe.block_pairs import block_pairs
from kd_core.teacher.sizes import stored_size

__all__ = ["feature_notes", "live_teacher_seconds", "reads_states"]


def reads_states(known: Known) -> bool:
    """Tell whether training reads cached hidden states."""
    features = known.basis.recipe.objective.features
    return isinstance(features, HiddenStateFeatures) and features.source == "cached"


def live_teacher_seconds(known: Known, *, tokens: float) -> float | None:
    """Seconds that a teacher beside the student takes for all tokens of a training run: 0 where none runs, None where it is not known."""
    if known.basis.recipe.objective.features is None or reads_states(known):
        return 0.0
    if known.sizes.teacher_parameters is None:
        return None
    run = known.basis.recipe.run
    return forward_seconds(known.sizes.teacher_parameters, tokens=tokens, passes=tokens / run.micro_batch_tokens, run=run)


def feature_notes(known: Known) -> Iterator[str]:
    """Write one sentence, or none without features.

    Raises:
        RecipeError: blocks that are not there.
    """
    features = known.basis.recipe.objective.features
    if features is None:
        return
    how = "read from the store" if reads_states(known) else "with the teacher beside the student in every step"
    student, teacher = _student_blocks(known), None if known.sizes.teacher_size is None else len(known.sizes.teacher_size.blocks)
    if student is None or teacher is None:
        named = features.blocks or ()
        pairs = ", ".join(f"{p.student} from {p.teacher}" for p in named) or "evenly spaced, named in the log when training starts"
    else:
        captured = known.basis.recipe.hidden_states.blocks if reads_states(known) and known.basis.recipe.hidden_states is not None else None
        found = block_pairs(features, student_blocks=student, teacher_blocks=teacher, captured=captured)
        spaced = "" if features.blocks is not None else ", evenly spaced"
        pairs = ", ".join(f"{p.student} from {p.teacher}" for p in found) + f" (of {student} and {teacher} blocks{spaced})"
    yield f"features ({features.kind}), {how}: the student's blocks learn from the teacher's: {pairs}"


def _student_blocks(known: Known) -> int | None:
    """Blocks of the student; None for a model on the hub."""
    student = known.basis.recipe.student
    if isinstance(student, StudentFromConfig):
        return student.architecture.num_layers
    if isinstance(student, PretrainedStudent):
        size = stored_size(student)
        return None if size is None else len(size.blocks)
    if known.sizes.teacher_size is None or isinstance(student, NewClassifier):
        return None
    try:
        return len(student.kept_blocks(len(known.sizes.teacher_size.blocks)))
    except ValueError as error:
        raise RecipeError(f"student.{error}") from error
