"""The input of the kernel's measurements, and our side of them; one side alone, for a process of its own.

The input is made a few positions at a time, so that making it never takes more memory than a loss and hides one.
"""

import torch
from torch import Tensor

from benchmarks.peers.losses import Case, Loss, dense, distillkit, trl_chunked
from kd_core.losses import Projection, StepWeights, fused_loss
from kd_core.recipe import ForwardKL, Sampled, TopK
from kd_core.softlabels.targets import Targets, concatenate, make_targets

__all__ = ["FORWARD", "WEIGHTS", "fused", "make_case", "peers", "run_once", "targets_of"]

_CHUNK = 64
FORWARD = ForwardKL(kind="forward_kl")
WEIGHTS = StepWeights(hard=0.5, soft=0.5, temperature=1.0)


def make_case(num_tokens: int, num_columns: int, hidden_size: int, k: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    hidden_TH, teacher_hidden_TH = (torch.randn(num_tokens, hidden_size, generator=generator) for _ in range(2))
    weight_VH, teacher_weight_VH = (0.1 * torch.randn(num_columns, hidden_size, generator=generator) for _ in range(2))
    labels_T = torch.randint(0, num_columns, (num_tokens,), generator=generator)
    mask_T = torch.arange(num_tokens) >= num_tokens // 2
    teacher_TV = teacher_hidden_TH @ teacher_weight_VH.t()
    tops = [torch.log_softmax(part_CV, -1).topk(k, -1) for part_CV in teacher_TV.split(_CHUNK)]
    ids_TK, logprobs_TK = torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])
    labels_T[~mask_T] = -100
    return Case(
        hidden_TH.requires_grad_(),
        weight_VH.requires_grad_(),
        labels_T,
        mask_T,
        teacher_TV,
        ids_TK,
        logprobs_TK,
        teacher_hidden_TH,
        teacher_weight_VH,
    )


def targets_of(case: Case, k: int) -> Targets:
    """k = 10: about ten distinct ids, as 25 draws leave; else top-k."""
    labels_N = case.labels_T[case.mask_T]
    policy = Sampled(kind="sampled", num_draws=25, temperature=1.0) if k == 10 else TopK(kind="topk", k=k, temperatures=(1.0,))
    uniform_N = torch.rand(len(labels_N), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    start = len(case.mask_T) - len(labels_N)  # the second half is supervised
    chunks = [slice(n, n + _CHUNK) for n in range(0, len(labels_N), _CHUNK)]
    teacher_NV = case.teacher_TV[start:]
    return concatenate([make_targets(teacher_NV[at], labels_N[at], policy, uniform_N=uniform_N[at]) for at in chunks])


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
    elif kind != "nothing":
        loss = peers(k)[kind]
        assert not isinstance(loss, str), loss
        loss(case).backward()


def peers(k: int) -> dict[str, Loss | str]:
    """Other people's losses by name, or why one cannot be run."""
    return {
        "dense kl_div + cross-entropy": dense,
        f"DistillKit sparse KL, k = {k}": distillkit(),
        "TRL chunked divergence, live teacher": trl_chunked(),
    }
