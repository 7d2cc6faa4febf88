"""Version 1 of the binary column of a soft-label shard: one row's targets as plain little-endian arrays after a header.

``codec.py`` writes version 3; caches hold rows of this one, and they go on being read. Ids take 32 bits. There is no
checksum here (the shard has one), and the exact tail is computed from the kept log-probabilities, which are exact.
"""

import struct

import numpy as np
import torch
from torch import Tensor

from kd_core.errors import SoftLabelError
from kd_core.softlabels.targets import Common, DenseTargets, SampledTargets, Targets, TopKTargets

__all__ = ["MAGIC", "decode"]

MAGIC = b"KDSL"
VERSION = 1
_HEADER = struct.Struct("<4sBBIIII")  # magic, version, kind, positions N, columns V, two numbers of the policy
_SAMPLED, _TOPK, _DENSE = 0, 1, 2


class _Reader:
    """Arrays off a blob, one after the other; never past its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, dtype: str, count: int) -> Tensor:
        size = np.dtype(dtype).itemsize * count
        if self.at + size > len(self.data):
            raise SoftLabelError(f"soft labels end after {len(self.data)} bytes, {self.at + size} expected; the row must be scored again")
        array = np.frombuffer(self.data, dtype, count, self.at)
        self.at += size
        return torch.from_numpy(array.astype("f4" if dtype == "<f4" else "i8" if dtype != "<f8" else "f8"))


def decode(data: bytes) -> Targets:
    """Bytes of one row back to targets.

    Raises:
        SoftLabelError: wrong magic, unknown version, short or long blob, an id outside the vocabulary, counts that do
            not sum to the number of draws.
    """
    if len(data) < _HEADER.size:
        raise SoftLabelError(f"soft labels of {len(data)} bytes are shorter than their header; the row must be scored again")
    magic, version, kind, num, columns, a, b = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or kind not in (_SAMPLED, _TOPK, _DENSE):
        raise SoftLabelError(f"not soft labels of version {VERSION}: magic {magic!r}, version {version}, kind {kind}")
    reader = _Reader(data)
    reader.at = _HEADER.size
    common = Common(reader.take("<f4", num), reader.take("<f4", num), columns)
    targets: Targets
    if kind == _SAMPLED:
        temperature = float(reader.take("<f8", 1)[0])
        offset_N, lengths = reader.take("<f4", num), reader.take("<u2", num)
        ids_E, counts_E = reader.take("<u4", b), reader.take("<u2", b)
        offsets_N1 = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        if int(offsets_N1[-1]) != b or int(counts_E.sum()) != a * num:
            raise SoftLabelError("soft labels do not add up: draws or offsets differ from the header; the row must be scored again")
        targets, ids = SampledTargets(common, temperature, a, offset_N, offsets_N1, ids_E, counts_E), ids_E
    elif kind == _TOPK:
        if b == 0:
            raise SoftLabelError("top-k soft labels without a temperature; the row must be scored again")
        temperatures = tuple(float(t) for t in reader.take("<f8", b))
        ids = reader.take("<u4", num * a).reshape(num, a)
        logprobs_NK, norm_NG = reader.take("<f4", num * a).reshape(num, a), reader.take("<f4", num * b).reshape(num, b)
        kept_NG = torch.stack([(logprobs_NK / t).exp().sum(-1) for t in temperatures], -1) * (-norm_NG).exp()
        tail_NG = torch.log1p(-kept_NG.clamp(max=1.0)) if a < columns else torch.full_like(kept_NG, -torch.inf)
        targets = TopKTargets(common, temperatures, ids, logprobs_NK, norm_NG, tail_NG)
    else:
        ids = torch.zeros(0, dtype=torch.int64)
        targets = DenseTargets(common, reader.take("<f4", num * columns).reshape(num, columns))
    if reader.at != len(data) or (len(ids) and int(ids.max()) >= columns):
        raise SoftLabelError("soft labels hold bytes beyond their arrays, or an id outside the vocabulary; the row must be scored again")
    return targets
