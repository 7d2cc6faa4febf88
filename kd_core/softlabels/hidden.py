"""Hidden states of chosen teacher blocks at supervised positions, in int8: feature distillation without a live teacher.

Axes: N supervised positions, L chosen blocks, H hidden size, W columns kept.

The state kept for a supervised token is the one that predicts it, one position before: position n here is position n of the row's
soft labels. "Block i" is the output of the teacher's block i, counted from 0 above the embedding. Each (position, block) is
absmax / 127 int8: the error of a column is at most half a step, absmax / 254. The head does not run. A row's bytes carry their
version and a checksum; damaged bytes are refused, never read.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.recipe import HiddenStates
from kd_core.softlabels.forward import check_teacher, decoder_blocks, refused_rows, teacher_forward
from kd_core.store.versions import VERSION, expect_version
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow

__all__ = ["HiddenRow", "HiddenRows", "RowStates", "capture_hidden", "decode_states", "encode_states", "projection"]

_HEADER = struct.Struct("<4sBHII")
"""Magic, version, L, W, N; then L block numbers (u16), N * L scales (f4), N * L * W codes (i1), and the CRC-32 of all before it."""
_MAGIC = b"kdhs"
_LEVELS = 127
_PROJECTION_SEED = 20_480_731


@dataclass(frozen=True)
class RowStates:
    """States of one row.

    Attributes:
        blocks: block numbers, rising.
        codes_NLW: int8.
        scales_NL: float32, at least 0: a state is code * scale.
    """

    blocks: tuple[int, ...]
    codes_NLW: Tensor
    scales_NL: Tensor

    def states(self) -> Tensor:
        """float32, shape (N, L, W)."""
        return self.codes_NLW.float() * self.scales_NL[:, :, None]


@dataclass(frozen=True)
class HiddenRow:
    """A row's key and its states."""

    key: str
    states: RowStates


@dataclass(frozen=True)
class HiddenRows:
    """What a call captured.

    Attributes:
        captured: the rows that could be read, in the order asked.
        refused: key -> reason of every other row.
    """

    captured: tuple[HiddenRow, ...]
    refused: dict[str, str]


@torch.inference_mode()
def capture_hidden(
    loaded: LoadedModel, rows: Sequence[tuple[str, TokenRow]], *, wanted: HiddenStates, micro_batch_tokens: int
) -> HiddenRows:
    """Run the teacher's backbone over rows and keep the outputs of some blocks.

    Args:
        loaded: the teacher, in eval mode.
        rows: (key, row).
        wanted: blocks, width and how a state is reduced to it.
        micro_batch_tokens: tokens of a buffer; a longer row has a buffer of its own.

    Raises:
        TeacherError: the teacher is not in a state to be trusted.
        SoftLabelError: it has no such block or is narrower than the width, or a token is not in its vocabulary.
    """
    check_teacher(loaded)
    num_blocks, hidden_size = len(decoder_blocks(loaded.model)), loaded.model.config.get_text_config().hidden_size
    if wanted.blocks[-1] >= num_blocks:
        raise SoftLabelError(f"hidden_states.blocks: {wanted.blocks[-1]}, and the teacher's blocks are 0 to {num_blocks - 1}")
    if wanted.width is not None and wanted.width > hidden_size:
        raise SoftLabelError(f"hidden_states.width: {wanted.width}, and the teacher's states have {hidden_size} columns; use at most those")
    matrix_HW = None
    if wanted.reduce == "project" and wanted.width is not None:
        matrix_HW = projection(hidden_size, wanted.width).to(loaded.device)
    refused = refused_rows(loaded, rows)
    kept = [(key, row) for key, row in rows if key not in refused]
    captured: dict[str, HiddenRow] = {}
    run = teacher_forward(loaded, [row for _, row in kept], micro_batch_tokens=micro_batch_tokens, parity=None, blocks=wanted.blocks)
    for buffer in run:
        picked = [kept[i] for i in buffer.indices]
        states_NLH = torch.stack(buffer.blocks_LNH, 1).float()
        states_NLW = states_NLH[..., : wanted.width] if matrix_HW is None else states_NLH @ matrix_HW
        for (key, _), row_NLW in zip(picked, torch.split(states_NLW, [row.num_supervised for _, row in picked]), strict=True):
            if bool(torch.isfinite(row_NLW).all()):
                captured[key] = HiddenRow(key, _quantise(row_NLW.cpu(), wanted.blocks))
            else:
                refused[key] = "the teacher gave NaN or infinite hidden states"
    return HiddenRows(tuple(captured[key] for key, _ in rows if key in captured), refused)


def projection(hidden_size: int, width: int) -> Tensor:
    """The fixed matrix of ``reduce: project``, float32, shape (H, W): Gaussian of variance 1 / W, the same in every process, so that
    E[<x P, y P>] = <x, y>.

    Source: Johnson and Lindenstrauss 1984.
    """
    numbers = np.random.Generator(np.random.Philox(key=_PROJECTION_SEED)).standard_normal((hidden_size, width))
    return torch.from_numpy((numbers / np.sqrt(width)).astype(np.float32))


def _quantise(states_NLW: Tensor, blocks: tuple[int, ...]) -> RowStates:
    scales_NL = states_NLW.abs().amax(-1) / _LEVELS
    steps_NLW = states_NLW / torch.where(scales_NL > 0, scales_NL, 1.0)[:, :, None]
    return RowStates(blocks, steps_NLW.round().clamp(-_LEVELS, _LEVELS).to(torch.int8), scales_NL)


def encode_states(row: RowStates) -> bytes:
    """One row as bytes: N * L * (W + 4) and 2 L + 19 more."""
    num, num_blocks, width = row.codes_NLW.shape
    body = b"".join(
        [
            _HEADER.pack(_MAGIC, VERSION, num_blocks, width, num),
            np.array(row.blocks, "<u2").tobytes(),
            row.scales_NL.numpy().astype("<f4").tobytes(),
            row.codes_NLW.numpy().tobytes(),
        ]
    )
    return body + struct.pack("<I", zlib.crc32(body))


def decode_states(data: bytes) -> RowStates:
    """The inverse of ``encode_states``.

    Raises:
        SoftLabelError: the bytes are damaged or cut off.
        VersionError: they are of another version.
    """
    if len(data) < _HEADER.size + 4 or data[:4] != _MAGIC:
        raise SoftLabelError(f"{len(data)} bytes are not a row of hidden states; compute the shard's rows again")
    _, version, num_blocks, width, num = _HEADER.unpack_from(data)
    expect_version(version, "a row of hidden states")
    if struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
        raise SoftLabelError("a row of hidden states fails its checksum; compute the shard's rows again (kd cache repair)")
    at_scales = _HEADER.size + 2 * num_blocks
    at_codes = at_scales + 4 * num * num_blocks
    blocks = tuple(int(i) for i in np.frombuffer(data, "<u2", num_blocks, _HEADER.size))
    scales_NL = np.frombuffer(data, "<f4", num * num_blocks, at_scales).reshape(num, num_blocks)
    codes_NLW = np.frombuffer(data, np.int8, num * num_blocks * width, at_codes).reshape(num, num_blocks, width)
    return RowStates(blocks, torch.from_numpy(codes_NLW.copy()), torch.from_numpy(scales_NL.astype(np.float32)))
