"""Progress of rows in shards: what is made of them is told between two commits, and counts no row as finished."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from kd_core.progress import Tick
from kd_core.stages import sharded
from kd_core.stages.job import Job
from kd_core.stages.sharded import Progress


def test_tokens_are_told_of_before_any_row_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ticks = iter([100.0, 100.25, 102.0]), list[Tick]()
    monkeypatch.setattr(sharded, "time", cast(Any, SimpleNamespace(monotonic=lambda: next(clock))))
    progress = Progress(cast(Job, SimpleNamespace(tick=ticks.append)), 10, "answers")
    for _ in range(3):
        progress.made(2000, "tokens")
    progress(4)
    assert ticks == [
        Tick(0, 10, "answers", "2,000 tokens"),
        Tick(0, 10, "answers", "6,000 tokens, 3,000 tokens/s"),
        Tick(4, 10, "answers", "6,000 tokens, 3,000 tokens/s"),
    ], "the second came too soon after the first"
