"""Bytes a token of stored soft labels, at a fidelity that is measured in the same run.

Axes: N positions, V vocabulary columns, K ids kept, E entries of sparse targets.

Ours is what the shard's packed column and its model take; the plain columns beside them (keys, token ids, statistics)
come on top, as they do for every peer. Ours also carries the gold token's log-probability and entropies; no peer here does.
"""

import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.measure import Check, Figure, Goal, at_most, figure
from benchmarks.peers import distillkit
from benchmarks.workloads import Logits
from kd_core.recipe import Sampled, TopK
from kd_core.softlabels.codec import decode_rows, encode_rows, parse_model
from kd_core.softlabels.targets import SampledTargets, Targets, TopKTargets, concatenate, make_targets

__all__ = ["Stored", "reconstruction_kl", "run", "sampled_targets", "store"]

_DRAWS_OF_THE_PEER = 50
_MAX_DRAWS = 64
_TOP_K = 128


@dataclass(frozen=True)
class Stored:
    """Rows through our codec.

    Attributes:
        rows: targets of each row, before.
        labels: gold ids of each row.
        model: bytes of the shard's model.
        blobs: bytes of each row.
        decoded: all rows' targets, after.
    """

    rows: list[Targets]
    labels: list[np.ndarray]
    model: bytes
    blobs: list[bytes]
    decoded: Targets

    @property
    def num_tokens(self) -> int:
        """Positions of all rows."""
        return sum(map(len, self.labels))

    @property
    def bytes_per_token(self) -> float:
        """Blobs and model."""
        return (len(self.model) + sum(map(len, self.blobs))) / self.num_tokens

    @property
    def model_text(self) -> str:
        """The model's share, which falls with the rows in a shard."""
        return f"{len(self.model) / self.num_tokens:.2f} B of it the model over {self.num_tokens:,} tokens"


def store(rows: list[Targets], labels: list[np.ndarray]) -> Stored:
    """Encode and decode."""
    model, blobs = encode_rows(rows, labels)
    return Stored(rows, labels, model, blobs, decode_rows(parse_model(model), blobs, labels))


# ---------------------------------------------------------------------------------------------- sampled


@dataclass(frozen=True)
class _Spread:
    """What the mean squared error of drawing from a position needs.

    Attributes:
        top_NK: the 64 largest probabilities, float64: all that can exceed 1/64.
        rest_N, rest_square_N: sums of p and p^2 over the others.
    """

    top_NK: Tensor
    rest_N: Tensor
    rest_square_N: Tensor

    def independent(self, draws: int) -> Tensor:
        """Sum over columns of p (1 - p) / draws at each position."""
        return (1.0 - self.top_NK.square().sum(-1) - self.rest_square_N) / draws

    def systematic(self, draws: int) -> Tensor:
        """Sum over columns of f (1 - f) / draws^2, f the fraction of draws * p; below p = 1/draws it is p / draws - p^2."""
        assert draws <= _MAX_DRAWS
        fraction_NK = (self.top_NK * draws).frac()
        return (fraction_NK * (1.0 - fraction_NK)).sum(-1) / draws**2 + self.rest_N / draws - self.rest_square_N


def _spread(logits: Logits) -> _Spread:
    tops, rests, squares = [], [], []
    for logits_NV, _ in logits.items():
        p_NV = torch.softmax(logits_NV, -1)
        top_NK = p_NV.topk(_MAX_DRAWS, -1).values.double()
        tops.append(top_NK / p_NV.sum(-1, dtype=torch.float64)[:, None])
        rests.append((1.0 - tops[-1].sum(-1)).clamp(min=0.0))
        squares.append((p_NV.square().sum(-1, dtype=torch.float64) - top_NK.square().sum(-1)).clamp(min=0.0))
    return _Spread(torch.cat(tops), torch.cat(rests), torch.cat(squares))


def _least_draws(spread: _Spread) -> int:
    """The smallest N whose systematic draws have a mean squared error no larger than 50 independent ones."""
    bound = float(spread.independent(_DRAWS_OF_THE_PEER).mean())
    return next(n for n in itertools.count(1) if float(spread.systematic(n).mean()) <= bound)


def sampled_targets(logits: Logits, draws: int) -> list[Targets]:
    """N systematic draws at T = 1, a row each."""
    policy = Sampled(kind="sampled", num_draws=draws, temperature=1.0)
    generator = torch.Generator().manual_seed(draws)
    return [
        make_targets(logits_NV, labels_N, policy, uniform_N=torch.rand(len(labels_N), generator=generator, dtype=torch.float64))
        for logits_NV, labels_N in logits.items()
    ]


def _drawn_error(logits: Logits, rows: list[Targets]) -> Tensor:
    """Squared error of the stored counts against the distribution, summed over columns, at each position."""
    found = []
    for (logits_NV, _), targets in zip(logits.items(), rows, strict=True):
        assert isinstance(targets, SampledTargets)
        p_NV = torch.softmax(logits_NV, -1)
        position_E = torch.repeat_interleave(torch.arange(len(p_NV)), targets.offsets_N1.diff())
        q_E, p_E = targets.counts_E.double() / targets.num_draws, p_NV[position_E, targets.ids_E].double()
        square_N = p_NV.square().sum(-1, dtype=torch.float64)
        found.append(square_N.index_add(0, position_E, q_E.square() - 2 * q_E * p_E))
    return torch.cat(found)


