"""The only place where files of a model become Python objects: config, tokenizer, weights. No code runs unasked.

Whoever loads says whether the repository's own code may run, True or False and never None: at None, transformers asks on the
terminal. Code that a repository borrows from another one is refused even where code may run, because nobody pinned it.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging as transformers_logging

from kd_core.errors import TeacherError
from kd_core.recipe import ModelRef, PretrainedTeacher
from kd_core.teacher.reference import locate

__all__ = [
    "UNREADABLE",
    "Place",
    "empty_model",
    "new_classifier_of",
    "one_line",
    "quiet",
    "read_classifier",
    "read_config",
    "read_model",
    "read_processor",
    "read_tokenizer",
]

UNREADABLE = (OSError, ValueError, ArithmeticError, ImportError, RuntimeError, KeyError, SafetensorError, StrictDataclassError)
"""What other libraries raise at files that are no model."""
_UNASKED = "contains custom code", "references custom code"  # transformers, about a repository whose code may not run


@dataclass(frozen=True)
class Place:
    """Where a model's files are, and whether code among them may run.

    Attributes:
        location: a directory or a hub id.
        trust_remote_code: whether the repository's code may run.
        options: what transformers is told beside it: `revision` or `gguf_file`.
    """

    location: str
    trust_remote_code: bool
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, ref: ModelRef) -> "Place":
        """Where a reference of a recipe points to; only a teacher can be trusted.

        Raises:
            TeacherError, RecipeError: see ``reference.locate``.
        """
        trusted = isinstance(ref, PretrainedTeacher) and ref.trust_remote_code
        path = locate(ref)
        if path is None:
            return cls(ref.model, trusted, {"revision": str(ref.revision)})
        return cls(str(path.parent), trusted, {"gguf_file": path.name}) if path.is_file() else cls(str(path), trusted)

    @classmethod
    def directory(cls, path: Path, *, trust_remote_code: bool) -> "Place":
        """A directory in the Hugging Face layout."""
        return cls(str(path), trust_remote_code)

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are those of a GGUF file."""
        return "gguf_file" in self.options


def read_config(place: Place) -> PretrainedConfig:
    """The config of a model, without its weights.

    Raises:
        TeacherError: it cannot be read, or needs code that may not run.
    """
    with quiet(place.location, failure=": its config cannot be read"):
        _refuse_borrowed_code(place)
        return AutoConfig.from_pretrained(place.location, trust_remote_code=place.trust_remote_code, **place.options)


def read_tokenizer(place: Place) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        TeacherError: it cannot be read, or needs code that may not run.
    """
    with quiet(place.location):
        _refuse_borrowed_code(place)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            place.location, trust_remote_code=place.trust_remote_code, **place.options
        )
    return tokenizer


def read_model(place: Place, **options: Any) -> PreTrainedModel:
    """A causal language model with its weights, of safetensors or GGUF; further options are those of transformers.

    Raises:
        TeacherError: it cannot be read, or needs code that may not run.
    """
    safe = {} if place.is_gguf else {"use_safetensors": True}
    with quiet(place.location):
        _refuse_borrowed_code(place)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            place.location, trust_remote_code=place.trust_remote_code, **place.options, **safe, **options
        )
    return model


def read_classifier(place: Place, *, images: bool, **options: Any) -> PreTrainedModel:
    """A classifier of images or texts with its weights, of safetensors; further options are those of transformers.

    Raises:
        TeacherError: it cannot be read.
    """
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    with quiet(place.location):
        _refuse_borrowed_code(place)
        model: PreTrainedModel = auto.from_pretrained(
            place.location, trust_remote_code=place.trust_remote_code, **place.options, use_safetensors=True, **options
        )
    return model


def new_classifier_of(config: PretrainedConfig, *, images: bool) -> PreTrainedModel:
    """A classifier of a config with random weights in float32, of a family that transformers knows.

    Raises:
        TeacherError: the config is of no such classifier.
    """
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    try:
        model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except UNREADABLE as error:
        raise TeacherError(one_line(error)) from error
    return model


def read_processor(place: Place, *, images: bool) -> Any:
    """What prepares a classifier's inputs: its image processor, or its tokenizer.

    Raises:
        TeacherError: it cannot be read.
    """
    if not images:
        return read_tokenizer(place)
    with quiet(place.location, failure=": its image processor cannot be loaded"):
        return AutoImageProcessor.from_pretrained(place.location, trust_remote_code=place.trust_remote_code, **place.options, backend="pil")


def empty_model(config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a config on torch's meta device: shapes without weights.

    Raises:
        TeacherError: the config is of no causal language model.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise TeacherError(f"a {config.model_type} of this config is no causal language model: {one_line(error)}") from error
    return model


def _refuse_borrowed_code(place: Place) -> None:
    """Refuse code of another repository: the recipe's revision, or the directory's checksums, do not cover it."""
    if not place.trust_remote_code or place.is_gguf:
        return
    configs = (PretrainedConfig.get_config_dict(place.location, **place.options)[0], get_tokenizer_config(place.location, **place.options))
    for config in configs:
        auto_map = config.get("auto_map") or {}
        entries = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
        names = [name for entry in entries for name in (entry if isinstance(entry, list | tuple) else [entry]) if name]
        if borrowed := sorted({str(name).partition("--")[0] for name in names if "--" in str(name)}):
            raise TeacherError(
                f"model {place.location!r}: its code is taken from {', '.join(borrowed)}, whose revision nobody pinned; copy model and "
                "code to one directory, take the names before '--' out of auto_map, and point the recipe there"
            )


@contextlib.contextmanager
def quiet(location: str, *, failure: str = " cannot be loaded") -> Iterator[None]:
    """No bars and advice of other libraries in our output; their failures become one line."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UNREADABLE as error:
        if any(words in str(error) for words in _UNASKED):
            raise TeacherError(
                f"model {location!r}{failure}: it brings code of its own, and no code runs unasked; a teacher's runs after you "
                "have read it and set teacher.trust_remote_code: true, and a student must be of a family that transformers knows"
            ) from error
        raise TeacherError(f"model {location!r}{failure}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What another library says first, without the advice below it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
