"""Trap 12 over processes: two ranks give the losses and weights of one, with whole copies or slices of the weights; and what two began
one finishes, and the reverse.

Bounds: a step adds up at most 220 tokens in float32, and in another order a sum of n terms is off by at most n roundings: that share of
the logged numbers. Of a weight, a hundredth of what one step of AdamW may move it: a gradient near zero has any sign.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_core.errors import TrainingError
from kd_core.recipe import Run
from kd_core.train.sharding import shall_shard

LOGGED = 220 * torch.finfo(torch.float32).eps
WEIGHTS = 0.01 * 0.01
PROGRAM = Path(__file__).parent / "ranks_program.py"
SLICED = {"run": {"shard_weights": True}}
RUINOUS = {"kind": "piecewise", "values": [0.0, 600.0], "at": [0.6]}  # five times the weights a step: the last ones are not the best
BEST = {"training": {"keep": "best", "ema_decay": None, "validate_every_steps": 1, "weight_decay": RUINOUS}}
BEST["training"] |= {"learning_rate_schedule": {"kind": "constant"}, "stop_after_validations": 1}
SCHEDULED = {"training": {"ema_decay": None, "weight_decay": {"kind": "linear", "start": 0.0, "end": 0.5}, "clip_norm": 0.1}}
ADAPTER = {"adapter": True, "training": {"ema_decay": None}}
RECOMPUTED = {"run": {"shard_weights": True, "activation_checkpointing": True}}

train_one = runpy.run_path(str(PROGRAM))["train_one"]


def on_two_ranks(directory: Path, runs: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Name of a run -> what each rank was left with. One launch, because it costs most of the time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[2]), "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(PROGRAM), str(directory), json.dumps(runs)]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=-1, stderr=-2, text=True) for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    return {name: [torch.load(directory / f"{name}.{rank}.pt", weights_only=True) for rank in range(2)] for name in runs}


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=LOGGED)
    assert found["validation_nll"] == pytest.approx(expected["validation_nll"], rel=LOGGED)
    assert found["supervised_tokens"] == expected["supervised_tokens"]
    assert found["kept_step"] == expected["kept_step"]
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=0.0, atol=WEIGHTS, msg=name)


@pytest.mark.drill
@pytest.mark.slow
def test_two_ranks_are_one_and_each_goes_on_from_the_other_s_checkpoint(tmp_path: Path) -> None:
    alone, alone_best = train_one(tmp_path / "alone", {}), train_one(tmp_path / "best", BEST)
    assert (alone["kept_step"], alone["steps"]) == (8, 8)
    assert (alone_best["kept_step"], alone_best["steps"]) == (5, 6)
    for store in ("begun_by_1", "begun_by_1_sliced"):
        train_one(tmp_path / store, {"breaks_at": 4})
    train_one(tmp_path / "best_begun_by_1", BEST | {"breaks_at": 4})
    found = on_two_ranks(
        tmp_path,
        {
            "copies": {},
            "slices": SLICED,
            "best": BEST | SLICED | {"store": "best_of_two"},
            "finished": {"store": "begun_by_1"},
            "finished_sliced": SLICED | {"store": "begun_by_1_sliced"},
            "best_finished": BEST | SLICED | {"store": "best_begun_by_1"},
            "begun": {"breaks_at": 4},
            "begun_sliced": SLICED | {"breaks_at": 4},
            "best_begun": BEST | SLICED | {"breaks_at": 4},
        },
    )
    for name, on_one in {"copies": alone, "slices": alone, "best": alone_best}.items():
        first, second = found[name]
        assert_alike(first, on_one)
        assert first["metrics"] == second["metrics"]
        assert all(torch.equal(first["model"][weight], second["model"][weight]) for weight in first["model"])
    for name, on_one in {"finished": alone, "finished_sliced": alone, "best_finished": alone_best}.items():
        for rank in found[name]:
            assert rank["resumed_from"] == 3
            assert_alike(rank, on_one)
    for name, on_one, changes in (("begun", alone, {}), ("begun_sliced", alone, {}), ("best_begun", alone_best, BEST)):
        resumed = train_one(tmp_path / name, changes)
        assert resumed["resumed_from"] == 3
        assert_alike(resumed, on_one)


@pytest.mark.drill
@pytest.mark.slow
def test_slices_know_tied_embeddings_adapters_schedules_and_recomputed_blocks(tmp_path: Path) -> None:
    runs = {
        "tied": {"tied": True} | SCHEDULED,
        "adapter": ADAPTER,
        "recomputed": {},
    }
    found = on_two_ranks(tmp_path, {name: changes | (RECOMPUTED if name == "recomputed" else SLICED) for name, changes in runs.items()})
    for name, changes in runs.items():
        alone = train_one(tmp_path / f"{name}.alone", changes)
        for rank in found[name]:
            assert_alike(rank, alone)
    decays = [row["weight_decay"] for row in found["tied"][0]["metrics"]]
    assert (decays[0], decays[-1]) == (0.0, 0.5)


@pytest.mark.drill
@pytest.mark.slow
def test_features_and_their_projections_are_the_same_on_two_ranks(tmp_path: Path) -> None:
    """Copies and slices; a weight that is zero for some steps leaves no rank waiting; one rank goes on from the slices of two."""
    late = {"kind": "piecewise", "values": [0.0, 1.0], "at": [0.3]}
    states = {"features": {"kind": "hidden_states", "source": "live", "weight": late}}
    relations = {"features": {"kind": "relations", "num_heads": 4}}
    runs = {"copies": states, "slices": states | RECOMPUTED, "relations": relations | SLICED, "begun": states | SLICED | {"breaks_at": 4}}
    found = on_two_ranks(tmp_path, runs)
    for name in ("copies", "slices", "relations"):
        alone = train_one(tmp_path / f"{name}.alone", {"features": runs[name]["features"]})
        assert alone["metrics"][-1]["feature"] > 0.0
        for rank in found[name]:
            assert_alike(rank, alone)
    resumed = train_one(tmp_path / "begun", states)
    assert resumed["resumed_from"] == 3
    assert_alike(resumed, train_one(tmp_path / "whole", states))


def test_a_launcher_may_ask_for_slices_and_what_is_not_done_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not shall_shard(Run(), 2)
    assert shall_shard(Run(shard_weights=True), 2)
    assert not shall_shard(Run(shard_weights=True), 1), "there is nothing to slice"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match="launched with FSDP version 1: version 2 is done here; add --fsdp_version 2"):
        shall_shard(Run(), 2)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert shall_shard(Run(), 2)
    with pytest.raises(TrainingError, match=r"run\.compile with sliced weights"):
        shall_shard(Run(compile=True), 2)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(TrainingError, match="FSDP_OFFLOAD_PARAMS=true, which is not done here"):
        shall_shard(Run(), 2)
