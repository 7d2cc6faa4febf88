"""Choice of the parts of a teacher's width that are worth keeping, by how much they write on real rows.

Owns the statistics and the choice. A head or hidden unit counts by the norm of what it adds to the residual stream, mean
over tokens; a channel by its mean magnitude behind the norms that blocks read it through, summed over them (after
Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation", section 2.2). Batches are of
a fixed size, so that the choice depends on teacher and rows alone and never on where it runs.

Axes: N tokens of a batch, H channels, F hidden units, D columns of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kd_core.errors import TrainingError
from kd_core.recipe import StudentFromTeacher
from kd_core.student.shrink import Keep, head_size
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow, collate, token_batches
from kd_core.train.row_order import Rows

__all__ = ["Importance", "measure", "most_important", "sample_rows"]

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Importance:
    """Means over tokens, float64, not negative.

    Attributes:
        channels_H: one value a channel of the residual stream.
        heads: one tensor (query heads,) a measured block.
        units_F: one tensor (F,) a measured block.
    """

    channels_H: Tensor
    heads: Sequence[Tensor]
    units_F: Sequence[Tensor]


def sample_rows(rows: Rows, num_rows: int, *, max_tokens: int, seed: int) -> list[TokenRow]:
    """Draw at most ``num_rows`` rows of at most ``max_tokens`` tokens, in their order: a function of rows and seed.

    Raises:
        TrainingError: no row is short enough.
    """
    short = np.flatnonzero(rows.num_tokens <= max_tokens)
    if not len(short):
        found = f"none of {len(rows.num_tokens)} curated rows is within training.max_tokens = {max_tokens}"
        raise TrainingError(f"student.narrower: {found}, so there is nothing to measure on; allow longer rows")
    drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(short))[:num_rows]
    return rows.read(short[np.sort(drawn)].tolist())


@torch.no_grad()
def measure(teacher: LoadedModel, rows: Sequence[TokenRow], blocks: Sequence[int]) -> Importance:
    """Run the teacher over rows and see how much its parts write, in the named blocks.

    Args:
        teacher: of a family that ``shrink`` knows, in eval mode.
        rows: at least one; padding does not count.
        blocks: numbers of the teacher's blocks.
    """
    decoder: Any = teacher.model.base_model
    size = head_size(teacher.model.config)
    sums: dict[str, Tensor] = {}
    mask_N = torch.empty(0, dtype=torch.bool)

    def add(name: str, value_N: Tensor) -> None:
        total = value_N.flatten(0, 1)[mask_N].double().sum(0).cpu()
        sums[name] = sums[name] + total if name in sums else total

    def head_norms(o_proj: nn.Linear, inputs: Tensor) -> Tensor:
        """Norm of each head's part of the product: |W_h x_h|, by the Gram matrix of W_h."""
        parts = inputs.float().reshape(*inputs.shape[:-1], -1, size)
        columns = o_proj.weight.float().reshape(len(o_proj.weight), -1, size)
        gram = torch.einsum("ohd,ohe->hde", columns, columns)
        return torch.einsum("bthd,hde,bthe->bth", parts, gram, parts).clamp_min(0.0).sqrt()

    def unit_norms(down_proj: nn.Linear, inputs: Tensor) -> Tensor:
        columns_F: Tensor = torch.linalg.vector_norm(down_proj.weight.float(), dim=0)
        return inputs.float().abs() * columns_F

    hooks = [decoder.norm.register_forward_hook(lambda m, i, out: add("channels", out.float().abs()))]
    for number in blocks:
        block = decoder.layers[number]
        for norm in (block.input_layernorm, getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)):
            hooks.append(norm.register_forward_hook(lambda m, i, out: add("channels", out.float().abs())))
        hooks.append(block.self_attn.o_proj.register_forward_hook(lambda m, i, out, n=number: add(f"heads.{n}", head_norms(m, i[0]))))
        hooks.append(block.mlp.down_proj.register_forward_hook(lambda m, i, out, n=number: add(f"units.{n}", unit_norms(m, i[0]))))
    num_tokens = 0
    try:
        for part in token_batches(rows, _BATCH_TOKENS):
            batch = collate([(rows[i].ids, rows[i].first_supervised) for i in part]).to(teacher.device)
            mask_N = batch.attention_BT.bool().flatten()
            num_tokens += int(mask_N.sum())
            decoder(input_ids=batch.ids_BT, attention_mask=batch.attention_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    means = {name: value / num_tokens for name, value in sums.items()}
    return Importance(means["channels"], [means[f"heads.{n}"] for n in blocks], [means[f"units.{n}"] for n in blocks])


def most_important(importance: Importance, teacher: PretrainedConfig, student: PretrainedConfig, spec: StudentFromTeacher) -> Keep:
    """The parts with the largest means, as many as the student's config says; of equals the first.

    Query heads are chosen within the group of a key-value head, after neighbouring key-value heads were averaged; where
    each query head has its own, among all of them.
    """
    own_kv = teacher.num_key_value_heads == teacher.num_attention_heads and spec.num_kv_heads is None
    groups = 1 if own_kv else student.num_key_value_heads
    return Keep(
        spec.kept_blocks(teacher.num_hidden_layers),
        _largest(importance.channels_H, student.hidden_size),
        [_largest_in_groups(value, groups, student.num_attention_heads) for value in importance.heads],
        [_largest(value_F, student.intermediate_size) for value_F in importance.units_F],
        None if own_kv else student.num_key_value_heads,
    )


def _largest(values: Tensor, count: int) -> Tensor:
    return values.argsort(descending=True, stable=True)[:count].sort().values


def _largest_in_groups(values: Tensor, groups: int, count: int) -> Tensor:
    """Find the largest values of each of ``groups`` equal parts, ``count`` of them in all, by index, rising.

    >>> _largest_in_groups(torch.tensor([1.0, 9.0, 8.0, 7.0]), 2, 2).tolist()
    [1, 2]
    """
    each = len(values) // groups
    return torch.cat([_largest(part, count // groups) + i * each for i, part in enumerate(values.reshape(groups, each))])
