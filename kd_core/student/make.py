"""Students: from a config, from the teacher's own blocks and width, or pre-trained.

A student comes back in float32, trainable, on the CPU; the training loop moves it. Its embedding has no ``padding_idx``:
padding never reaches a loss, and where the padding token is the end token too, that token must go on learning.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from kd_core.recipe import Architecture, StudentFromTeacher
from kd_core.student.activations import measure, most_important
from kd_core.student.shrink import keep_everything, shrunk_config, shrunk_weights
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow
from kd_core.tokens.encoding import num_columns

__all__ = ["new_config", "new_model", "student_from_blocks", "student_from_teacher", "trainable"]


def new_config(architecture: Architecture, num_columns: int) -> LlamaConfig:
    """The config of a Llama made from scratch; its special tokens are nobody's yet."""
    return LlamaConfig(
        vocab_size=num_columns,
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads or architecture.num_heads,
        intermediate_size=architecture.intermediate_size,
        max_position_embeddings=architecture.max_positions,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def new_model(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A Llama with random weights, tied embeddings, and exactly the tokenizer's columns."""
    torch.manual_seed(seed)
    config = new_config(architecture, num_columns(tokenizer))
    config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id != tokenizer.eos_token_id:  # the row of a padding token starts at zero: not that of the end token
        config.pad_token_id = tokenizer.pad_token_id
    model = LlamaForCausalLM(config)
    model.config.pad_token_id = tokenizer.pad_token_id
    return trainable(model)


def student_from_blocks(teacher: LoadedModel, every_nth_block: int) -> PreTrainedModel:
    """Blocks 0, n, 2n ... of the teacher, with its embeddings, final norm and head; see ``student_from_teacher``."""
    return student_from_teacher(teacher, StudentFromTeacher(kind="from_teacher", every_nth_block=every_nth_block), rows=lambda num_rows: ())


def student_from_teacher(teacher: LoadedModel, spec: StudentFromTeacher, *, rows: Callable[[int], Sequence[TokenRow]]) -> PreTrainedModel:
    """The teacher's chosen blocks and width, with its embeddings, final norm and head. The teacher is left alone.

    Args:
        teacher: of a family that ``shrink`` knows.
        spec: what is kept.
        rows: gives at most so many rows to measure activations on; called only where ``spec.narrower`` is there.

    Raises:
        RecipeError: another family, or a size that this teacher cannot give.
    """
    theirs = teacher.model.config
    config = shrunk_config(theirs, spec)
    blocks = spec.kept_blocks(theirs.num_hidden_layers)
    if spec.narrower is None:
        keep = keep_everything(theirs, blocks, config.num_key_value_heads)
    else:
        keep = most_important(measure(teacher, rows(spec.narrower.sample_rows), blocks), theirs, config, spec)
    weights = shrunk_weights(teacher.model.state_dict(), theirs, keep)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    config.dtype = torch.float32
    with no_init_weights():
        student = type(teacher.model)(config)
    student.load_state_dict(weights)
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.model.generation_config)
    return trainable(student)


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, every weight float32 and learning, the embedding of the padding token too."""
    model.float().requires_grad_(True)
    model.get_input_embeddings().padding_idx = None
    return model
