"""Checks of the objective on the user's own student: what it adds up, and what must not change it.

A batch in parts, more padding, packed documents: same loss, same gradient. Everything runs through the module that the training
loop runs; the readable objective over the model's own logits is the reference.
"""

from kd_core.doctor.findings import Skipped
from kd_core.doctor.gradients import Gradient, distance, loss_and_gradient, norm
from kd_core.doctor.labels import model_logits
from kd_core.doctor.subject import Subject
from kd_core.errors import SoftLabelError, TrainingError
from kd_core.losses import StepWeights, step_weights, supervised_loss
from kd_core.softlabels import Targets, concatenate
from kd_core.softlabels.targets import move
from kd_core.tokens.batches import TokenRow, collate
from kd_core.tokens.packing import unpackable
from kd_core.train.batches import Layout

__all__ = ["check_batch_split", "check_half_precision", "check_objective", "check_packing", "check_padding"]

_TOLERANCE = 1e-4  # float32 sums in another order: 7e-6 seen with 64M parameters
_HALF = (0.02, 0.2)  # of the loss and of the gradient, with bfloat16 products: 1e-3 and 0.08 seen
_STEPS = 1000  # of a training by epochs, whose steps are not counted yet: the middle is the same
_MORE = 7  # padded positions


class _Batch:
    """A few rows of a subject with their labels and the objective's numbers in the middle of the run."""

    def __init__(self, subject: Subject) -> None:
        recipe = subject.recipe
        self.student, self.divergence = subject.student, recipe.objective.divergence
        self.rows: list[TokenRow] = [subject.rows[i] for i in subject.few]
        soft = recipe.objective.supervision == "soft"
        self.targets: list[Targets] | None = [subject.targets[i] for i in subject.few] if soft else None
        steps = recipe.training.steps or _STEPS
        self.weights = step_weights(recipe.objective, step=steps // 2, steps=steps)
        self.packed = unpackable(self.student.model) is None

    def layout(self, *, packed: bool, budget_tokens: int | None = None) -> Layout:
        """All rows in one batch, or cut to a budget."""
        whole = len(self.rows) * max(len(row.ids) for row in self.rows)
        return Layout(packed, whole if budget_tokens is None else budget_tokens, self.student.device)

    def run(
        self, layout: Layout, *, padding: int = 0, bf16: bool = False, weights: StepWeights | None = None
    ) -> tuple[float, dict[str, float], Gradient]:
        """Loss, parts and gradient."""
        acting = self.weights if weights is None else weights
        targets = self.targets if acting.soft > 0.0 else None
        return loss_and_gradient(self.student, self.rows, targets, acting, self.divergence, layout=layout, padding=padding, bf16=bf16)


def _same(batch: _Batch, name: str, one: Layout, other: Layout, *, padding: int = 0, advice: str) -> str:
    """Compare two ways to run the same rows.

    Raises:
        TrainingError: they differ by more than rounding.
    """
    loss, _, gradient = batch.run(one)
    changed, _, theirs = batch.run(other, padding=padding)
    off = abs(changed - loss) / max(abs(loss), 1e-3), distance(theirs, gradient)
    numbers = f"{name}, the loss {loss:.4f} differs by {off[0]:.2g} and its gradient by {off[1]:.2g} of itself (allowed {_TOLERANCE:g})"
    if not max(off) <= _TOLERANCE:
        raise TrainingError(f"{numbers}: {advice}")
    return f"{len(batch.rows)} rows: {numbers}"


def check_batch_split(subject: Subject) -> str:
    """Loss and gradient are the same in one batch and row by row."""
    batch = _Batch(subject)
    one, other = batch.layout(packed=batch.packed), batch.layout(packed=batch.packed, budget_tokens=1)
    return _same(batch, "row by row", one, other, advice="a mean is taken over micro-batches and not over the step's tokens")


def check_padding(subject: Subject) -> str:
    """Padding counts in no sum."""
    batch = _Batch(subject)
    layout = batch.layout(packed=False)
    return _same(batch, f"with {_MORE} more padded positions", layout, layout, padding=_MORE, advice="padding counts, or is attended to")


def check_packing(subject: Subject) -> str:
    """Documents on one buffer do not see each other, and their positions restart."""
    batch = _Batch(subject)
    reason = unpackable(subject.student.model)
    if reason is not None:
        raise Skipped(f"the student is trained on padded rows: {reason}")
    advice = "documents see each other, or positions do not restart; add this architecture to kd_core/tokens/packing.py unpackable()"
    return _same(batch, "packed", batch.layout(packed=False), batch.layout(packed=True), advice=advice)


def check_objective(subject: Subject) -> str:
    """The loop's loss is the recipe's: the same as the readable one over the model's own logits, and never without its labels."""
    batch, student = _Batch(subject), subject.student
    weights, layout = batch.weights, batch.layout(packed=batch.packed)
    loss, parts, gradient = batch.run(layout)
    rows = collate([(row.ids, row.first_supervised) for row in batch.rows]).to(student.device)
    stored = None if batch.targets is None else move(concatenate(batch.targets), student.device)
    readable, _ = supervised_loss(model_logits(student, rows), rows.labels_N, stored, weights, batch.divergence)
    (readable / len(rows.labels_N)).backward()  # type: ignore[no-untyped-call]
    wanted = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
    student.model.zero_grad(set_to_none=True)
    reference = float(readable.detach()) / len(rows.labels_N)
    off = abs(loss - reference) / max(abs(reference), 1e-3), distance(gradient, wanted)
    numbers = f"loss {loss:.4f} is {off[0]:.2g} and its gradient {off[1]:.2g} of itself from the readable one (allowed {_TOLERANCE:g})"
    added = weights.hard * parts["hard"] + weights.soft * weights.temperature**2 * parts.get("soft", 0.0)
    if not max(off) <= _TOLERANCE or abs(added - loss) > _TOLERANCE * max(abs(loss), 1.0):
        raise TrainingError(
            f"{numbers}; its parts add up to {added:.4f}: what is minimised is not the recipe's objective; please report it"
        )
    aside = "" if subject.recipe.objective.features is None else "; features are not examined here"
    return f"{numbers}; {_parts(batch, layout, parts)}{aside}"


def _parts(batch: _Batch, layout: Layout, parts: dict[str, float]) -> str:
    """Each part's value and the norm of its gradient before its weight.

    Raises:
        TrainingError: labels may be missing without a word.
        SoftLabelError: a part that has a weight has no gradient.
    """
    if batch.targets is None:
        return f"cross-entropy alone, as supervision is {'hard or gold'}"
    alone = {
        "hard": StepWeights(hard=1.0, soft=0.0, temperature=batch.weights.temperature),
        "soft": StepWeights(hard=0.0, soft=1.0, temperature=batch.weights.temperature),
    }
    norms = {name: norm(batch.run(layout, weights=weights)[2]) for name, weights in alone.items()}
    try:
        loss_and_gradient(batch.student, batch.rows, None, batch.weights, batch.divergence, layout=layout)
    except SoftLabelError:
        pass
    else:
        raise TrainingError("rows without soft labels are trained on hard labels alone and nobody is told; please report it")
    return ", ".join(f"{name} {parts[name]:.4g} with a gradient of norm {value:.3g}" for name, value in norms.items())


def check_half_precision(subject: Subject) -> str:
    """bfloat16 products change loss and gradient by no more than rounding."""
    if subject.recipe.training.dtype == "float32":
        raise Skipped("the recipe trains in float32")
    batch = _Batch(subject)
    layout = batch.layout(packed=batch.packed)
    loss, _, gradient = batch.run(layout)
    changed, _, theirs = batch.run(layout, bf16=True)
    off = abs(changed - loss) / max(abs(loss), 1e-3), distance(theirs, gradient)
    numbers = f"in bfloat16 the loss {loss:.4f} differs by {off[0]:.2g} (allowed {_HALF[0]:g}), its gradient by {off[1]:.2g} ({_HALF[1]:g})"
    if not (off[0] <= _HALF[0] and off[1] <= _HALF[1]):
        raise TrainingError(f"{numbers} of itself; use training.dtype: float32")
    return f"{numbers} of itself"
