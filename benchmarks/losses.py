"""The training loss that reads soft labels, beside cross-entropy alone on the same logits: seconds, forward and backward."""

import torch

from benchmarks.measure import Check, Figure, figure, in_turn, timings
from benchmarks.workloads import zipf_logits
from kd_core.losses import StepWeights, supervised_loss
from kd_core.recipe import Sampled
from kd_core.softlabels.targets import Targets, make_targets

__all__ = ["run"]


def run(*, quick: bool) -> list[Figure]:
    """All figures of this module."""
    torch.set_num_threads(1)
    logits = zipf_logits(1 if quick else 4, num_columns=49_152)
    teacher_NV, labels_N = torch.cat(logits.rows), torch.cat([torch.from_numpy(labels) for labels in logits.labels])
    policy = Sampled(kind="sampled", num_draws=25, temperature=1.0)
    targets = make_targets(teacher_NV, labels_N, policy, uniform_N=torch.rand(len(labels_N), dtype=torch.float64))
    student_NV = torch.randn(teacher_NV.shape, requires_grad=True)

    def step(weights: StepWeights, found: Targets | None) -> torch.Tensor:
        student_NV.grad = None
        loss, _ = supervised_loss(student_NV, labels_N, found, weights)
        loss.backward()
        return loss

    soft, hard = StepWeights(0.5, 0.5, 1.0), StepWeights(1.0, 0.0, 1.0)
    ours, peer = in_turn(lambda: step(soft, targets), lambda: step(hard, None), repeats=5)
    finite = bool(torch.isfinite(step(soft, targets)))
    check = Check(f"finite: {finite}; {timings(ours, peer)}", finite)
    name = f"loss with soft labels, {len(labels_N)} positions"
    return [figure(name, ours.process, "s", check, less_is_better=True, peer="cross-entropy alone, same logits", peer_value=peer.process)]
