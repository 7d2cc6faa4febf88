"""The input of the kernel's measurements, and our side of them; one side alone, for a process of its own."""

import torch
from torch import Tensor

from benchmarks.peers.losses import Case, dense
from kd_core.losses import Projection, StepWeights, fused_loss
from kd_core.recipe import ForwardKL, Sampled, TopK
from kd_core.softlabels.targets import Targets, make_targets

__all__ = ["FORWARD", "WEIGHTS", "fused", "make_case", "run_once", "targets_of"]

FORWARD = ForwardKL(kind="forward_kl")
WEIGHTS = StepWeights(hard=0.5, soft=0.5, temperature=1.0)


def make_case(num_tokens: int, num_columns: int, hidden_size: int, k: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden_TH, teacher_hidden_TH = (torch.randn(num_tokens, hidden_size, generator=generator) for _ in range(2))
    weight_VH, teacher_weight_VH = (0.1 * torch.randn(num_columns, hidden_size, generator=generator) for _ in range(2))
    labels_T = torch.randint(0, num_columns, (num_tokens,), generator=generator)
    mask_T = torch.arange(num_tokens) >= num_tokens // 2
    teacher_TV = teacher_hidden_TH @ teacher_weight_VH.t()
    top = torch.log_softmax(teacher_TV, -1).topk(k, -1)
    labels_T[~mask_T] = -100
    return Case(
        hidden_TH.requires_grad_(),
        weight_VH.requires_grad_(),
        labels_T,
        mask_T,
        teacher_TV,
        top.indices,
        top.values,
        teacher_hidden_TH,
        teacher_weight_VH,
    )


def targets_of(case: Case, k: int) -> Targets:
    """k = 10: about ten distinct ids, as 25 draws leave; else top-k."""
    labels_N = case.labels_T[case.mask_T]
    policy = Sampled(kind="sampled", num_draws=25, temperature=1.0) if k == 10 else TopK(kind="topk", k=k, temperatures=(1.0,))
    uniform_N = torch.rand(len(labels_N), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return make_targets(case.teacher_TV[case.mask_T], labels_N, policy, uniform_N=uniform_N)


def fused(case: Case, targets: Targets) -> Tensor:
    projection = Projection(case.weight_VH, None, len(case.weight_VH))
    return fused_loss(case.hidden_TH[case.mask_T], projection, case.labels_T[case.mask_T], targets, WEIGHTS, FORWARD)[0]


def run_once(kind: str, num_tokens: int, num_columns: int, hidden_size: int, k: int) -> None:
    """One side alone in a process of its own; 'nothing' makes the input and the gradient's room, and no loss."""
    torch.set_num_threads(1)
    case = make_case(num_tokens, num_columns, hidden_size, k)
    targets = targets_of(case, k)
    case.hidden_TH.grad, case.weight_VH.grad = torch.ones_like(case.hidden_TH), torch.ones_like(case.weight_VH)
    if kind == "ours":
        fused(case, targets).backward()
    elif kind == "dense":
        dense(case).backward()
