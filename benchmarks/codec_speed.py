"""Tokens a second a core through the codec, beside DistillKit's own code where it is at hand, or beside raw arrays."""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.measure import Check, Figure, Goal, at_least, figure, in_turn, timings
from benchmarks.peers import distillkit
from benchmarks.stored_bytes import Stored, store
from kd_core.softlabels.codec import decode_rows, encode_rows, parse_model
from kd_core.softlabels.targets import SampledTargets, TopKTargets, concatenate

__all__ = ["run"]

_PEER_POSITIONS = 512
"""Positions a call of the peer: what it unpacks to takes k * bits * 8 bytes a position."""


def run(sampled: Stored, topk: Stored, *, positions: int, repeats: int) -> list[Figure]:
    """Decode and encode, for both policies.

    The peer decodes and encodes k = 128 in both cases: it has no other sparse form. Its formats differ from ours in
    fidelity, which the figures of bytes a token state.

    Args:
        sampled, topk: rows of each policy.
        positions: at least so many are coded a call, rows repeated: what is paid once a call must not decide.
        repeats: of each side.
    """
    sampled, topk = _repeated(sampled, positions), _repeated(topk, positions)
    exact = concatenate(topk.rows)
    assert isinstance(exact, TopKTargets)
    peer_name, peer_encode, peer_decode, peer_positions = _peer(exact)
    figures = []
    for kind, stored, goals in (("sampled", sampled, (at_least(1e6), at_least(1e5))), ("topk k = 128", topk, (None, None))):
        entries = _entries(stored)
        reparsed = parse_model(stored.model)
        check = Check(f"{entries:.1f} ids a token; encoded twice alike and decoded alike: {_same(stored)}", _same(stored))
        for verb, goal, ours, theirs in (
            ("decode", goals[0], lambda s=stored, m=reparsed: decode_rows(m, s.blobs, s.labels), peer_decode),
            ("encode", goals[1], lambda s=stored: encode_rows(s.rows, s.labels), peer_encode),
        ):
            figures.append(_rate(f"{verb}, {kind}", stored.num_tokens, ours, (peer_name, theirs, peer_positions), check, goal, repeats))
    return figures


def _repeated(stored: Stored, positions: int) -> Stored:
    again = -(-positions // stored.num_tokens)
    return store(stored.rows * again, stored.labels * again)


def _rate(
    name: str,
    positions: int,
    ours: Callable[[], object],
    peer: tuple[str, Callable[[], object], int],
    check: Check,
    goal: Goal | None,
    repeats: int,
) -> Figure:
    mine, theirs = in_turn(ours, peer[1], repeats=repeats)
    told = Check(f"{check.text}; {timings(mine, theirs)}", check.ok)
    return figure(name, positions / mine.process, "tokens/s", told, peer=peer[0], peer_value=peer[2] / theirs.process, goal=goal)


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
