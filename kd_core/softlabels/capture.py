"""The scoring pass: teacher-forced logits over fixed tokens, reduced to soft labels.

Axes: B rows, T positions, V vocabulary columns. Any text can be scored: the teacher's own answers, gold answers, another
model's. The teacher must be in eval mode; its tokens are the student's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kd_core.recipe import SoftLabels
from kd_core.row_keys import soft_label_key
from kd_core.softlabels.targets import Targets, make_targets, position_uniforms
from kd_core.teacher.models import LoadedModel
from kd_core.tokens import collate
from kd_core.train.data import TokenRow, token_batches

__all__ = ["row_key", "score_rows"]


def row_key(namespace: str, row: TokenRow) -> str:
    """Soft-label key of a row."""
    return soft_label_key(namespace, row.ids, row.first_supervised)


@dataclass(frozen=True)
class ScoredRow:
    """A row's key and what the policy kept of the teacher at its supervised positions."""

    key: str
    targets: Targets


@torch.inference_mode()
def score_rows(
    loaded: LoadedModel, rows: Sequence[tuple[str, TokenRow]], *, policy: SoftLabels, micro_batch_tokens: int
) -> list[ScoredRow]:
    """Score rows with the teacher.

    Args:
        loaded: the teacher, in eval mode.
        rows: (key, row); the key also seeds the row's systematic draws.
        policy: what to keep.
        micro_batch_tokens: padded tokens a forward pass.

    Returns:
        One entry a row, in order.

    Raises:
        SoftLabelError: NaN or infinite logits.
    """
    assert not loaded.model.training, "the teacher must be in eval mode: dropout would make its labels noise"
    scored: dict[str, ScoredRow] = {}
    for part in token_batches([row for _, row in rows], micro_batch_tokens):
        picked = [rows[i] for i in part]
        batch = collate([(row.ids, row.first_supervised) for _, row in picked]).to(loaded.device)
        keep = batch.ids_BT.shape[1] - min(row.first_supervised for _, row in picked) + 1
        out = loaded.model(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, logits_to_keep=keep, use_cache=False)
        offset = batch.ids_BT.shape[1] - keep
        for b, (key, row) in enumerate(picked):
            first, end = row.first_supervised, len(row.ids)
            logits_NV = out.logits[b, first - 1 - offset : end - 1 - offset, : loaded.num_columns]
            labels_N = batch.ids_BT[b, first:end]
            uniform_N = torch.from_numpy(position_uniforms(key, end - first))
            scored[key] = ScoredRow(key, make_targets(logits_NV, labels_N, policy, uniform_N=uniform_N))
    return [scored[key] for key, _ in rows]
