"""The scoring pass: teacher-forced logits over fixed tokens, reduced to soft labels.

Axes: N supervised positions, H hidden size, V vocabulary columns.

The backbone runs once over packed rows (``forward``); only hidden states that predict a supervised token reach the head, a
bounded tile of positions at a time, in float32: no tensor of all tokens by all columns ever exists. Any text can be
scored: the teacher's own answers, gold answers, another model's. A row whose logits are not finite, or that is longer than the
teacher's positions, is refused alone, by name; a teacher that is not itself is refused as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd_core.recipe import SoftLabels
from kd_core.rows.keys import soft_label_key
from kd_core.softlabels.forward import Forwarded, Head, Parity, check_teacher, refused_rows, teacher_forward
from kd_core.softlabels.targets import Targets, concatenate, move, position_uniforms, reduce_logits, split
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow

__all__ = ["ScoredRow", "Scores", "row_key", "score_rows"]

_TILE_BYTES = 64 << 20
"""Of the float32 logits that exist at once."""


def row_key(namespace: str, row: TokenRow) -> str:
    """Soft-label key of a row."""
    return soft_label_key(namespace, row.ids, row.first_supervised)


@dataclass(frozen=True)
class ScoredRow:
    """A row's key and what the policy kept of the teacher at its supervised positions, on the CPU."""

    key: str
    targets: Targets


@dataclass(frozen=True)
class Scores:
    """What a call scored.

    Attributes:
        scored: the rows that could be scored, in the order asked.
        refused: key -> reason of every other row.
    """

    scored: tuple[ScoredRow, ...]
    refused: dict[str, str]


@torch.inference_mode()
def score_rows(loaded: LoadedModel, rows: Sequence[tuple[str, TokenRow]], *, policy: SoftLabels, micro_batch_tokens: int) -> Scores:
    """Score rows with the teacher.

    A row's draws belong to its key and to its logits, not to the rows beside it. Logits of another buffer differ by
    rounding (1e-6 in float32), which moves a draw only where a point of the systematic sample lies that close to an edge of the CDF.

    Args:
        loaded: the teacher, in eval mode.
        rows: (key, row); the key also seeds the row's systematic draws.
        policy: what to keep.
        micro_batch_tokens: tokens of a buffer; a longer row has a buffer of its own.

    Raises:
        TeacherError: the teacher is in a state, or of an architecture, that would give other logits than its own.
        SoftLabelError: a token is not in the teacher's vocabulary, or the policy does not fit it.
    """
    check_teacher(loaded)
    refused = refused_rows(loaded, rows)
    kept = [(key, row) for key, row in rows if key not in refused]
    head, parity = Head(loaded), Parity(loaded.model)
    scored: dict[str, ScoredRow] = {}
    for buffer in teacher_forward(loaded, [row for _, row in kept], micro_batch_tokens=micro_batch_tokens, parity=parity):
        picked = [kept[i] for i in buffer.indices]
        lengths = [row.num_supervised for _, row in picked]
        for i, hidden_NH in zip(buffer.indices, torch.split(buffer.hidden_NH, lengths), strict=True):
            parity.check(i, hidden_NH, head)
        uniform_N = torch.from_numpy(np.concatenate([position_uniforms(key, row.num_supervised) for key, row in picked]))
        targets, finite_N = _reduce(buffer, head, policy, uniform_N)
        for (key, _), part, finite in zip(picked, split(targets, lengths), torch.split(finite_N, lengths), strict=True):
            if bool(finite.all()):
                scored[key] = ScoredRow(key, part)
            else:
                refused[key] = f"the teacher gave NaN or infinite logits at {int((~finite).sum())} of {len(finite)} positions"
    return Scores(tuple(scored[key] for key, _ in rows if key in scored), refused)


def _reduce(buffer: Forwarded, head: Head, policy: SoftLabels, uniform_N: Tensor) -> tuple[Targets, Tensor]:
    """Targets of a buffer and whether each position's logits are finite, on the CPU, a tile of logits at a time."""
    step = max(1, _TILE_BYTES // (4 * len(head.weight_VH)))
    parts, finite = [], []
    for start in range(0, len(buffer.labels_N), step):
        tile = slice(start, start + step)
        logits_NV = head.logits(buffer.hidden_NH[tile])
        targets, finite_N = reduce_logits(logits_NV, buffer.labels_N[tile], policy, uniform_N=uniform_N[tile])
        parts.append(move(targets, torch.device("cpu")))
        finite.append(finite_N.cpu())
    return concatenate(parts), torch.cat(finite)