def _independent_entries(logits: Logits) -> list[tuple[np.ndarray, np.ndarray]]:
    """Distinct ids and counts of 50 independent draws, position by position."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for logits_NV, _ in logits.items():
        drawn_ND = torch.multinomial(torch.softmax(logits_NV, -1), _DRAWS_OF_THE_PEER, replacement=True, generator=generator)
        found += [np.unique(drawn, return_counts=True) for drawn in drawn_ND.numpy()]
    return found


def _entries(targets: SampledTargets) -> list[Tensor]:
    """Offsets, ids and counts, a position's ids rising: their order says nothing."""
    position_E = torch.repeat_interleave(torch.arange(len(targets.offsets_N1) - 1), targets.offsets_N1.diff())
    order_E = torch.argsort(position_E * targets.common.num_columns + targets.ids_E)
    return [targets.offsets_N1, targets.ids_E[order_E], targets.counts_E[order_E]]


def _sampled_check(stored: Stored, expected_N: Tensor, drawn_N: Tensor, bound: float) -> Check:
    """Entries decoded exactly, and the draws' measured error is what the formula says, within four standard errors."""
    before, after = concatenate(stored.rows), stored.decoded
    assert isinstance(before, SampledTargets)
    assert isinstance(after, SampledTargets)
    pairs = zip(_entries(before), _entries(after), strict=True)
    same = all(torch.equal(x.long(), y.long()) for x, y in pairs)
    exact_N = before.common.gold_logprob_N
    gold = bool(((exact_N - after.common.gold_logprob_N).abs() <= 1 / 240 - exact_N / 60).all())
    measured, expected = float(drawn_N.mean()), float(expected_N.mean())
    agrees = abs(measured - expected) <= 4 * float((drawn_N - expected_N).std()) / len(drawn_N) ** 0.5
    text = (
        f"entries equal: {same}; gold log-probability -x within 1/250 + x/60: {gold}; squared error {expected:.5f} (drawn {measured:.5f}) "
        f"against {bound:.5f}; {len(before.ids_E) / len(drawn_N):.1f} ids a token; {stored.model_text}"
    )
    return Check(text, same and agrees and gold)


def _sampled(logits: Logits, spread: _Spread, draws: int, *, goal: Goal | None) -> tuple[list[Figure], Stored]:
    stored = store(sampled_targets(logits, draws), logits.labels)
    bound = float(spread.independent(_DRAWS_OF_THE_PEER).mean())
    check = _sampled_check(stored, spread.systematic(draws), _drawn_error(logits, stored.rows), bound)
    peer = _independent_entries(logits)
    whole = concatenate(stored.rows)
    assert isinstance(whole, SampledTargets)
    splits = whole.offsets_N1[1:-1].numpy()
    ids = np.split(whole.ids_E.numpy(), splits)
    probabilities = np.split((whole.counts_E / draws).numpy(), splits)
    distinct = sum(len(found) for found, _ in peer) / len(peer)
    peers = {
        f"3 bytes an entry, 50 independent draws, {distinct:.1f} ids (Sparse Logit Sampling)": 3 * distinct,
        "Parquet int32 + float16, zstd, same entries": _parquet_bytes(ids, probabilities) / stored.num_tokens,
    }
    name = f"bytes a token, sampled N = {draws}, {logits.name}, V = {logits.num_columns:,}"
    return [_bytes_figure(name, stored, check, peer, value, goal) for peer, value in peers.items()], stored


def _bytes_figure(name: str, stored: Stored, check: Check, peer: str, value: float | None, goal: Goal | None) -> Figure:
    return figure(name, stored.bytes_per_token, "B", check, less_is_better=True, peer=peer, peer_value=value, goal=goal)


