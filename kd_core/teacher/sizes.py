"""How many parameters a model has, without loading it: from an architecture, or from the headers of its files.

Owns the arithmetic and the two header formats (safetensors, GGUF). Importable without torch: the plan needs it. A hub
model that is not on this machine has no size here.
"""

import json
import math
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_core.errors import TeacherError
from kd_core.recipe import Architecture, ModelRef
from kd_core.teacher.reference import locate

__all__ = ["Size", "llama_size", "stored_size"]

_BLOCK = re.compile(r"\b(?:layers|blk)\.([0-9]+)\.")
_BUFFERS = ("rope_freqs.weight",)  # GGUF stores it beside the parameters


@dataclass(frozen=True)
class Size:
    """Parameters by place.

    Attributes:
        outside: embeddings, final norm, head; tied ones once.
        blocks: of each block, in order.
    """

    outside: int
    blocks: tuple[int, ...]

    def parameters(self, blocks: Sequence[int] | None = None) -> int:
        """All of them, or with some of the blocks.

        >>> Size(10, (1, 2, 4)).parameters(), Size(10, (1, 2, 4)).parameters([0, 2])
        (17, 15)
        """
        return self.outside + sum(self.blocks if blocks is None else (self.blocks[i] for i in blocks))


def llama_size(architecture: Architecture, num_columns: int) -> Size:
    """Exact size of a Llama-style model with tied embeddings.

    A block has 2 H^2 + 2 H K (attention) + 3 H F (gated feed-forward) + 2 H (norms), with K = key-value heads * head size.

    Args:
        architecture: the recipe's.
        num_columns: rows of the embedding: the tokenizer's columns.
    """
    hidden, heads = architecture.hidden_size, architecture.num_heads
    key_value = (architecture.num_kv_heads or heads) * (hidden // heads)
    block = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * architecture.intermediate_size + 2 * hidden
    return Size(num_columns * hidden + hidden, (block,) * architecture.num_layers)


def stored_size(ref: ModelRef) -> Size | None:
    """Size of a model whose files are on this machine, from their headers; None for a hub id.

    Raises:
        TeacherError: pkg:// names what is not there, or a header is not of its format.
    """
    path = locate(ref)
    if path is None:
        return None
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    outside, blocks = 0, dict[int, int]()
    for file in files:
        for name, count in _gguf_tensors(file) if file.suffix == ".gguf" else _safetensors(file):
            if block := _BLOCK.search(name):
                blocks[int(block[1])] = blocks.get(int(block[1]), 0) + count
            elif name not in _BUFFERS:
                outside += count
    return Size(outside, tuple(blocks[i] for i in sorted(blocks)))


def _safetensors(path: Path) -> Iterator[tuple[str, int]]:
    """(name, elements) of every tensor. Header: its length (u64), then JSON."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        except (ValueError, struct.error) as error:
            raise TeacherError(f"{path}: not a safetensors file ({error}); fetch it again") from error
    yield from ((name, math.prod(tensor["shape"])) for name, tensor in header.items() if name != "__metadata__")


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF's value types of fixed width
_STRING, _ARRAY = 8, 9


class _Gguf:
    """Walks a GGUF header. The package's own reader takes seconds for a vocabulary that nobody asked for."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return int(value)

    def text(self) -> bytes:
        length = self.number("Q")
        self.at += length
        return self.data[self.at - length : self.at]

    def skip(self, kind: int, count: int = 1) -> None:
        if kind in _WIDTHS:
            self.at += _WIDTHS[kind] * count
            return
        for _ in range(count):
            if kind == _STRING:
                self.text()
            elif kind == _ARRAY:
                self.skip(self.number("I"), self.number("Q"))
            else:
                raise ValueError(f"value type {kind}")


def _gguf_tensors(path: Path) -> Iterator[tuple[str, int]]:
    """(name, elements) of every tensor."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            if data[:4] != b"GGUF":
                raise ValueError(f"it starts with {data[:4]!r}")
            header = _Gguf(data)
            header.at = 8  # magic and version
            tensors, values = header.number("Q"), header.number("Q")
            for _ in range(values):
                header.text()
                header.skip(header.number("I"))
            for _ in range(tensors):
                name = header.text().decode()
                shape = [header.number("Q") for _ in range(header.number("I"))]
                header.at += 12  # type and offset
                yield name, math.prod(shape)
        except (ValueError, struct.error) as error:
            raise TeacherError(f"{path}: not a GGUF file ({error}); install its package again") from error
