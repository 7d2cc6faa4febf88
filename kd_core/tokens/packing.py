"""Many documents on one token buffer: no padding, each document alone, attention costing the sum of their squares.

Axes: B = 1 buffer, T tokens of it, H heads, D head size, N supervised positions.

A pack lays rows end to end; positions restart with each. ``packed_attention`` is a transformers attention function that runs causal
attention document by document (documents of one length together), so neither a [T, T] mask nor T^2 work exists, and no
token can see another document. It is differentiable: training packs with it too.

An architecture that cannot be packed is known beforehand (``unpackable``) and by name: recurrent layers, biased or
soft-capped scores, attention that does not go through transformers' interface. Attention called without its documents
is an error, never a causal pass over the whole buffer.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from kd_core.errors import TeacherError
from kd_core.tokens.batches import Batch, collate, sent

__all__ = ["Documents", "Pack", "equal_length_batches", "isolated_documents", "pack_batches", "pack_rows", "unpackable"]

_NAME = "kd_documents"
_PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention"})
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


@dataclass(frozen=True)
class Documents:
    """Where documents lie in a buffer.

    Attributes:
        lengths: tokens of each document, in the buffer's order; equal lengths that are neighbours are computed together.
    """

    lengths: tuple[int, ...]

    def groups(self) -> Iterator[tuple[int, int, int]]:
        """(first token, number of documents, their length) of each run of equal lengths."""
        start = 0
        for length, run in groupby(self.lengths):
            num = sum(1 for _ in run)
            yield start, num, length
            start += num * length


@dataclass(frozen=True)
class Pack:
    """Rows on one buffer.

    Attributes:
        batch: one row of all tokens; nothing in it is padding.
        position_BT: position of each token in its own document, int64.
        documents: where they lie.
    """

    batch: Batch
    position_BT: Tensor
    documents: Documents

    def to(self, device: torch.device) -> "Pack":
        """The same pack on a device."""
        return Pack(self.batch.to(device), sent(self.position_BT, device), self.documents)

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of a model inside ``isolated_documents``."""
        return {"input_ids": self.batch.ids_BT, "position_ids": self.position_BT, "documents": self.documents, "use_cache": False}


def pack_rows(rows: Sequence[tuple[Sequence[int], int]], *, multiple: int = 1) -> Pack:
    """Lay (token ids, first supervised index) rows end to end.

    ``multiple`` rounds the buffer up by a document of token 0 that nothing reads: a CPU's matrix library keeps a compiled
    kernel for every shape it meets, and memory would grow with the number of lengths.

    >>> pack = pack_rows([([5, 6, 7], 2), ([5, 9], 1)])
    >>> pack.batch.ids_BT.tolist(), pack.position_BT.tolist(), pack.batch.labels_N.tolist()
    ([[5, 6, 7, 5, 9]], [[0, 1, 2, 0, 1]], [7, 9])
    """
    alone = [collate([row]) for row in rows]
    ids_BT, attention_BT, predict_BT = (
        torch.cat([getattr(batch, name) for batch in alone], -1) for name in ("ids_BT", "attention_BT", "predict_BT")
    )
    lengths = tuple(batch.ids_BT.shape[-1] for batch in alone)
    if fill := -sum(lengths) % multiple:
        ids_BT, attention_BT, predict_BT = (torch.nn.functional.pad(x, (0, fill)) for x in (ids_BT, attention_BT, predict_BT))
        lengths = (*lengths, fill)
    position_BT = torch.cat([torch.arange(length) for length in lengths])[None]
    labels_N = torch.cat([batch.labels_N for batch in alone])
    return Pack(Batch(ids_BT, attention_BT, predict_BT, labels_N), position_BT, Documents(lengths))


def pack_batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Indices of rows whose tokens fit a budget together (one row at least), longest rows first.

    The largest buffers come first, so a budget that does not fit the memory fails at once; equal lengths are neighbours.

    >>> list(pack_batches([2, 5, 3, 2], 6))
    [[1], [2, 0], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    tokens = 0
    for i in order:
        if batch and tokens + lengths[i] > budget_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def equal_length_batches(lengths: Sequence[int], budget_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of one length that fit a budget together (one row at least), longest first: for models that cannot be packed.

    >>> list(equal_length_batches([2, 5, 3, 2], 6))
    [[1], [2], [0, 3]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for length, run in groupby(longest_first, key=lambda i: lengths[i]):
        rows = list(run)
        together = max(1, budget_tokens // length)
        yield from (rows[start : start + together] for start in range(0, len(rows), together))


def unpackable(model: PreTrainedModel) -> str | None:
    """Why a model cannot run over packed documents; None if it can.

    Decided from the class and its configuration alone. Callers compare the first pack with an unpacked row as well.
    """
    config = model.config
    if model._is_stateful:
        return "it has recurrent layers, whose state would run from one document into the next"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it soft-caps attention scores"
    if not (model._supports_attention_backend and model._supports_sdpa and model._can_set_attn_implementation()):
        return "its attention does not go through transformers' attention interface"
    if config.is_encoder_decoder or config.sub_configs:
        return "it is not a plain text decoder"
    others = set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    if kinds & _LENGTH_DEPENDENT_ROPE:
        return "its rotary positions depend on the longest row of a batch"
    return None


@contextlib.contextmanager
def isolated_documents(model: PreTrainedModel) -> Iterator[None]:
    """Within: the model attends document by document, and must be given ``Pack.inputs()``; afterwards as before."""
    AttentionInterface.register(_NAME, packed_attention)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Documents | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document of a buffer.

    Args:
        module: the attention layer.
        query, key, value: shapes (1, H, T, D), (1, H_kv, T, D), (1, H_kv, T, D_v).
        attention_mask: always None here: transformers makes no masks for an attention it does not know.
        documents: where documents lie in T.
        scaling: factor of the scores; None is D^-1/2.
        dropout: of the attention weights.
        sliding_window: a token sees itself and the ``sliding_window - 1`` before it; None sees all before it.

    Returns:
        Shape (1, T, H, D_v), and no weights.

    Raises:
        TeacherError: the documents did not arrive, or the layer asks for something that this attention has not.
    """
    asked = [name for name in ("softcap", "s_aux", "position_bias", "cache") if others.get(name) is not None]
    name = type(module).__name__
    if documents is None or attention_mask is not None or sum(documents.lengths) != key.shape[2] or not getattr(module, "is_causal", True):
        raise TeacherError(
            f"{name} cannot run over packed documents: it did not pass on where they lie; please report this architecture, "
            "and add it to kd_core/tokens/packing.py unpackable() to score its rows by equal length"
        )
    if asked:
        raise TeacherError(f"{name} cannot run over packed documents: its attention uses {', '.join(asked)}; add it to unpackable()")
    parts = []
    for start, num, length in documents.groups():
        q, k, v = (_rows(x, start, num, length) for x in (query, key, value))
        mask = _window_mask(length, sliding_window, query.device) if sliding_window is not None and length > sliding_window else None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def _rows(heads: Tensor, start: int, num: int, length: int) -> Tensor:
    """Documents of one length as a batch: a view of shape (num, H, length, D)."""
    _, num_heads, _, size = heads.shape
    return heads[0, :, start : start + num * length].view(num_heads, num, length, size).transpose(0, 1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """True where a token may look: itself and the window - 1 before it."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)
