"""The fused objective beside its peers: seconds of process time for loss and gradients, and memory: ``python -m benchmarks.kernel``.

Half of a batch's positions are masked, as prompts are. Ours gets the supervised ones, which is its contract; a peer gets what
its own interface takes, which is all of them and a mask.
"""

from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.kernel_case import FORWARD, WEIGHTS, fused, make_case, peers, run_once, targets_of
from benchmarks.measure import Check, Figure, Goal, figure, fork_server, in_turn, machine, peak_memory, show, tell, times_better, timings
from benchmarks.peers.losses import Case, dense
from kd_core.losses import supervised_loss
from kd_core.softlabels.targets import Targets

__all__ = ["run"]

_FULL = [(512, 49_152, 576, 10), (512, 49_152, 576, 64), (1024, 49_152, 896, 64), (512, 151_936, 896, 10)]
_MEMORY = [(512, 49_152, 576, 10), (1024, 151_936, 576, 64)]


def _reference(case: Case, targets: Targets) -> Tensor:
    logits_NV = case.hidden_TH[case.mask_T] @ case.weight_VH.t()
    return supervised_loss(logits_NV, case.labels_T[case.mask_T], targets, WEIGHTS, FORWARD)[0]


def _gradients(case: Case, loss: Tensor) -> tuple[Tensor, Tensor]:
    case.hidden_TH.grad = case.weight_VH.grad = None
    loss.backward()
    assert case.hidden_TH.grad is not None
    assert case.weight_VH.grad is not None
    return case.hidden_TH.grad, case.weight_VH.grad


def _three_products(case: Case) -> None:
    """The floor: logits of the supervised positions, and the gradients to hidden states and to the projection."""
    hidden_NH, weight_VH = case.hidden_TH.detach()[case.mask_T], case.weight_VH.detach()
    logits_NV = hidden_NH @ weight_VH.t()
    logits_NV @ weight_VH
    logits_NV.t() @ hidden_NH


def _compare(num_tokens: int, num_columns: int, hidden_size: int, k: int, *, repeats: int) -> list[Figure]:
    case = make_case(num_tokens, num_columns, hidden_size, k)
    targets = targets_of(case, k)
    wanted = [gradient.clone() for gradient in _gradients(case, _reference(case, targets))]
    found = _gradients(case, fused(case, targets))
    off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
    name = f"loss and gradients, {num_tokens} positions, half masked, V = {num_columns:,}, H = {hidden_size}, {_kind(k)}"
    others = peers(k)
    runnable = {peer: loss for peer, loss in others.items() if not isinstance(loss, str)}
    sides = [
        lambda: _gradients(case, fused(case, targets)),
        lambda: _three_products(case),
        *(lambda loss=loss: _gradients(case, loss(case)) for loss in runnable.values()),
    ]
    mine, floor, *theirs = in_turn(*sides, repeats=repeats)
    exact = f"gradients within {off:.1e} of the float32 reference"
    figures = []
    for (peer, _), seconds in zip(runnable.items(), theirs, strict=True):
        check = Check(f"{exact}; {timings(mine, seconds)}", off < 1e-5)
        figures.append(_seconds(name, mine.process, check, peer, seconds.process, times_better(2)))
    for peer, reason in others.items():
        if isinstance(reason, str):
            figures.append(_seconds(name, mine.process, Check(exact), f"{peer}: {reason}", None, times_better(2)))
    above = Check(f"{exact}; ours / floor = {mine.process / floor.process:.2f}; {timings(mine, floor)}", off < 1e-5)
    figures.append(_seconds(name, mine.process, above, "floor: the three matrix products", floor.process, times_better(1 / 1.5)))
    return figures


def _kind(k: int) -> str:
    return "sampled, 25 draws" if k == 10 else f"topk, k = {k}"


def _seconds(name: str, ours: float, check: Check, peer: str, value: float | None, goal: Goal) -> Figure:
    return figure(name, ours, "s", check, less_is_better=True, peer=peer, peer_value=value, goal=goal)


# ---------------------------------------------------------------------------------------------- memory


def _memory(num_tokens: int, num_columns: int, hidden_size: int, k: int, *, sparse_peers: bool = True) -> list[Figure]:
    """Beyond the input and one gradient of the projection; beside the dense loss, and all other peers as well."""
    size = (num_tokens, num_columns, hidden_size, k)
    fork_server("benchmarks.kernel_case")
    empty, ours = (peak_memory(run_once, kind, *size) for kind in ("nothing", "ours"))
    given = empty + num_columns * hidden_size * 4 / 2**20
    extra = max(ours - given, 1.0)
    name = f"extra peak memory of the loss, {num_tokens} positions, V = {num_columns:,}, H = {hidden_size}, {_kind(k)}"
    figures = []
    for peer, loss in peers(k).items():
        if loss is not dense and not sparse_peers:
            continue
        if isinstance(loss, str):
            figures.append(figure(name, extra, "MB", Check(""), peer=f"{peer}: {loss}", goal=times_better(10)))
            continue
        theirs = peak_memory(run_once, peer, *size)
        text = f"MB of processes of their own: {empty:,.0f} without a loss, {ours:,.0f} ours, {theirs:,.0f} theirs; each makes a gradient"
        goal = times_better(10) if loss is dense else None
        check = Check(f"{text} of the projection")
        figures.append(figure(name, extra, "MB", check, less_is_better=True, peer=peer, peer_value=theirs - given, goal=goal))
    return figures


def run(*, quick: bool) -> list[Figure]:
    """All figures of this module."""
    torch.set_num_threads(1)
    if quick:
        return [*tell(_compare(*_FULL[0], repeats=2)), *tell(_memory(*_MEMORY[0], sparse_peers=False))]
    times = [found for case in _FULL for found in tell(_compare(*case, repeats=5))]
    return [*times, *(found for case in _MEMORY for found in tell(_memory(*case)))]


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One size; under 50 seconds.")] = False,
) -> None:
    """Measure the fused objective beside its peers, in this process, now."""
    show([*machine(), *run(quick=quick)], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
