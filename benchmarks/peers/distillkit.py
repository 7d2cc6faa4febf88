"""DistillKit's log-probability compressor: its documented settings by their formula, and by its own code where a checkout is at hand.

KD_PEER_DISTILLKIT names the checkout (github.com/arcee-ai/DistillKit); without it only the formula speaks. It keeps k ids
in fixed width, the first few log-probabilities in bfloat16, and the rest as a least-squares polynomial over the rank.
"""

import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SETTINGS", "Setting", "code", "why_not"]


@dataclass(frozen=True)
class Setting:
    """One configuration: ids kept, exact bfloat16 values, polynomial terms, and whether the rank is mapped to [0, 1]."""

    name: str
    k: int
    exact_k: int
    terms: tuple[int | str, ...]
    normalize_t: bool

    def formula_bytes(self, num_columns: int) -> int:
        """Bytes a token: ids at ceil(log2 V) bits, bfloat16 values, float32 coefficients."""
        return math.ceil(self.k * math.ceil(math.log2(num_columns)) / 8) + 2 * self.exact_k + 4 * len(self.terms)


_POLYNOMIAL = (0, 1, 2, 3, 4, "sqrt")
SETTINGS = (
    Setting("recommended", 128, 16, _POLYNOMIAL, False),
    Setting("normalize_t", 128, 16, _POLYNOMIAL, True),
    Setting("budget", 50, 1, (0, 1, "sqrt"), False),
)


def why_not() -> str | None:
    """Why its own code cannot be run; None if it can."""
    if "KD_PEER_DISTILLKIT" not in os.environ:
        return "not run: set KD_PEER_DISTILLKIT to a checkout of github.com/arcee-ai/DistillKit"
    if os.environ["KD_PEER_DISTILLKIT"] not in sys.path:
        sys.path.append(os.environ["KD_PEER_DISTILLKIT"])
    try:
        import distillkit.compression.compressor  # noqa: F401
    except ImportError as error:
        return f"not run: KD_PEER_DISTILLKIT has no importable distillkit ({error})"
    return None


@dataclass(frozen=True)
class Code:
    """Its compressor for one setting."""

    compressor: Any

    def encode(self, ids_NK: Tensor, logprobs_NK: Tensor) -> dict[str, Tensor]:
        """Its packed columns for positions in falling order of probability."""
        packed: dict[str, Tensor] = self.compressor.compress_from_sparse(ids_NK[None], logprobs_NK[None])
        return packed

    def decode(self, packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Ids and float32 log-probabilities."""
        ids_1NK, logprobs_1NK = self.compressor.decompress_to_sparse(packed)
        return ids_1NK[0], logprobs_1NK[0].float()


def code(setting: Setting, num_columns: int) -> Code:
    """Its own code; call only where ``why_not`` is None."""
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    config = DistributionQuantizationConfig(
        d=num_columns,
        k=setting.k,
        exact_k=setting.exact_k,
        exact_dtype="bfloat16",
        polynomial_terms=list(setting.terms),
        term_dtype="float32",
        residual_bins=[],
        delta_encoding=False,
        error_diffusion=False,
        normalize_t=setting.normalize_t,
    )
    assert torch.log2(torch.tensor(float(num_columns))).ceil() == math.ceil(math.log2(num_columns))
    return Code(LogprobCompressor(config=config))
