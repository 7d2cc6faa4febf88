"""Trap 12 over processes: two ranks give the losses and weights of one, and what two began one finishes, and the reverse.

Bounds: logged numbers within 1e-5 of themselves, weights within 2e-5: float32 sums in another order, over eight steps of AdamW.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).parent / "ranks_program.py"
STEPS = 8


def run(directory: Path, name: str, *, num_ranks: int, store: str | None = None, breaks_at: int | None = None) -> list[dict[str, Any]]:
    """What each rank was left with; of a broken run nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), "ACCELERATE_USE_CPU": "true"}
    if breaks_at is not None:
        common["KD_FAILPOINT"] = f"train.step:{breaks_at}:kill"
    if num_ranks > 1:
        common |= {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    outs = [directory / f"{name}.{rank}.pt" for rank in range(num_ranks)]
    processes = []
    for rank, out in enumerate(outs):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
        command = [sys.executable, str(PROGRAM), str(out), str(directory / (store or name)), "3"]
        processes.append(subprocess.Popen(command, env=common | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=300)[0] for process in processes]
    if breaks_at is not None:
        assert all(process.returncode != 0 for process in processes), said
        return []
    assert all(process.returncode == 0 for process in processes), said
    found = [torch.load(out, weights_only=True) for out in outs]
    return [{**json.loads(one["result"]), "model": one["model"]} for one in found]


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert found["validation_nll"] == pytest.approx(expected["validation_nll"], rel=1e-5)
    assert found["supervised_tokens"] == expected["supervised_tokens"]
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=0.0, atol=2e-5, msg=name)


@pytest.mark.slow
def test_two_ranks_are_one_and_each_goes_on_from_the_other_s_checkpoint(tmp_path: Path) -> None:
    (alone,) = run(tmp_path, "alone", num_ranks=1)
    assert alone["steps"] == STEPS
    first, second = run(tmp_path, "two", num_ranks=2)
    assert_alike(first, alone)
    assert first["metrics"] == second["metrics"]
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    for begin, finish in ((2, 1), (1, 2)):
        store = f"begun_by_{begin}"
        run(tmp_path, "broken", num_ranks=begin, store=store, breaks_at=4)
        for found in run(tmp_path, f"finished_by_{finish}", num_ranks=finish, store=store):
            assert found["resumed_from"] == 3
            assert_alike(found, alone)
