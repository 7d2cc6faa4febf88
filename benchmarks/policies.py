"""What each target policy does to learning: ``python -m benchmarks.policies [--json] [--quick]``.

Axes: B rows of a batch, N supervised positions, V vocabulary columns, H hidden size, K kept ids, D draws.

A real teacher (SmolLM2-135M-Instruct, V = 49,152) on worked GSM8K answers, T = 1, the soft loss alone. Two questions:
1. Gradient: whole batches, the gradient with respect to all parameters of a student under each policy against that under
   the full distribution: angle and norm ratio. A student far from its teacher (every other block of it, as it is cut) and
   one near to it (all blocks, with noise on every matrix): where the student is matters more than the policy. float32.
2. Learning: a student of every tenth block between the teacher's embeddings and head, which stay; the same rows and
   steps from the same start under each policy; then KL to the teacher and NLL of the gold text on rows that nobody
   trained on. bfloat16 products, as in the recipes.

Estimators that we do not ship (independent draws, top-k renormalised over its k) stand here as their authors define them.
Without KD_TEST_DATA there is no text to measure on: it says so and stops. In full it takes some 26 minutes of one core.
"""

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import measure
from benchmarks.measure import Check, Figure, Goal, figure, machine, tell, times_better
from benchmarks.workloads import gsm8k_rows, real_logits, real_teacher
from kd_core.losses import forward_kl
from kd_core.recipe import Dense, Sampled, TopK
from kd_core.softlabels.targets import make_targets
from kd_core.student.make import student_from_blocks
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow

__all__ = ["POLICIES", "Learnt", "Measured", "run"]

Loss = Callable[[Tensor], Tensor]
"""Student logits (N, V) -> the policy's divergence at each position (N,), nats, up to a constant of the teacher."""
Policy = Callable[[Tensor, Tensor, torch.Generator], Loss]
"""(teacher logits (N, V) in float32, gold ids (N,), randomness) -> the loss that what is kept of them defines."""


# ---------------------------------------------------------------------------------------------- policies


def _ours(policy: Sampled | TopK | Dense) -> Policy:
    def keep(teacher_NV: Tensor, labels_N: Tensor, generator: torch.Generator) -> Loss:
        uniform_N = torch.rand(len(labels_N), generator=generator, dtype=torch.float64)
        targets = make_targets(teacher_NV, labels_N, policy, uniform_N=uniform_N)
        return lambda logits_NV: forward_kl(logits_NV, targets, temperature=1.0)

    return keep


def _independent(num_draws: int) -> Policy:
    """D independent draws a position, each of weight 1 / D. Source: Sparse Logit Sampling (ACL 2025), random sampling at T = 1."""

    def keep(teacher_NV: Tensor, labels_N: Tensor, generator: torch.Generator) -> Loss:
        ids_ND = torch.multinomial(torch.softmax(teacher_NV, -1), num_draws, replacement=True, generator=generator)
        ids_ND = ids_ND.sort(-1).values

        def loss(logits_NV: Tensor) -> Tensor:
            return -torch.log_softmax(logits_NV.float(), -1).gather(-1, ids_ND).mean(-1)

        return loss

    return keep


def _renormalized(k: int) -> Policy:
    """The k likeliest, scaled to sum to one; what the student puts elsewhere is pushed to zero. Source: top-k logit caches."""

    def keep(teacher_NV: Tensor, labels_N: Tensor, generator: torch.Generator) -> Loss:
        values_NK, ids_NK = teacher_NV.topk(k, -1)
        log_p_NK = torch.log_softmax(values_NK, -1)

        def loss(logits_NV: Tensor) -> Tensor:
            log_q_NK = torch.log_softmax(logits_NV.float(), -1).gather(-1, ids_NK)
            return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)

        return loss

    return keep


def _topk(k: int) -> Policy:
    return _ours(TopK(kind="topk", k=k, temperatures=(1.0,)))


