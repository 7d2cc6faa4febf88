"""A training step with cached soft labels beside one with a live teacher, TRL's GKD trainer: same rows, student and teacher.

Labels are sampled from that teacher (25 draws a position) and lie in a cache on this disk, so that reading and decoding count. All rows
are in every step, so both sides' first losses are the same number up to the draws. Everything is float32: a teacher in bfloat16
would cost the peer less where the machine has products in it.
"""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.loop import clocked_steps, store_rows
from benchmarks.measure import Check, Figure, Timing, figure, fork_server, peak_memory, times_better, timing, timings
from benchmarks.peers.gkd import gkd_steps, why_not_gkd
from benchmarks.workloads import synthetic_teacher, token_rows
from kd_core.recipe import Objective, Sampled
from kd_core.softlabels.capture import row_key, score_rows
from kd_core.teacher.models import LoadedModel
from kd_core.tokens.batches import TokenRow
from kd_core.train.stored_rows import StoredRows

__all__ = ["Sizes", "run"]

_COLUMNS, _WIDTH = 49_152, 576
_SOFT = Objective(supervision="soft", hard_weight=0.0, soft_weight=1.0)
_POLICY = Sampled(kind="sampled", num_draws=25, temperature=1.0)
_TOLERANCE = 0.03
_PEER = "TRL 1.16 GKD trainer, lambda 0, live teacher"


@dataclass(frozen=True)
class Sizes:
    """Blocks of both models, rows of a step, steps of a run, how often both sides run in turn, and whether memory is measured too."""

    student_blocks: int
    teacher_blocks: int
    num_rows: int
    steps: int
    repeats: int
    memory: bool


def _model(num_blocks: int) -> LoadedModel:
    loaded = synthetic_teacher(num_layers=num_blocks, hidden_size=_WIDTH, num_columns=_COLUMNS)
    loaded.model.float()
    return loaded


def _student(sizes: Sizes) -> LoadedModel:
    student = _model(sizes.student_blocks)
    student.model.requires_grad_(True)
    return student


def _rows(sizes: Sizes) -> list[TokenRow]:
    return token_rows(sizes.num_rows, num_columns=_COLUMNS)


def _stored(sizes: Sizes, teacher: LoadedModel, scratch: Path) -> StoredRows:
    """The teacher's soft labels of the rows in a cache of their own."""
    keyed = [(row_key("benchmark", row), row) for row in _rows(sizes)]
    scored = score_rows(teacher, keyed, policy=_POLICY, micro_batch_tokens=2048).scored
    return store_rows(keyed, [row.targets for row in scored], scratch)


def ours_once(sizes: Sizes, scratch: Path) -> None:
    """Two steps of ours, for a process of its own; the cache is there already."""
    torch.set_num_threads(1)
    keyed = [(row_key("benchmark", row), row) for row in _rows(sizes)]
    clocked_steps(_student(sizes).model, store_rows(keyed, None, scratch), _SOFT, scratch, batch_rows=sizes.num_rows, steps=2)


def peer_once(sizes: Sizes, scratch: Path) -> None:
    """Two steps of the peer, for a process of its own."""
    torch.set_num_threads(1)
    assert why_not_gkd() is None
    gkd_steps(_model(sizes.teacher_blocks), _student(sizes), _rows(sizes), 2)


def run(sizes: Sizes) -> list[Figure]:
    """Seconds of a step, and peak memory."""
    what = f"{sizes.num_rows} rows of 260 tokens, half supervised, V = {_COLUMNS:,}, H = {_WIDTH}, {sizes.student_blocks} blocks"
    name = f"training step with cached sampled labels of a teacher of {sizes.teacher_blocks} blocks, {what}, float32"
    teacher, student = _model(sizes.teacher_blocks), _student(sizes)
    reason = why_not_gkd()
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        rows = _stored(sizes, teacher, scratch)
        for _ in range(sizes.repeats):
            learner = copy.deepcopy(student.model)
            result, seconds = clocked_steps(learner, rows, _SOFT, scratch, batch_rows=sizes.num_rows, steps=sizes.steps)
            taken["ours"].append(seconds)
            losses["ours"] = result.metrics[0]["soft"]
            if reason is None:
                theirs = gkd_steps(
                    teacher, LoadedModel(copy.deepcopy(student.model), student.tokenizer, _COLUMNS), _rows(sizes), sizes.steps
                )
                taken["peer"].append(theirs.seconds)
                losses["peer"] = theirs.first_loss
        memory = _peaks(sizes, scratch, with_peer=reason is None) if sizes.memory else None
    peer = _PEER if reason is None else f"{_PEER}: {reason}"
    mine, theirs_timing = timing(taken["ours"]), timing(taken["peer"]) if taken["peer"] else None
    seconds_check, memory_check = _checks(losses, mine, theirs_timing, teacher.num_parameters / student.num_parameters)
    goal = times_better(1.0 + teacher.num_parameters / (3 * student.num_parameters))
    value = None if theirs_timing is None else theirs_timing.process
    found = [figure(name, mine.process, "s", seconds_check, less_is_better=True, peer=peer, peer_value=value, goal=goal)]
    if memory is not None:
        mine_mb, theirs_mb = memory
        name = f"peak memory of a {name}"
        found.append(figure(name, mine_mb, "MB", memory_check, less_is_better=True, peer=peer, peer_value=theirs_mb))
    return found


def _peaks(sizes: Sizes, scratch: Path, *, with_peer: bool) -> tuple[float, float | None]:
    """MB of a process of ours, and of one of the peer."""
    fork_server("benchmarks.live_teacher")
    return peak_memory(ours_once, sizes, scratch), peak_memory(peer_once, sizes, scratch) if with_peer else None


def _checks(losses: dict[str, float], ours: Timing, peer: Timing | None, ratio: float) -> tuple[Check, Check]:
    if peer is None:
        return Check(timings(ours)), Check("two steps in a process of its own, imports included")
    off = abs(losses["ours"] - losses["peer"]) / losses["peer"]
    same = f"KL of the first step {losses['ours']:.4f} by the draws, {losses['peer']:.4f} by the live teacher: {off:.1%} apart, bound 3%"
    alone = f"{same}; two steps in processes of their own, imports included"
    floor = f"teacher / student parameters {ratio:.2f}"
    return Check(f"{same}; {floor}; {timings(ours, peer)}", off < _TOLERANCE), Check(alone, off < _TOLERANCE)
