"""Soft labels stored, read and made, beside their peers: ``python -m benchmarks.softlabels [--json] [--quick]``.

Where the real teacher or the real data are not here, stand-ins are measured, and every figure's name says on what.
"""

import sys
import time
from typing import Annotated

import torch
import typer

from benchmarks import codec_speed, memory, reading, scoring, stored_bytes
from benchmarks.measure import Check, Figure, figure, fork_server, machine, show
from benchmarks.workloads import Logits, gsm8k_rows, real_logits, real_teacher, synthetic_teacher, token_rows, zipf_logits
from kd_core.teacher.models import LoadedModel
from kd_core.train.data import TokenRow

__all__ = ["run"]


def _say(text: str) -> None:
    print(f"[{time.process_time():6.1f} s] {text}", file=sys.stderr, flush=True)


def _real(*, quick: bool) -> tuple[LoadedModel, list[TokenRow]] | str:
    """The real teacher and its rows, or why they are not measured."""
    loaded = real_teacher(quick=quick)
    if isinstance(loaded, str):
        return loaded
    rows = gsm8k_rows(loaded, 4 if quick else 128)
    return rows if isinstance(rows, str) else (loaded, rows)


def _workloads(real: tuple[LoadedModel, list[TokenRow]] | str, *, quick: bool) -> list[tuple[Logits, bool]]:
    if isinstance(real, str):
        return [(zipf_logits(2 if quick else 32, num_columns=49_152), False)]
    wide = [] if quick else [(zipf_logits(16, num_columns=151_936), False)]
    return [(real_logits(*real), True), *wide]


def run(*, quick: bool) -> list[Figure]:
    """All figures of this module."""
    torch.set_num_threads(1)
    fork_server("benchmarks.memory")
    repeats = 3 if quick else 5
    real = _real(quick=quick)
    figures, sampled, topk = stored_bytes.run(_workloads(real, quick=quick), say=_say)
    if isinstance(real, str):
        unmeasured = "bytes a token on real logits, SmolLM2-135M on GSM8K"
        figures.insert(0, figure(unmeasured, None, "B", Check(f"not run: {real}"), peer="all", goal=None))
    _say("codec speed")
    figures += codec_speed.run(sampled, topk, positions=1024 if quick else 16_384, repeats=repeats)
    _say("scoring")
    figures += _scoring(real, quick=quick)
    _say("reading")
    figures += reading.run(num_rows=256 if quick else 4096, shard_rows=512, object_rows=32 if quick else 512, repeats=repeats)
    _say("peak memory")
    return figures + memory.run(capture_rows=32 if quick else 64, read_rows=128 if quick else 4096)


def _scoring(real: tuple[LoadedModel, list[TokenRow]] | str, *, quick: bool) -> list[Figure]:
    if quick or isinstance(real, str):
        teacher = synthetic_teacher(num_layers=2, hidden_size=576, num_columns=49_152)
        rows = token_rows(8, num_columns=49_152, mean_tokens=16)
        return scoring.run(teacher, rows, label="random weights, 2 of SmolLM2's 30 blocks", repeats=2)
    loaded, rows = real
    return scoring.run(loaded, rows[:16], label="SmolLM2-135M on GSM8K", repeats=5)


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes; under a minute.")] = False,
) -> None:
    """Measure soft labels beside peers, in this process, now."""
    show([*machine(), *run(quick=quick)], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
