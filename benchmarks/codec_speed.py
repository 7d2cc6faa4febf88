"""Tokens a second a core through the codec, beside DistillKit's own code where it is at hand, or beside raw arrays."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.measure import Check, Figure, Goal, figure, in_turn, timings
from benchmarks.peers import distillkit
from benchmarks.stored_bytes import Stored, store
from kd_core.softlabels.codec import decode_rows, encode_rows, parse_model
from kd_core.softlabels.targets import SampledTargets, TopKTargets, concatenate

__all__ = ["Coded", "run"]

_PEER_POSITIONS = 512
"""Positions a call of the peer: what it unpacks to takes k * bits * 8 bytes a position."""


@dataclass(frozen=True)
class Coded:
    """Rows to time: what they are, and the least tokens a second aimed at for decoding and encoding them."""

    name: str
    stored: Stored
    decode: Goal | None
    encode: Goal | None


def run(coded: list[Coded], *, positions: int, repeats: int) -> list[Figure]:
    """Decode and encode, one core.

    The peer decodes and encodes k = 128 in all cases: it has no other sparse form. Its formats differ from ours in
    fidelity, which the figures of bytes a token state.

    Args:
        coded: rows, at least one of them of the topk policy.
        positions: at least so many are coded a call, rows repeated: what is paid once a call must not decide.
        repeats: of each side.
    """
    exact = next(whole for each in coded if isinstance(whole := concatenate(each.stored.rows), TopKTargets))
    peer_name, peer_encode, peer_decode, peer_positions = _peer(exact)
    figures = []
    for each in coded:
        stored = _repeated(each.stored, positions)
        same = _same(stored)
        check = Check(f"{_entries(stored):.1f} ids a token; encoded twice alike and decoded alike: {same}", same)
        model = parse_model(stored.model)
        for verb, goal, ours, theirs in (
            ("decode", each.decode, lambda s=stored, m=model: decode_rows(m, s.blobs, s.labels), peer_decode),
            ("encode", each.encode, lambda s=stored: encode_rows(s.rows, s.labels), peer_encode),
        ):
            mine, peer = in_turn(ours, theirs, repeats=repeats)
            told = Check(f"{check.text}; {timings(mine, peer)}", check.ok)
            rates = stored.num_tokens / mine.process, peer_positions / peer.process
            figures.append(figure(f"{verb}, {each.name}", rates[0], "tokens/s", told, peer=peer_name, peer_value=rates[1], goal=goal))
    return figures


def _repeated(stored: Stored, positions: int) -> Stored:
    again = -(-positions // stored.num_tokens)
    return store(stored.rows * again, stored.labels * again)


def _entries(stored: Stored) -> float:
    whole = stored.decoded
    num = len(whole.ids_E) if isinstance(whole, SampledTargets) else whole.ids_NK.numel() if isinstance(whole, TopKTargets) else 0
    return num / stored.num_tokens


def _same(stored: Stored) -> bool:
    model, blobs = encode_rows(stored.rows, stored.labels)
    again, first = decode_rows(parse_model(model), blobs, stored.labels), stored.decoded
    ids = [
        whole.ids_E if isinstance(whole, SampledTargets) else whole.ids_NK for whole in (again, first) if not hasattr(whole, "logprobs_NV")
    ]
    return blobs == stored.blobs and torch.equal(*ids)


def _peer(exact: TopKTargets) -> tuple[str, Callable[[], object], Callable[[], object], int]:
    """(name, encode, decode, positions a call)."""
    ids_NK, logprobs_NK = exact.ids_NK[:_PEER_POSITIONS], exact.logprobs_NK[:_PEER_POSITIONS]
    reason = distillkit.why_not()
    if reason is None:
        setting = distillkit.SETTINGS[1]
        theirs = distillkit.code(setting, exact.common.num_columns)
        packed = theirs.encode(ids_NK, logprobs_NK)
        name = f"DistillKit {setting.name}, k = {setting.k}, its code"
        return name, lambda: theirs.encode(ids_NK, logprobs_NK), lambda: theirs.decode(packed), len(ids_NK)
    ids, values = exact.ids_NK.numpy(), exact.logprobs_NK.numpy()
    raw_ids, raw_values = ids.astype("<i4").tobytes(), values.astype("<f2").tobytes()

    def decode() -> object:
        return torch.from_numpy(np.frombuffer(raw_ids, "<i4").astype(np.int64)), torch.from_numpy(
            np.frombuffer(raw_values, "<f2").astype(np.float32)
        )

    def encode() -> object:
        return ids.astype("<i4").tobytes(), values.astype("<f2").tobytes()

    return f"raw int32 + float16, k = 128; DistillKit {reason}", encode, decode, len(ids)