DENSE, SYSTEMATIC, TOP_128, TOP_12 = "dense", "sampled, 25 systematic", "top-k with tail, k 128", "top-k with tail, k 12"
INDEPENDENT_25, INDEPENDENT_50 = "25 independent draws", "50 independent draws"
RENORMALIZED_128, RENORMALIZED_12 = "top-k renormalised, k 128", "top-k renormalised, k 12"

POLICIES: Mapping[str, Policy] = {
    DENSE: _ours(Dense(kind="dense")),
    SYSTEMATIC: _ours(Sampled(kind="sampled", num_draws=25, temperature=1.0)),
    INDEPENDENT_25: _independent(25),
    INDEPENDENT_50: _independent(50),
    TOP_128: _topk(128),
    RENORMALIZED_128: _renormalized(128),
    TOP_12: _topk(12),
    RENORMALIZED_12: _renormalized(12),
}
FAR, NEAR = "far student", "near student"

_PAIRS = ((SYSTEMATIC, INDEPENDENT_50), (SYSTEMATIC, INDEPENDENT_25), (TOP_128, RENORMALIZED_128), (TOP_12, RENORMALIZED_12))
"""Ours and the peer."""


# ---------------------------------------------------------------------------------------------- the workload


@dataclass(frozen=True)
class Scored:
    """A row, the teacher's logits (N, V) at its supervised positions in bfloat16, and the gold ids there."""

    row: TokenRow
    logits_NV: Tensor
    labels_N: Tensor


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    gradient_batches: int
    gradient_rows: int
    steps: int
    step_rows: int
    seeds: int
    held_out_rows: int


_FULL = Sizes(gradient_batches=3, gradient_rows=4, steps=60, step_rows=2, seeds=2, held_out_rows=16)
_QUICK = Sizes(gradient_batches=1, gradient_rows=1, steps=1, step_rows=1, seeds=1, held_out_rows=1)
_STUDENT_BLOCKS, _NOISE = 10, 0.05
_LEARNING_RATE, _WARMUP_STEPS = 5e-4, 6


def _hidden(student: Any, rows: Sequence[Scored]) -> Tensor:
    """Student hidden states (N, H) that predict the supervised tokens of rows, one row a pass."""
    found = []
    for scored in rows:
        hidden_TH = student.base_model(input_ids=torch.tensor([scored.row.ids]), use_cache=False).last_hidden_state[0]
        found.append(hidden_TH[scored.row.first_supervised - 1 : -1])
    return torch.cat(found)


