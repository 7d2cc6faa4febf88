"""Loading causal language models: hub id, local directory, or a GGUF file inside an installed package.

A loaded model is in eval mode, on its device, in the stated dtype; generation defaults that its authors shipped are
ignored on purpose, but for the ids that end an answer.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kd_core.errors import KDError, RecipeError, TeacherError
from kd_core.recipe import ModelRef
from kd_core.summaries import ModelIdentity
from kd_core.teacher.loaders import Place, quiet, read_model, read_tokenizer
from kd_core.tokens.encoding import num_columns, tokenizer_identity
from kd_core.tokens.templates import end_of_turn
from kd_core.tokens.token_map import TokenMap, read_token_map, write_token_map

__all__ = [
    "LoadedModel",
    "ModelFacts",
    "load_directory",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "save_model",
    "teacher_identity",
]

_LEAK = 0.01
"""Of the logits' spread: a causal model is exact but for the order of its sums."""


class ModelFacts:
    """Sizes of a model, and where it is; for dataclasses that hold one."""

    model: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def num_parameters(self) -> int:
        """Distinct parameters; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_bytes(self) -> int:
        """Bytes of the distinct parameters in their dtype."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


@dataclass(frozen=True)
class LoadedModel(ModelFacts):
    """A model that writes text, ready to run.

    Attributes:
        model: with a language-modelling head.
        tokenizer: its own.
        num_columns: logit columns that mean something.
        token_map: its ids against the tokenizer that its own was trimmed from; None where nothing was trimmed.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_columns: int
    token_map: TokenMap | None = None

    @property
    def max_positions(self) -> int | None:
        """Positions that its authors made it for; None where it has no such number."""
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: the end token, the template's end of turn, and what the model's authors shipped."""
        stops = {int(self.tokenizer.eos_token_id)}
        if self.tokenizer.chat_template:
            with contextlib.suppress(KDError):  # a template that fails is an error where the recipe uses it
                stops.add(end_of_turn(self.tokenizer))
        shipped = getattr(self.model.generation_config, "eos_token_id", None)
        if isinstance(shipped, (int, list)):
            stops |= {int(i) for i in ([shipped] if isinstance(shipped, int) else shipped)}
        return tuple(sorted(stops))


def pick_device(wanted: str) -> torch.device:
    """The torch device of run.device.

    Raises:
        RecipeError: cuda is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("run.device: cuda, and torch sees no CUDA device here; use run.device: cpu or auto")
    return torch.device("cuda" if wanted in ("auto", "cuda") and torch.cuda.is_available() else "cpu")


def load_tokenizer(source: ModelRef | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model reference, or of a directory that this project wrote.

    Args:
        source: a reference, which says itself whether its code may run, or a directory.
        trust_remote_code: whether code in that directory may run: a teacher's tokenizer brings it along.

    Raises:
        TeacherError: it cannot be loaded, needs code that may not run, or has no end token.
    """
    place = Place.directory(source, trust_remote_code=trust_remote_code) if isinstance(source, Path) else Place.of(source)
    tokenizer = read_tokenizer(place)
    if tokenizer.eos_token_id is None:
        raise TeacherError(f"model {place.location!r}: its tokenizer has no end token, so answers could not end; use another model")
    return tokenizer


def load_model(ref: ModelRef, *, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load a pre-trained model in eval mode, without gradients. Its code runs only where the reference says so.

    Raises:
        TeacherError: it cannot be loaded; the message names it and says why.
    """
    return _load(Place.of(ref), ref.dtype, device=device, tokenizer=tokenizer)


def load_directory(path: Path, *, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Load a model that this project wrote (Hugging Face layout, safetensors), in float32, with its token map if there is one.

    Code that lies there never runs: what this project trains is of families that transformers knows.
    """
    loaded = _load(Place.directory(path, trust_remote_code=False), "float32", device=device, tokenizer=tokenizer)
    return replace(loaded, token_map=read_token_map(path))


def _load(place: Place, dtype: str, *, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    model = read_model(place, dtype=getattr(torch, dtype))
    if place.is_gguf:  # de-quantised on load: a plain model from here on, and it can be saved
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    model = model.to(device).eval().requires_grad_(False)
    if not _is_causal(model):
        raise TeacherError(
            f"model {place.location!r}: its logits change with the tokens that come after, so it sees the answer it should predict; "
            f"{type(model).__name__} is an encoder: use a causal language model"
        )
    return LoadedModel(model, tokenizer, min(num_columns(tokenizer), model.config.get_text_config().vocab_size))


@torch.no_grad()
def _is_causal(model: PreTrainedModel) -> bool:
    """Whether a later token leaves what stands before it alone; an encoder loads as a language model too."""
    last = model.config.get_text_config().vocab_size - 1
    ids_BT = torch.tensor([[0, last, 0], [0, last, last]], device=model.device)
    one_TV, other_TV = model(input_ids=ids_BT, use_cache=False).logits[:, :2].float()
    broken = not bool(torch.isfinite(one_TV).all())  # said by whoever computes with it
    return broken or float((one_TV - other_TV).abs().max()) <= _LEAK * float(one_TV.std())


def save_model(loaded: LoadedModel, directory: Path) -> None:
    """Write model/ below a directory: weights and tokenizer in the Hugging Face layout, safetensors; and the token map."""
    with quiet(str(directory)):
        loaded.model.save_pretrained(directory / "model")
        loaded.tokenizer.save_pretrained(directory / "model")
    if loaded.token_map is not None:
        write_token_map(loaded.token_map, directory / "model")


def teacher_identity(loaded: LoadedModel, weights: Mapping[str, Any]) -> ModelIdentity:
    """Content identity of a teacher: weights, tokenizer and template, valid columns, dtype, engine family."""
    return ModelIdentity(
        weights=weights,
        tokenizer=tokenizer_identity(loaded.tokenizer),
        num_columns=loaded.num_columns,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        engine="transformers",
    )
