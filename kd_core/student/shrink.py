"""A smaller model out of a larger one's config and weights: blocks, key-value heads, query heads, channels, hidden units.

Owns which family's weights are laid out how, the student's config, and the slicing of tensors. It refuses any family it
does not know, and every size the teacher cannot give. What is worth keeping is decided in ``activations``.

Axes: H channels of the residual stream, F hidden units of a feed-forward part, D columns of a head.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kd_core.errors import RecipeError
from kd_core.recipe import StudentFromTeacher

__all__ = ["FAMILIES", "Keep", "check_family", "head_size", "keep_everything", "shrunk_config", "shrunk_weights"]

FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "smollm3")
"""``model_type`` of the architectures whose blocks are laid out as Llama's are."""

_PER_BLOCK = ("layer_types", "no_rope_layers")  # config lists with one entry a block
_AXES: dict[str, tuple[str | None, str | None]] = {  # what the rows and the columns of a matrix are
    "q_proj": ("heads", "channels"),
    "k_proj": ("kv_heads", "channels"),
    "v_proj": ("kv_heads", "channels"),
    "o_proj": ("channels", "heads"),
    "gate_proj": ("units", "channels"),
    "up_proj": ("units", "channels"),
    "down_proj": ("channels", "units"),
    "embed_tokens": (None, "channels"),
    "lm_head": (None, "channels"),
    "input_layernorm": ("channels", None),
    "post_attention_layernorm": ("channels", None),
    "pre_feedforward_layernorm": ("channels", None),
    "post_feedforward_layernorm": ("channels", None),
    "norm": ("channels", None),
    "q_norm": (None, None),
    "k_norm": (None, None),
}


@dataclass(frozen=True)
class Keep:
    """Parts of a teacher that are kept; indices rise, so that kept parts stay in their order.

    Attributes:
        blocks: numbers of the teacher's blocks.
        channels_H: channels of the residual stream.
        heads: query heads, one tensor a kept block.
        units_F: hidden units, one tensor a kept block.
        num_kv_heads: key-value heads after neighbours are averaged; None where each query head has, and takes, its own.
    """

    blocks: tuple[int, ...]
    channels_H: Tensor
    heads: Sequence[Tensor]
    units_F: Sequence[Tensor]
    num_kv_heads: int | None


def check_family(config: PretrainedConfig) -> None:
    """Refuse an architecture whose parts are not known here.

    Raises:
        RecipeError: with its name.
    """
    if config.model_type not in FAMILIES:
        raise RecipeError(
            f"student.kind: from_teacher knows the parts of {', '.join(FAMILIES)}, and the teacher is a {config.model_type!r}; "
            "use student.kind: config or pretrained"
        )


def head_size(config: PretrainedConfig) -> int:
    """Columns of a head: stated by some configs, hidden size / heads in others."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def shrunk_config(config: PretrainedConfig, spec: StudentFromTeacher) -> PretrainedConfig:
    """The student's config; the teacher's is left alone.

    Raises:
        RecipeError: another family, or a size that this teacher cannot give; the message names the field.
    """
    check_family(config)
    try:
        blocks = spec.kept_blocks(config.num_hidden_layers)
    except ValueError as error:
        raise RecipeError(f"student.{error}") from error
    student = copy.deepcopy(config)
    student.num_hidden_layers = len(blocks)
    for name in _PER_BLOCK:
        if listed := getattr(config, name, None):
            setattr(student, name, [listed[i] for i in blocks])
    width = spec.narrower
    heads, own_kv = config.num_attention_heads, config.num_key_value_heads == config.num_attention_heads
    if width is not None:
        heads = _at_most(width.num_heads, heads, "narrower.num_heads")
        student.hidden_size = _at_most(width.hidden_size, config.hidden_size, "narrower.hidden_size")
        student.intermediate_size = _at_most(width.intermediate_size, config.intermediate_size, "narrower.intermediate_size")
    if student.hidden_size != config.hidden_size and config.model_type.startswith("gemma"):
        raise RecipeError("student.narrower.hidden_size: a Gemma scales its embeddings by the width; leave the channels as they are")
    kv_heads = _at_most(spec.num_kv_heads, config.num_key_value_heads, "num_kv_heads")
    if config.num_key_value_heads % kv_heads:
        raise RecipeError(
            f"student.num_kv_heads: {kv_heads} does not divide the teacher's {config.num_key_value_heads}; neighbours are averaged"
        )
    if own_kv and spec.num_kv_heads is None:
        kv_heads = heads
    if heads % kv_heads:
        raise RecipeError(
            f"student.narrower.num_heads: {heads} is no multiple of the student's {kv_heads} key-value heads; every group keeps as many"
        )
    if student.hidden_size % heads and hasattr(config, "validate_architecture"):
        raise RecipeError(
            f"student.narrower: a {config.model_type} wants a hidden_size ({student.hidden_size}) that its num_heads ({heads}) divides"
        )
    if (heads, student.hidden_size) != (config.num_attention_heads, config.hidden_size):
        student.head_dim = head_size(config)
    student.num_attention_heads, student.num_key_value_heads = heads, kv_heads
    student.tie_word_embeddings = bool(config.tie_word_embeddings or spec.share_embeddings)
    return student


def _at_most(wanted: int | None, found: int, field: str) -> int:
    if wanted is not None and wanted > found:
        raise RecipeError(f"student.{field}: {wanted}, and the teacher has {found}; use at most {found}")
    return found if wanted is None else wanted


def keep_everything(config: PretrainedConfig, blocks: tuple[int, ...], num_kv_heads: int | None) -> Keep:
    """Keep all of the width of the named blocks."""
    heads, units_F = torch.arange(config.num_attention_heads), torch.arange(config.intermediate_size)
    return Keep(blocks, torch.arange(config.hidden_size), [heads] * len(blocks), [units_F] * len(blocks), num_kv_heads)


def shrunk_weights(weights: Mapping[str, Tensor], config: PretrainedConfig, keep: Keep) -> dict[str, Tensor]:
    """The student's weights under its own names, float32 copies.

    Args:
        weights: the teacher's, by name; any dtype.
        config: the teacher's.
        keep: what is kept.
    """
    place = {block: i for i, block in enumerate(keep.blocks)}
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        path = name.split(".")
        at = path.index("layers") + 1 if "layers" in path else None
        block = None if at is None else place.get(int(path[at]))
        if at is not None:
            if block is None:
                continue
            path[at] = str(block)
        axes = _AXES.get(path[-2])
        if axes is None:
            raise RecipeError(f"student.kind: from_teacher does not know the teacher's weight {name}; use student.kind: config")
        out = weight.detach().float().cpu()
        for dim, axis in enumerate(axes[: out.ndim]):
            out = _cut(out, dim, axis, block=block, config=config, keep=keep)
        found[".".join(path)] = out.contiguous().clone()
    return found


def _cut(tensor: Tensor, dim: int, axis: str | None, *, block: int | None, config: PretrainedConfig, keep: Keep) -> Tensor:
    if axis is None:
        return tensor
    if axis == "channels":
        return tensor.index_select(dim, keep.channels_H)
    assert block is not None, "heads and hidden units lie in a block"
    if axis == "units":
        return tensor.index_select(dim, keep.units_F[block])
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    by_head = tensor.reshape(*before, -1, head_size(config), *after)
    if axis == "heads" or keep.num_kv_heads is None:
        kept = by_head.index_select(dim, keep.heads[block])
    else:
        kept = by_head.reshape(*before, keep.num_kv_heads, -1, head_size(config), *after).mean(dim + 1)
    return kept.reshape(*before, -1, *after)