def _near(teacher: LoadedModel) -> Any:
    """The teacher with Gaussian noise on every matrix, a share of that matrix's own spread: about 0.2 nats from it."""
    student: Any = copy.deepcopy(teacher.model).float().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.dim() > 1:
                parameter.add_(_NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return student


_STUDENTS: Mapping[str, Callable[[LoadedModel], Any]] = {FAR: lambda teacher: student_from_blocks(teacher, 2), NEAR: _near}


def _small(teacher: LoadedModel) -> Any:
    """Every tenth block; embeddings and head are the teacher's and are not trained."""
    student: Any = student_from_blocks(teacher, _STUDENT_BLOCKS)
    student.get_input_embeddings().requires_grad_(False)
    return student


def _teacher(rows: Sequence[Scored]) -> tuple[Tensor, Tensor]:
    return torch.cat([scored.logits_NV for scored in rows]).float(), torch.cat([scored.labels_N for scored in rows])


# ---------------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Measured:
    """One policy's parameter gradient against dense's, a value a batch.

    Attributes:
        degrees: angles.
        norm_ratios: norm over dense's norm.
    """

    degrees: tuple[float, ...]
    norm_ratios: tuple[float, ...]


def gradients(student: Any, batches: Sequence[Sequence[Scored]]) -> dict[str, Measured]:
    """Angle and norm ratio of every policy's gradient (all parameters, mean loss of a batch)."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
    for number, rows in enumerate(batches):
        teacher_NV, labels_N = _teacher(rows)
        hidden_NH = _hidden(student, rows)
        dense = _gradient(student, hidden_NH, POLICIES[DENSE](teacher_NV, labels_N, torch.Generator()))
        for name, policy in POLICIES.items():
            generator = torch.Generator().manual_seed(number)
            gradient = _gradient(student, hidden_NH, policy(teacher_NV, labels_N, generator))
            found[name].append((_degrees(gradient, dense), _norm(gradient) / _norm(dense)))
    return {name: Measured(*zip(*values, strict=True)) for name, values in found.items()}


def _gradient(student: Any, hidden_NH: Tensor, loss: Loss) -> list[Tensor]:
    """Gradient of the mean loss, by parameter."""
    return list(torch.autograd.grad(loss(student.lm_head(hidden_NH)).mean(), list(student.parameters()), retain_graph=True))


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.hypot(*(float(part.norm()) for part in gradient))


def _degrees(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Angle between two gradients, from the chord between their directions: a cosine in float32 is blind below 0.1 degrees."""
    norm_a, norm_b = _norm(a), _norm(b)
    chord = math.hypot(*(float((x / norm_a - y / norm_b).norm()) for x, y in zip(a, b, strict=True)))
    return math.degrees(2.0 * math.asin(min(1.0, chord / 2.0)))


# ---------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Learnt:
    """Held-out losses of students after equal steps, a value a seed.

    Attributes:
        kl: KL(teacher || student), nats a token.
        nll: of the gold text, nats a token.
    """

    kl: tuple[float, ...]
    nll: tuple[float, ...]


def learning(start: Any, train: Sequence[Scored], held_out: Sequence[Scored], sizes: Sizes) -> dict[str, Learnt]:
    """Train a copy of one student under each policy. The order of rows and the draws depend on the seed, on nothing else."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in POLICIES}
    for seed in range(sizes.seeds):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        steps = [[train[i] for i in order[at : at + sizes.step_rows]] for at in range(0, sizes.steps * sizes.step_rows, sizes.step_rows)]
        for name, policy in POLICIES.items():
            student = copy.deepcopy(start)
            _train(student, steps, policy, torch.Generator().manual_seed(seed))
            found[name].append(_held_out(student, held_out))
    return {name: Learnt(*zip(*values, strict=True)) for name, values in found.items()}


def _train(student: Any, steps: Sequence[Sequence[Scored]], policy: Policy, generator: torch.Generator) -> None:
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    for step, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP_STEPS)
        loss = policy(*_teacher(rows), generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits_NV = student.lm_head(_hidden(student, rows))
        student.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(logits_NV).mean())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


@torch.inference_mode()
def _held_out(student: Any, rows: Sequence[Scored]) -> tuple[float, float]:
    kl, nll, positions = 0.0, 0.0, 0
    for scored in rows:
        teacher_NV, labels_N = _teacher([scored])
        log_q_NV = torch.log_softmax(student.lm_head(_hidden(student, [scored])).float(), -1)
        log_p_NV = torch.log_softmax(teacher_NV, -1)
        kl += float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum())
        nll -= float(log_q_NV.gather(-1, labels_N[:, None]).sum())
        positions += len(labels_N)
    return kl / positions, nll / positions


# ---------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True)
class Found:
    """All that was measured.

    Attributes:
        gradients: student -> policy -> gradient.
        learnt: policy -> held-out losses.
        about: what it was measured on.
    """

    gradients: Mapping[str, Mapping[str, Measured]]
    learnt: Mapping[str, Learnt]
    about: str


def _measure(*, quick: bool) -> Found | str:
    """Gradients and learning, or why they cannot be measured here."""
    torch.set_num_threads(1)
    sizes = _QUICK if quick else _FULL
    teacher = real_teacher(quick=quick)
    if isinstance(teacher, str):
        return teacher
    trained = max(sizes.steps * sizes.step_rows, sizes.gradient_batches * sizes.gradient_rows)
    rows = gsm8k_rows(teacher, trained + sizes.held_out_rows)
    if isinstance(rows, str):
        return rows
    scored = []
    for row in rows:
        logits = real_logits(teacher, [row])
        scored.append(Scored(row, logits.rows[0], torch.from_numpy(logits.labels[0])))
    train, held_out = scored[:trained], scored[trained:]
    batches = [train[i * sizes.gradient_rows : (i + 1) * sizes.gradient_rows] for i in range(sizes.gradient_batches)]
    measured = {name: gradients(make(teacher), batches) for name, make in _STUDENTS.items()}
    positions = statistics.mean(sum(len(one.labels_N) for one in batch) for batch in batches)
    about = (
        f"SmolLM2-135M-Instruct on GSM8K, V {teacher.num_columns:,}, T 1. "
        f"Gradients: {len(batches)} batch(es) of {positions:.0f} positions. "
        f"Learning: {sizes.steps} step(s) of {sizes.step_rows} row(s), {sizes.seeds} seed(s), {len(held_out)} held-out row(s)"
    )
    return Found(measured, learning(_small(teacher), train, held_out, sizes), about)


def _figures(found: Found) -> list[Figure]:
    same = max(max(measured[DENSE].degrees) for measured in found.gradients.values())
    check = Check(f"dense against itself: {same:.2g} degrees; {found.about}", ok=same < 0.1)

    def pair(name: str, unit: str, mine: float, peer: str, theirs: float, goal: Goal | None = None) -> Figure:
        return figure(name, mine, unit, check, less_is_better=True, peer=peer, peer_value=theirs, goal=goal)

    figures = []
    for student, measured in found.gradients.items():
        for ours, peer in _PAIRS:
            (mine, mine_off), (theirs, theirs_off) = _gradient_errors(measured[ours]), _gradient_errors(measured[peer])
            figures.append(pair(f"gradient's angle to dense, {student}: {ours}", "degrees", mine, peer, theirs, times_better(1.0)))
            figures.append(pair(f"gradient's norm off dense's, {student}: {ours}", "share", mine_off, peer, theirs_off))
    for ours, peer in [*_PAIRS, *((ours, DENSE) for ours in (SYSTEMATIC, TOP_128, TOP_12))]:
        mine_learnt, theirs_learnt = found.learnt[ours], found.learnt[peer]
        name = f"after equal steps: {ours}"
        figures.append(pair(f"held-out KL {name}", "nats", statistics.mean(mine_learnt.kl), peer, statistics.mean(theirs_learnt.kl)))
        figures.append(pair(f"held-out NLL {name}", "nats", statistics.mean(mine_learnt.nll), peer, statistics.mean(theirs_learnt.nll)))
    return figures


def _gradient_errors(measured: Measured) -> tuple[float, float]:
    return statistics.mean(measured.degrees), statistics.mean(abs(ratio - 1.0) for ratio in measured.norm_ratios)


def run(*, quick: bool) -> list[Figure]:
    """All figures of this module; one that names the reason where there is nothing to measure on."""
    found = _measure(quick=quick)
    return tell(_not_run(found) if isinstance(found, str) else _figures(found))


def _not_run(reason: str) -> list[Figure]:
    return [figure("target policies on a real teacher", None, "", Check(f"not run: {reason}", ok=False))]


def _table(found: Found) -> Table:
    table = Table(title=found.about, title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("policy")
    for student in found.gradients:
        table.add_column(f"{student}: degrees", justify="right")
        table.add_column("norm / dense's", justify="right")
    table.add_column("held-out KL", justify="right")
    table.add_column("held-out NLL", justify="right")
    for name in POLICIES:
        columns = [values for measured in found.gradients.values() for values in (measured[name].degrees, measured[name].norm_ratios)]
        table.add_row(name, *map(_spread, [*columns, found.learnt[name].kl, found.learnt[name].nll]))
    return table


def _spread(values: Sequence[float]) -> str:
    """Mean, and the range where there is one."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.3f}, {max(values):.3f}]"


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes; under a minute.")] = False,
) -> None:
    """Measure target policies on a real teacher: means over batches or seeds, and their range."""
    found = _measure(quick=quick)
    if as_json:
        measure.show([*machine(), *(_not_run(found) if isinstance(found, str) else _figures(found))], as_json=True)
    elif isinstance(found, str):
        print(f"target policies are not measured: {found}")
    else:
        Console(width=180).print(_table(found))


if __name__ == "__main__":
    typer.run(main)
