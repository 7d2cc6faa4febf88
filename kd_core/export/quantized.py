"""The student in int8 by torchao, in the same Hugging Face layout: it loads with transformers where torchao is installed.

Weights of linear layers become int8 with one scale a row; embeddings and the head that may be tied to them stay as they
were. ``int8-dynamic`` also rounds activations to int8 while it runs; ``int8-weight-only`` computes in float.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from transformers import PreTrainedModel

from kd_core.errors import KDError
from kd_core.export.packages import hushed
from kd_core.export.parity import Bound
from kd_core.teacher.loaders import Place, read_model

__all__ = ["QUANTIZED_BOUNDS", "QUANTIZED_PACKAGES", "Quantization", "load_quantized", "quantize_directory", "settle_header"]

Quantization = Literal["int8-dynamic", "int8-weight-only"]

QUANTIZED_PACKAGES = ("torchao",)
# SmolLM2-135M-Instruct on two texts: weight-only 0.0075 on average and 0.11 at worst, dynamic 0.077 and 0.54
QUANTIZED_BOUNDS: Mapping[Quantization, Bound] = MappingProxyType(
    {"int8-weight-only": Bound(mean_kl=0.05, max_kl=1.0), "int8-dynamic": Bound(mean_kl=0.2, max_kl=2.0)}
)


def quantize_directory(directory: Path, scheme: Quantization) -> None:
    """Replace the float weights of a model directory by int8 ones; its config says how to load them.

    Raises:
        KDError: torchao refuses the model, or finds nothing in it to quantise.
    """
    try:
        with hushed():
            from transformers import TorchAoConfig

            place = Place.directory(directory, trust_remote_code=False)
            model = read_model(place, dtype="auto", quantization_config=TorchAoConfig(_torchao_config(scheme)), device_map="cpu")
            for file in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
                file.unlink()
            model.save_pretrained(directory)
        for file in directory.glob("*.safetensors"):
            settle_header(file)
    except (ValueError, RuntimeError, NotImplementedError, ImportError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise KDError(f"--quantize {scheme}: torchao cannot convert this student: {reason}; export it without --quantize") from error


def load_quantized(directory: Path) -> PreTrainedModel:
    """The int8 model as a user will load it."""
    with hushed():
        return read_model(Place.directory(directory, trust_remote_code=False), dtype="auto").eval()


def _torchao_config(scheme: Quantization) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return Int8DynamicActivationInt8WeightConfig() if scheme == "int8-dynamic" else Int8WeightOnlyConfig()


def settle_header(file: Path) -> None:
    """Write a safetensors file again with its metadata sorted: the library writes them in the order of a hash with a random seed.

    Source: https://huggingface.co/docs/safetensors#format: eight bytes of header length, the header in JSON, the data.
    """
    settled = file.with_suffix(".settled")
    with file.open("rb") as old, settled.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of eight
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 4 << 20)
    settled.replace(file)
