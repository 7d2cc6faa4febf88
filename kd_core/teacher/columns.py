"""How many columns a stored teacher has, from its files' headers: what bytes are estimated with before it is loaded.

Importable without torch. An upper bound: weights may hold more rows than the tokenizer has tokens; the finished
teacher's record holds the exact number.
"""

import json
import mmap
import struct
from pathlib import Path

from kd_core.errors import TeacherError
from kd_core.recipe import ModelRef
from kd_core.teacher.reference import locate

__all__ = ["stored_columns"]

_GGUF_TOKENS = b"tokenizer.ggml.tokens"
_ARRAY_OF_STRINGS = (9, 8)


def stored_columns(ref: ModelRef) -> int | None:
    """Vocabulary columns of a model whose files are on this machine; None for a hub id, or where no header tells.

    Raises:
        TeacherError: pkg:// names what is not there, or config.json is not JSON.
    """
    path = locate(ref)
    if path is None:
        return None
    return _gguf_columns(path) if path.is_file() else _config_columns(path / "config.json")


def _config_columns(path: Path) -> int | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise TeacherError(f"{path}: not JSON ({error}); fetch it again") from error
    found = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return None if found is None else int(found)


def _gguf_columns(path: Path) -> int | None:
    """Length of the token list, which the header holds as: key, array, strings, count."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_GGUF_TOKENS)
        if at < 0:
            return None
        *kinds, count = struct.unpack_from("<IIQ", data, at + len(_GGUF_TOKENS))
        return int(count) if tuple(kinds) == _ARRAY_OF_STRINGS else None
