"""Soft labels as they are stored: bytes and speed beside plain float16 logits, and the training step that reads them.

Teacher logits are synthetic (Zipf, shuffled ids): no figure here speaks of a real teacher.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.measure import Figure, in_turn
from kd_core.losses import StepWeights, supervised_loss
from kd_core.recipe import Sampled, SoftLabels, TopK
from kd_core.softlabels import Targets, decode, encode, make_targets

__all__ = ["run"]


def _zipf_logits(positions: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(columns, generator=generator) for _ in range(positions)])
    return -1.5 * torch.log(ranks.float() + 1.0) + 0.3 * torch.randn(positions, columns, generator=generator)


def _parquet_bytes(blobs: list[bytes]) -> int:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"targets": pa.array(blobs, pa.binary())}), buffer, compression="zstd")
    return len(buffer.getvalue())


def _stored(policy: SoftLabels, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> tuple[Figure, Targets]:
    uniform_N = torch.rand(len(labels_N), dtype=torch.float64)
    targets = make_targets(logits_NV, labels_N, policy, uniform_N=uniform_N)
    ours = _parquet_bytes([encode(targets)]) / len(labels_N)
    peer = _parquet_bytes([logits_NV.half().numpy().tobytes()]) / len(labels_N)
    exact = torch.equal(decode(encode(targets)).common.gold_logprob_N, targets.common.gold_logprob_N)
    name = f"bytes a position, {policy.kind}, V = {logits_NV.shape[-1]:,}"
    ratio = peer / ours
    return Figure(name, ours, "B", "all logits in float16, zstd", peer, ratio, None, None, f"decoded bit for bit: {exact}"), targets


def _round_trip(targets: Targets, repeats: int) -> list[Figure]:
    blob, positions = encode(targets), len(targets.common.gold_logprob_N)
    writing, reading = in_turn(lambda: encode(targets), lambda: decode(blob), repeats=repeats)
    return [
        Figure("encode, sampled", positions / writing, "tokens/s", "", None, None, None, None, "one core"),
        Figure("decode, sampled", positions / reading, "tokens/s", "", None, None, None, None, "one core"),
    ]


def _loss(targets: Targets, labels_N: torch.Tensor, columns: int, repeats: int) -> Figure:
    """Loss and gradient to the logits: cross-entropy with sampled soft labels beside cross-entropy alone."""
    logits_NV = torch.randn(len(labels_N), columns, requires_grad=True)

    def step(weights: StepWeights, found: Targets | None) -> torch.Tensor:
        logits_NV.grad = None
        loss, _ = supervised_loss(logits_NV, labels_N, found, weights)
        loss.backward()
        return loss

    soft, hard = StepWeights(0.5, 0.5, 1.0), StepWeights(1.0, 0.0, 1.0)
    ours, peer = in_turn(lambda: step(soft, targets), lambda: step(hard, None), repeats=repeats)
    finite = bool(torch.isfinite(step(soft, targets)))
    ratio = peer / ours
    return Figure("loss with soft labels", ours, "s", "cross-entropy alone, same logits", peer, ratio, None, None, f"finite: {finite}")


def run(*, quick: bool) -> list[Figure]:
    """All figures of this module."""
    torch.set_num_threads(1)
    positions, columns, repeats = (128, 49_152, 3) if quick else (512, 49_152, 7)
    logits_NV = _zipf_logits(positions, columns)
    labels_N = logits_NV.argmax(-1)
    sampled, targets = _stored(Sampled(kind="sampled", num_draws=25, temperature=1.0), logits_NV, labels_N)
    topk, _ = _stored(TopK(kind="topk", k=128, temperatures=(1.0,)), logits_NV, labels_N)
    return [sampled, topk, *_round_trip(targets, repeats), _loss(targets, labels_N, columns, repeats)]
