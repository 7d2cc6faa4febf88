"""The feature loss: a student's inner states against its teacher's, at the positions that predict a supervised token.

Axes: N supervised positions of a micro-batch, n of one document, W columns of a state, A columns of all heads, R relation heads,
D columns of one of them.

Every loss here is a sum over N, like the objective's other parts: the caller divides by the supervised tokens of the whole step, so
that no split of the batch can change it. Prompts and padding are in none of them. A relation lies between two supervised
positions of one document: documents that share a buffer never meet. All sums are made in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kd_core.errors import TrainingError
from kd_core.recipe import Features, HiddenStateFeatures, RelationFeatures

__all__ = ["FeatureLoss", "TeacherFeatures", "hidden_state_loss", "relation_loss"]

StateLoss = Literal["mse", "cosine", "normalised_mse"]


@dataclass(frozen=True)
class TeacherFeatures:
    """Inner states of the teacher where a micro-batch predicts supervised tokens.

    Attributes:
        vectors: one tensor (N, columns) a place that the student is compared at, in the order of the student's places.
        lengths: supervised positions of each document, in order; they add up to N.
    """

    vectors: tuple[Tensor, ...]
    lengths: tuple[int, ...]


def hidden_state_loss(student_NW: Tensor, teacher_NW: Tensor, loss: StateLoss) -> Tensor:
    """Distance of states, summed over N: a scalar, float32.

    mse: |s - t|^2 / W. normalised_mse: |s - t|^2 / |t|^2, which is 1 for a student of zeros whatever the block's scale. cosine:
    1 - <s, t> / (|s| |t|). Each is zero at equality, and so is the gradient.

    Args:
        student_NW: the student's states, projected to the teacher's columns.
        teacher_NW: the teacher's.
        loss: which distance.

    Source: Romero et al. 2015 (FitNets), equation 3; Jiao et al. 2020 (TinyBERT), equation 8; the cosine of Sanh et al. 2019 (DistilBERT).
    """
    student_NW, teacher_NW = student_NW.float(), teacher_NW.float()
    match loss:
        case "mse":
            return (student_NW - teacher_NW).square().mean(-1).sum()
        case "normalised_mse":
            norms_N = teacher_NW.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
            return ((student_NW - teacher_NW).square().sum(-1) / norms_N).sum()
        case "cosine":
            return (1.0 - nn.functional.cosine_similarity(student_NW, teacher_NW, dim=-1)).sum()


def relation_loss(student_NA: Tensor, teacher_NA: Tensor, *, lengths: Sequence[int], num_heads: int) -> Tensor:
    """KL(teacher || student) of relations, mean over relation heads, summed over N: a scalar in nats, float32.

    The columns of all attention heads are cut into R relation heads of D columns. A position's relation is
    softmax_j(<x_i, x_j> / sqrt(D)) over the supervised positions j of its own document, later ones included: it says which
    positions are alike, not what attention may see. D may differ between the two sides. A document of one position adds nothing.

    Args:
        student_NA: queries, keys or values of all the student's heads, side by side.
        teacher_NA: the teacher's, of any width that R divides.
        lengths: n of each document, in order; they add up to N.
        num_heads: R.

    Source: Wang et al. 2021 (MiniLMv2), equations 5 to 7, over supervised positions.
    """
    total = torch.zeros((), device=student_NA.device)
    for student_nA, teacher_nA in zip(torch.split(student_NA, list(lengths)), torch.split(teacher_NA, list(lengths)), strict=True):
        log_q_Rnn, log_p_Rnn = _log_relations(student_nA, num_heads), _log_relations(teacher_nA, num_heads)
        total = total + nn.functional.kl_div(log_q_Rnn, log_p_Rnn, reduction="sum", log_target=True)
    return total / num_heads


def _log_relations(vectors_nA: Tensor, num_heads: int) -> Tensor:
    heads_RnD = vectors_nA.float().reshape(len(vectors_nA), num_heads, -1).transpose(0, 1)
    return torch.log_softmax(heads_RnD @ heads_RnD.transpose(-1, -2) / math.sqrt(heads_RnD.shape[-1]), -1)


class FeatureLoss(nn.Module):
    """The recipe's feature loss over all block pairs, with the projections that it learns: one a pair of hidden states, none else.

    A projection maps the student's width to the teacher's. It learns with the student and is no part of it: dropped with this module.
    It begins as the identity where the widths are equal, else Gaussian of variance 1 / width of the student.
    """

    def __init__(self, features: Features, *, student_widths: Sequence[int], teacher_widths: Sequence[int], seed: int) -> None:
        """Make a loss for one width a place, in one order on both sides.

        Raises:
            TrainingError: relation heads that do not divide a width.
        """
        super().__init__()
        self._features = features
        self.projections = nn.ModuleList()
        generator = torch.Generator().manual_seed(seed)
        if isinstance(features, RelationFeatures):
            for side, widths in (("student", student_widths), ("teacher", teacher_widths)):
                if uneven := sorted({width for width in widths if width % features.num_heads}):
                    raise TrainingError(
                        f"objective.features.num_heads: {features.num_heads} relation heads do not divide the {side}'s {uneven} columns "
                        f"of {', '.join(features.between)}; use a common divisor"
                    )
            return
        for width, target in zip(student_widths, teacher_widths, strict=True):
            projection = nn.Linear(width, target, bias=False)
            drawn_WH = torch.randn(target, width, generator=generator) / math.sqrt(width)
            projection.weight.data.copy_(torch.eye(width) if width == target else drawn_WH)
            self.projections.append(projection)

    def forward(self, student: Sequence[Tensor], teacher: TeacherFeatures) -> Tensor:
        """Mean over pairs (and over kinds of relations), summed over N: a scalar, float32.

        Args:
            student: one tensor (N, columns) a place, any float dtype.
            teacher: the same places.
        """
        features = self._features
        if isinstance(features, HiddenStateFeatures):
            projected = [projection(vectors_NH.float()) for projection, vectors_NH in zip(self.projections, student, strict=True)]
            parts = [hidden_state_loss(s_NW, t_NW, features.loss) for s_NW, t_NW in zip(projected, teacher.vectors, strict=True)]
        else:
            parts = [
                relation_loss(s_NA, t_NA, lengths=teacher.lengths, num_heads=features.num_heads)
                for s_NA, t_NA in zip(student, teacher.vectors, strict=True)
            ]
        return torch.stack(parts).mean()