def _parquet_bytes(ids: Iterable[np.ndarray], values: Iterable[np.ndarray]) -> int:
    """File size of one position a row: list<int32>, list<float16>, zstd."""
    table = pa.table(
        {
            "ids": pa.array([i.astype(np.int32) for i in ids], pa.list_(pa.int32())),
            "values": pa.array([v.astype(np.float16) for v in values], pa.list_(pa.float16())),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return len(buffer.getvalue())


# ---------------------------------------------------------------------------------------------- topk


def _topk_rows(logits: Logits, temperatures: tuple[float, ...]) -> list[Targets]:
    policy = TopK(kind="topk", k=_TOP_K, temperatures=temperatures)
    return [make_targets(x_NV, y_N, policy, uniform_N=torch.zeros(len(y_N), dtype=torch.float64)) for x_NV, y_N in logits.items()]


def reconstruction_kl(exact_NK: Tensor, found_NK: Tensor, tail_N: Tensor) -> float:
    """Mean KL(teacher || stored) over the ids kept, the tail granted exactly to everyone.

    (1 - tail) * KL(softmax_k exact || softmax_k found): what is lost by quantising or fitting log-probabilities, nats.
    """
    exact_NK, found_NK = torch.log_softmax(exact_NK.double(), -1), torch.log_softmax(found_NK.double(), -1)
    kept_N = -torch.expm1(tail_N.double())
    return float((kept_N * (exact_NK.exp() * (exact_NK - found_NK)).sum(-1)).mean())


def _by_id(ids_NK: Tensor, logprobs_NK: Tensor, found_ids_NK: Tensor, found_NK: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Log-probabilities of both in the order of the ids, and whether the ids are the same sets."""
    order, found_order = ids_NK.argsort(-1), found_ids_NK.argsort(-1)
    same = torch.equal(ids_NK.gather(-1, order), found_ids_NK.gather(-1, found_order).long())
    return logprobs_NK.gather(-1, order), found_NK.gather(-1, found_order), same


def _topk_check(stored: Stored) -> tuple[Check, TopKTargets]:
    before, after = concatenate(stored.rows), stored.decoded
    assert isinstance(before, TopKTargets)
    assert isinstance(after, TopKTargets)
    exact_NK, found_NK, same = _by_id(before.ids_NK, before.logprobs_NK, after.ids_NK, after.logprobs_NK)
    kls = [reconstruction_kl(exact_NK / t, found_NK / t, before.log_tail_NG[:, g]) for g, t in enumerate(before.temperatures)]
    told = ", ".join(f"{kl:.1e} at T = {t:g}" for kl, t in zip(kls, before.temperatures, strict=True))
    exact = torch.equal(before.log_tail_NG, after.log_tail_NG)
    exact &= torch.allclose(before.log_normalizer_NG, after.log_normalizer_NG, rtol=0, atol=1e-6)  # at T = 1 it is zero but for rounding
    text = f"ids equal: {same}; KL {told}; tails and normalisers equal: {exact}; {stored.model_text}"
    return Check(text, same and exact and max(kls) <= 2e-4), before


def _topk(logits: Logits, *, goal: Goal | None) -> tuple[list[Figure], Stored]:
    stored = store(_topk_rows(logits, (1.0,)), logits.labels)
    check, exact = _topk_check(stored)
    name = f"bytes a token, topk k = {_TOP_K}, {logits.name}, V = {logits.num_columns:,}"

    def against(peer: str, value: float | None) -> Figure:
        return _bytes_figure(name, stored, check, peer, value, goal)

    figures = [
        against(
            "Parquet int32 + float16, zstd, same entries",
            _parquet_bytes(exact.ids_NK.numpy(), exact.logprobs_NK.numpy()) / len(exact.ids_NK),
        )
    ]
    for setting in distillkit.SETTINGS:
        label = f"DistillKit {setting.name}, k = {setting.k}"
        figures.append(against(f"{label}, formula", setting.formula_bytes(logits.num_columns)))
        figures.append(against(*_by_their_code(setting, label, exact)))
    grid = store(_topk_rows(logits, (1.0, 2.0, 4.0)), logits.labels)
    figures.append(
        figure(f"{name}, exact at T = 1, 2 and 4", grid.bytes_per_token, "B", _topk_check(grid)[0], peer="no peer stores a second T")
    )
    return figures, stored


def _by_their_code(setting: distillkit.Setting, label: str, exact: TopKTargets) -> tuple[str, float | None]:
    reason = distillkit.why_not()
    if reason is not None:
        return f"{label}, its code: {reason}", None
    theirs = distillkit.code(setting, exact.common.num_columns)
    ids_NK, logprobs_NK = exact.ids_NK[:, : setting.k], exact.logprobs_NK[:, : setting.k]
    packed = theirs.encode(ids_NK, logprobs_NK)
    found_ids_NK, found_NK = theirs.decode(packed)
    exact_NK, found_NK, same = _by_id(ids_NK, logprobs_NK, found_ids_NK, found_NK)
    tail_N = torch.log1p(-logprobs_NK.double().exp().sum(-1).clamp(max=1.0))
    kl = reconstruction_kl(exact_NK, found_NK, tail_N)
    size = sum(column.nbytes for column in packed.values()) / len(ids_NK)
    return f"{label}, its code: KL {kl:.1e}, ids equal: {same}", size


# ---------------------------------------------------------------------------------------------- all


def run(logits: Logits, *, has_goal: bool) -> tuple[list[Figure], Stored, Stored]:
    """All figures of one workload, and its sampled and topk rows for those who time the codec."""
    spread = _spread(logits)
    least = _least_draws(spread)
    figures, sampled = _sampled(logits, spread, least, goal=at_most(16) if has_goal else None)
    if least != 25:
        figures += _sampled(logits, spread, 25, goal=None)[0]
    found, topk = _topk(logits, goal=at_most(172) if has_goal else None)
    return figures + found, sampled, topk
