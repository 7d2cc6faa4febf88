"""Costs of a recipe's student beside its teacher, before anything is computed and without any weights.

Models are built from their configs on torch's meta device, so that the counts are those of the real classes. Reads
configs only: of a model on the hub that may fetch its config.json, never its weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from kd_core.recipe import (
    Adapter,
    PretrainedStudent,
    PretrainedTeacher,
    Recipe,
    ServerTeacher,
    StudentFromConfig,
    StudentFromTeacher,
    TrainedClassifier,
    TrainedTeacher,
)
from kd_core.student.adapters import adapter_parameters
from kd_core.student.make import new_config
from kd_core.student.shrink import head_size, shrunk_config
from kd_core.teacher.loaders import Place, empty_model, read_config
from kd_core.teacher.models import load_tokenizer
from kd_core.tokens.encoding import num_columns

__all__ = ["Description", "Figures", "describe", "model_figures", "teacher_config"]


@dataclass(frozen=True)
class Figures:
    """Costs of one model.

    Attributes:
        dtype: number format in which the weights are run.
        vocabulary: rows of the embeddings: tokens, and what pads them to a round number.
        parameters: distinct ones; tied ones count once.
        trainable_parameters: of them, or of adapters that are merged into them in the end.
        bytes: of the parameters, in that format.
        flops_a_token: of a forward pass, in matrix products with weights, the head among them: 2 a weight.
        attention_flops_a_token: what attention adds for each token of context.
        kv_cache_bytes_a_token: keys and values of all blocks, in that format; a sliding window bounds the tokens kept.
    """

    dtype: str
    vocabulary: int
    parameters: int
    trainable_parameters: int
    bytes: int
    flops_a_token: int
    attention_flops_a_token: int
    kv_cache_bytes_a_token: int


@dataclass(frozen=True)
class Description:
    """The student, and the teacher unless it is behind a server.

    Attributes:
        student, teacher: their figures.
        untrimmed: whether the student's vocabulary will be trimmed and has not been yet: its figures are then upper bounds.
    """

    student: Figures
    teacher: Figures | None
    untrimmed: bool = False

    def ratios(self) -> Mapping[str, float] | None:
        """Student / teacher of every number."""
        if self.teacher is None:
            return None
        theirs = asdict(self.teacher)
        return {name: value / theirs[name] for name, value in asdict(self.student).items() if name != "dtype"}


def describe(recipe: Recipe, *, kept_tokens: int | None = None) -> Description:
    """Figures of the recipe's student and teacher.

    Args:
        recipe: the recipe.
        kept_tokens: of a vocabulary that was trimmed; None: not yet, or not at all.

    Raises:
        RecipeError: the teacher cannot give such a student.
        TeacherError: a model's config cannot be read.
    """
    _ = recipe.text_task  # raises for a recipe whose student writes no text
    teacher = teacher_config(recipe)
    spec, dtype = recipe.student, torch.float32
    if isinstance(recipe.teacher, PretrainedTeacher):
        dtype = getattr(torch, recipe.teacher.dtype)
    if isinstance(spec, PretrainedStudent):
        student = read_config(Place.of(spec)).get_text_config()
    elif isinstance(spec, StudentFromConfig):
        student = new_config(spec.architecture, _num_columns(recipe))
    else:
        assert isinstance(spec, StudentFromTeacher) and teacher is not None, "the recipe allows no other student of text"  # noqa: PT018
        student = shrunk_config(teacher, spec)
    adapter = None if isinstance(spec, StudentFromConfig) else spec.adapter
    if kept_tokens is not None:
        student.vocab_size = kept_tokens
        student.bos_token_id = student.eos_token_id = student.pad_token_id = None  # ids of the full vocabulary; no weight depends on them
    figures = None if teacher is None else model_figures(teacher, dtype, trust_remote_code=recipe.trusts_code)
    return Description(model_figures(student, torch.float32, adapter), figures, spec.vocabulary is not None and kept_tokens is None)


def teacher_config(recipe: Recipe) -> PretrainedConfig | None:
    """The teacher's text config; None for a server teacher.

    Raises:
        TeacherError: it cannot be read.
    """
    match recipe.teacher:
        case TrainedTeacher():
            return new_config(recipe.teacher.architecture, _num_columns(recipe))
        case PretrainedTeacher():
            return read_config(Place.of(recipe.teacher)).get_text_config()
        case ServerTeacher() | TrainedClassifier():
            return None


def _num_columns(recipe: Recipe) -> int:
    if isinstance(recipe.teacher, TrainedTeacher):
        return len(recipe.teacher.tokenizer.alphabet) + 2
    assert isinstance(recipe.teacher, PretrainedTeacher), "the recipe allows no student of kind config beside a server teacher"
    return num_columns(load_tokenizer(recipe.teacher))


def model_figures(
    config: PretrainedConfig, dtype: torch.dtype, adapter: Adapter | None = None, *, trust_remote_code: bool = False
) -> Figures:
    """Figures of a causal language model with plain attention; of a mixture all experts count.

    Raises:
        TeacherError: the config is of no causal language model.
    """
    model = empty_model(config, trust_remote_code=trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    columns = config.num_hidden_layers * head_size(config)
    return Figures(
        dtype=str(dtype).removeprefix("torch."),
        vocabulary=config.vocab_size,
        parameters=parameters,
        trainable_parameters=parameters if adapter is None else adapter_parameters(model, adapter),
        bytes=parameters * dtype.itemsize,
        flops_a_token=2 * sum(_weights_multiplied(module) for module in model.modules()),
        attention_flops_a_token=4 * columns * config.num_attention_heads,
        kv_cache_bytes_a_token=2 * columns * kv_heads * dtype.itemsize,
    )


def _weights_multiplied(module: nn.Module) -> int:
    """Elements of a module's own matrices; an embedding is looked up and not multiplied, its use as the head is another module."""
    own: Any = () if isinstance(module, nn.Embedding) else module.parameters(recurse=False)
    return sum(p.numel() for p in own if p.ndim >= 2)
