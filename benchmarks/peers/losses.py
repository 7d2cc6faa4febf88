"""Other people's distillation losses, from hidden states to gradients: dense, DistillKit's sparse KL, TRL's chunked divergence.

The dense one is the textbook in plain torch. The others are their own code: KD_PEER_DISTILLKIT names a checkout of
github.com/arcee-ai/DistillKit, KD_PEER_TRL a directory that holds the package trl (1.16).
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Case", "Loss", "dense", "distillkit", "importable", "trl_chunked"]


@dataclass(frozen=True)
class Case:
    """One step's input, all positions of a batch, supervised or not.

    Attributes:
        hidden_TH, weight_VH: with gradient.
        labels_T: -100 where masked.
        mask_T: True where supervised.
        teacher_TV: teacher logits.
        ids_TK, logprobs_TK: its k largest, log-probabilities at T = 1.
        teacher_hidden_TH, teacher_weight_VH: that give ``teacher_TV``.
    """

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    mask_T: Tensor
    teacher_TV: Tensor
    ids_TK: Tensor
    logprobs_TK: Tensor
    teacher_hidden_TH: Tensor
    teacher_weight_VH: Tensor


Loss = Callable[[Case], Tensor]


def dense(case: Case) -> Tensor:
    """Logits of all positions, ``kl_div`` against the teacher's probabilities, and cross-entropy."""
    logits_TV = case.hidden_TH @ case.weight_VH.t()
    hard = functional.cross_entropy(logits_TV, case.labels_T, reduction="sum")
    log_q_TV, log_p_TV = torch.log_softmax(logits_TV, -1), torch.log_softmax(case.teacher_TV, -1)
    kl_T = functional.kl_div(log_q_TV, log_p_TV, reduction="none", log_target=True).sum(-1)
    return 0.5 * hard + 0.5 * (kl_T * case.mask_T).sum()


def distillkit() -> Loss | str:
    """Its sparse KL with a tail bucket, and its way to cross-entropy; or why it cannot be run."""
    reason = importable("KD_PEER_DISTILLKIT", "github.com/arcee-ai/DistillKit", "distillkit.lossfuncs.kl")
    if reason is not None:
        return reason
    from distillkit.lossfuncs.kl import sparse_kl_div
    from distillkit.missing_probability import MissingProbabilityHandling

    def loss(case: Case) -> Tensor:
        logits_1TV = (case.hidden_TH @ case.weight_VH.t())[None]
        hard = functional.cross_entropy(logits_1TV[0], case.labels_T, reduction="sum")
        missing = MissingProbabilityHandling.SYMMETRIC_UNIFORM
        soft = sparse_kl_div(logits_1TV, case.ids_TK[None], case.logprobs_TK[None], mask=case.mask_T[None], missing=missing)
        return 0.5 * hard + 0.5 * soft

    return loss


def trl_chunked() -> Loss | str:
    """Its tiled forward KL against a live teacher's head, without cross-entropy; or why it cannot be run."""
    reason = importable("KD_PEER_TRL", "the package trl 1.16", "trl.kernels.chunked_divergence")
    if reason is not None:
        return reason
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(case: Case) -> Tensor:
        mine, theirs = (case.hidden_TH, case.weight_VH, None), (case.teacher_hidden_TH, case.teacher_weight_VH, None)
        kl_T, _ = ChunkedDivergenceFunction.apply(*mine, *theirs, 0.0, 1.0, 1.0, None, 1.0, None)
        return 0.5 * kl_T.masked_fill(~case.mask_T, 0).sum()

    return loss


def importable(variable: str, what: str, module: str) -> str | None:
    """Why a peer's module cannot be run; None if it can. The environment variable names the directory to import it from."""
    if variable not in os.environ:
        return f"not run: set {variable} to {what}"
    if os.environ[variable] not in sys.path:
        sys.path.append(os.environ[variable])
    try:
        __import__(module)
    except ImportError as error:
        return f"not run: {variable} has no importable {module} ({error})"
    return None
