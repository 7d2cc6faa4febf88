"""Soft labels stored, read and made, beside their peers: ``python -m benchmarks.softlabels [--json] [--quick]``.

Where the real teacher or the real data are not here, stand-ins are measured, and every figure's name says on what.
"""

import functools
from enum import StrEnum
from typing import Annotated

import torch
import typer

from benchmarks import codec_speed, memory, reading, scoring, stored_bytes
from benchmarks.codec_speed import Coded
from benchmarks.measure import Check, Figure, at_least, at_most, figure, fork_server, machine, show, tell, times_better
from benchmarks.workloads import gsm8k_rows, real_logits, real_teacher, synthetic_teacher, token_rows, zipf_logits
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow

__all__ = ["Section", "run"]


Real = tuple[LoadedModel, list[TokenRow]] | str
"""The real teacher and its rows, or why they are not measured."""


class Section(StrEnum):
    """A part of the measurements that can be run alone."""

    CODEC = "codec"
    SCORING = "scoring"
    READING = "reading"
    MEMORY = "memory"


def run(*, quick: bool, only: Section | None = None) -> list[Figure]:
    """All figures of this module, or of one section; each is told on standard error as soon as it is there."""
    torch.set_num_threads(1)
    fork_server("benchmarks.memory")
    sections = Section if only is None else [only]
    return [found for section in sections for found in tell(_MEASURES[section](quick))]


@functools.cache
def _real(quick: bool) -> Real:
    loaded = real_teacher(quick=quick)
    if isinstance(loaded, str):
        return loaded
    rows = gsm8k_rows(loaded, 4 if quick else 64)
    return rows if isinstance(rows, str) else (loaded, rows)


def _codec(quick: bool) -> list[Figure]:
    real = _real(quick)
    zipf = zipf_logits(2 if quick else 32, num_columns=49_152)
    first = zipf if isinstance(real, str) else real_logits(*real)
    figures, sampled, topk = stored_bytes.run(first, has_goal=first is not zipf)
    if isinstance(real, str):
        name = "bytes a token, SmolLM2-135M on GSM8K"
        figures.insert(0, figure(name, None, "B", Check(f"not run: {real}"), peer="all", goal=at_most(16)))
    if not quick:
        figures += stored_bytes.run(zipf_logits(16, num_columns=151_936), has_goal=False)[0]
    ten_ids = stored_bytes.store(stored_bytes.sampled_targets(zipf, 25), zipf.labels)
    goals = (None, None) if quick else (at_least(1e6), at_least(1e5))  # a thousand positions are over before a rate is reached
    coded = [Coded("sampled N = 25, synthetic Zipf", ten_ids, *goals)]
    if first is not zipf:
        coded.append(Coded(f"sampled, {first.name}", sampled, None, None))
    coded.append(Coded(f"topk k = 128, {first.name}", topk, None, None))
    return figures + codec_speed.run(coded, positions=1024 if quick else 16_384, repeats=2 if quick else 5)


def _scoring(quick: bool) -> list[Figure]:
    real = _real(quick)
    if quick or isinstance(real, str):
        teacher = synthetic_teacher(num_layers=2, hidden_size=576, num_columns=49_152)
        rows = token_rows(6, num_columns=49_152, mean_tokens=16)
        return scoring.run(teacher, rows, label="random weights, 2 of SmolLM2's 30 blocks", goal=None, repeats=1)
    loaded, rows = real
    return scoring.run(loaded, rows[:24], label="SmolLM2-135M on GSM8K", goal=times_better(3), repeats=5)


def _reading(quick: bool) -> list[Figure]:
    return reading.run(num_rows=512 if quick else 4096, shard_rows=512, object_rows=16 if quick else 512, repeats=1 if quick else 9)


def _memory(quick: bool) -> list[Figure]:
    return memory.run(capture_rows=32 if quick else 200, read_rows=64 if quick else 10_240, judge=not quick)


_MEASURES = {Section.CODEC: _codec, Section.SCORING: _scoring, Section.READING: _reading, Section.MEMORY: _memory}


def main(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list and nothing else.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes; under a minute.")] = False,
    only: Annotated[Section | None, typer.Option("--only", help="One section.")] = None,
) -> None:
    """Measure soft labels beside peers, in this process, now."""
    show([*machine(), *run(quick=quick, only=only)], as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
