"""Students: from a config, from the teacher's own blocks, or pre-trained.

A student comes back in float32, trainable, on the CPU; the training loop moves it.
"""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kd_core.errors import RecipeError, TeacherError
from kd_core.recipe import Architecture
from kd_core.teacher.models import LoadedModel
from kd_core.tokens import num_columns

__all__ = ["new_model", "student_from_blocks"]


def new_model(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A Llama with random weights, tied embeddings, and exactly the tokenizer's columns."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=num_columns(tokenizer),
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads or architecture.num_heads,
        intermediate_size=architecture.intermediate_size,
        max_position_embeddings=architecture.max_positions,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def student_from_blocks(teacher: LoadedModel, every_nth_block: int) -> PreTrainedModel:
    """Blocks 0, n, 2n ... of the teacher, with its embeddings, final norm and head.

    Raises:
        RecipeError: the teacher has not that many blocks.
        TeacherError: the architecture keeps its blocks somewhere else than in ``layers``.
    """
    blocks = getattr(teacher.model.base_model, "layers", None)
    if blocks is None:
        raise TeacherError(
            f"student.kind: from_teacher cannot find the blocks of a {type(teacher.model).__name__}; use student.kind: config"
        )
    if every_nth_block >= len(blocks):
        raise RecipeError(
            f"student.every_nth_block: {every_nth_block}, and the teacher has {len(blocks)} blocks; use at most {len(blocks) - 1}"
        )
    student = copy.deepcopy(teacher.model).float()
    kept = list(range(0, len(blocks), every_nth_block))
    student.base_model.layers = torch.nn.ModuleList(student.base_model.layers[i] for i in kept)
    for position, block in enumerate(student.base_model.layers):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    return student.requires_grad_(True)
