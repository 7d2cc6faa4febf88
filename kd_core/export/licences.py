"""The licence of a pre-trained model, as its authors state it beside the weights. Nothing is fetched, nothing is guessed."""

import mmap
import struct
from pathlib import Path

import yaml

from kd_core.recipe import ModelRef
from kd_core.teacher.reference import locate

__all__ = ["model_licence"]

_CARD = "README.md"
_GGUF_KEY, _GGUF_STRING = b"general.license", 8
_GGUF_LICENCE = struct.pack("<Q", len(_GGUF_KEY)) + _GGUF_KEY + struct.pack("<I", _GGUF_STRING)
_GGUF_HEADER_BYTES = 64 << 20


def model_licence(ref: ModelRef) -> str | None:
    """The licence named in a GGUF file's metadata, or in the model card of a directory or of the local hub cache; None if none is.

    Raises:
        TeacherError, RecipeError: the reference leads nowhere.
    """
    path = locate(ref)
    if path is not None and path.is_file():
        return _gguf_licence(path)
    card = _cached_card(ref) if path is None else path / _CARD
    if card is None or not card.is_file():
        return None
    return card_licence(card.read_text(encoding="utf-8", errors="replace"))


def card_licence(text: str) -> str | None:
    """The ``license`` of a model card's YAML header; of several, all.

    >>> card_licence("---\\nlicense: apache-2.0\\n---\\n# Model")
    'apache-2.0'
    """
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        header = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None  # a header that nobody can read states nothing
    found = header.get("license") if isinstance(header, dict) else None
    if isinstance(found, list):
        return ", ".join(str(item) for item in found) or None
    return str(found) if found else None


def _cached_card(ref: ModelRef) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(ref.model, _CARD, revision=ref.revision)
    return Path(found) if isinstance(found, str) else None


def _gguf_licence(path: Path) -> str | None:
    """The header's field, which stands as: key, value type, text. The package's own reader takes seconds for the vocabulary."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_GGUF_LICENCE, 0, _GGUF_HEADER_BYTES)
        if at < 0:
            return None
        at += len(_GGUF_LICENCE)
        (length,) = struct.unpack_from("<Q", data, at)
        return data[at + 8 : at + 8 + length].decode("utf-8", errors="replace") or None
