"""The log of a run: spikes stand out of noise only, numbers survive text bit for bit."""

import math
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from kd_core.artifacts import publish
from kd_core.store import LocalStore
from kd_core.train.history import History, logged_metrics, to_jsonl


def test_a_spike_stands_out_of_noise_and_noise_does_not() -> None:
    history, draws = History(), random.Random(0)
    losses = [4.0 * math.exp(-step / 200) + draws.gauss(0.0, 0.1) for step in range(400)]
    losses[300] += 3.0
    assert [step for step, loss in enumerate(losses, 1) if history.is_spike(step, loss)] == [301] == history.spikes
    assert len(history.recent) == 50


@pytest.mark.parametrize("loss", [0.0, 2.5])
def test_a_flat_loss_has_no_spikes_and_a_jump_from_it_is_one(loss: float) -> None:
    history = History()
    assert not any(history.is_spike(step, loss) for step in range(1, 100))
    assert history.is_spike(100, loss + 0.5)


def test_the_first_steps_are_no_spikes() -> None:
    history = History()
    assert [history.is_spike(step, loss) for step, loss in enumerate([9.0, 1.0, 9.0, 1.0, 50.0], 1)] == [False] * 5


def test_a_history_comes_back_bit_for_bit() -> None:
    history = History(validation=[(10, 1 / 3), (20, math.inf)], supervised_tokens=7, skipped=[3])
    history.is_spike(1, 0.1 + 0.2)
    history.log(1, {"loss": 0.1 + 0.2, "hard": math.nan})
    assert asdict(History.load(history.dump())) == asdict(history)
    assert history.metrics == [{"step": 1, "loss": 0.1 + 0.2, "loss_spikes": 0, "skipped_steps": 1}]


@pytest.mark.parametrize("logged", [[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.1 + 0.2}], []])
def test_the_log_of_an_artifact_is_read(tmp_path: Path, logged: list[dict[str, float]]) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / ("metrics.jsonl" if logged else "other")).write_text(to_jsonl(logged))
    store = LocalStore(tmp_path / "store")
    record = publish(store, files, stage="train", fp="f" * 32, identity={}, upstream={}, summary={})
    assert logged_metrics(store, record) == logged
