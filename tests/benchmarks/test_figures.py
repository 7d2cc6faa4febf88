"""A benchmark must not flatter: what failed its numerics has no ratio, formulas are those of the papers, content survives."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import measured
from benchmarks.measure import Check, Figure, at_least, at_most, figure, times_better
from benchmarks.peers import distillkit, raw_arrays
from benchmarks.stored_bytes import _spread, reconstruction_kl
from benchmarks.workloads import Logits, sampled_rows, token_rows

_ROOT = Path(__file__).parents[2]


def test_a_ratio_counts_only_with_its_numerics() -> None:
    right = figure("x", 4.0, "B", Check("equal"), less_is_better=True, peer="p", peer_value=12.0, goal=times_better(3))
    assert (right.ratio, right.holds, right.goal) == (3.0, True, ">= 3x")
    wrong = figure("x", 4.0, "B", Check("differs", ok=False), less_is_better=True, peer="p", peer_value=12.0, goal=times_better(3))
    assert (wrong.ratio, wrong.holds) == (None, False)


def test_a_peer_that_was_not_run_decides_nothing() -> None:
    assert figure("x", 4.0, "B", Check(""), peer="p: not run", goal=times_better(3)).holds is None
    assert figure("x", 4.0, "B", Check(""), peer="p: not run", goal=at_most(3)).holds is False
    assert figure("x", 4.0, "B", Check(""), peer="p", peer_value=1.0, goal=at_least(4)).ratio == 4.0
    assert figure("x", None, "B", Check("not run"), goal=at_most(3)).holds is None


def test_distillkit_formulas_give_the_published_sizes() -> None:
    sizes = {setting.name: setting.formula_bytes(151_936) for setting in distillkit.SETTINGS}
    assert sizes == {"recommended": 344, "normalize_t": 344, "budget": 127}
    assert distillkit.SETTINGS[0].formula_bytes(49_152) == 312


def test_mean_squared_errors_equal_the_sums_over_all_columns() -> None:
    torch.manual_seed(0)
    logits_NV = (3 * torch.randn(20, 500)).bfloat16()
    spread = _spread(Logits("x", 500, [logits_NV], [torch.zeros(20, dtype=torch.int64).numpy()]))
    p_NV = torch.softmax(logits_NV.double(), -1)
    for draws in (1, 7, 25, 64):
        fraction_NV = (p_NV * draws).frac()
        systematic_N = (fraction_NV * (1 - fraction_NV)).sum(-1) / draws**2
        assert torch.allclose(spread.systematic(draws), systematic_N, rtol=1e-4, atol=1e-7)
        assert torch.allclose(spread.independent(draws), (p_NV * (1 - p_NV)).sum(-1) / draws, rtol=1e-4, atol=1e-7)


def test_reconstruction_kl_by_hand() -> None:
    exact, found = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.5]]).log()
    by_hand = 0.75 * (2 / 3 * torch.log(torch.tensor(2.0)) - 1 / 3 * torch.log(torch.tensor(2.0)))
    assert reconstruction_kl(exact, found, torch.tensor([0.25]).log()) == pytest.approx(float(by_hand), rel=1e-6)
    assert reconstruction_kl(exact, exact + 1.0, torch.tensor([0.25]).log()) == pytest.approx(0.0, abs=1e-12)


def test_a_module_that_fails_costs_its_own_figures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_ROOT)
    (found,) = measured("nothing", quick=True)
    assert (found.name, found.ours, found.holds) == ("benchmarks.nothing", None, None)
    assert "ended with status 1" in found.numerics


def test_a_peers_sample_survives_its_object() -> None:
    rows = token_rows(3, num_columns=49_152)
    samples = [raw_arrays.to_arrays(row, targets) for row, targets in zip(rows, sampled_rows(rows, num_columns=49_152), strict=True)]
    again = [raw_arrays._unpack(raw_arrays._pack(sample)) for sample in samples]
    one, other = raw_arrays.from_arrays(samples), raw_arrays.from_arrays(again)
    assert one["ids"].tolist() == [i for row in rows for i in row.ids]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert int(one["counts"].sum()) == 25 * sum(row.num_supervised for row in rows)


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.stack
@pytest.mark.timeout(1800)  # half a minute on a quiet machine; on a busy one it measures nothing, and must not fail for that
def test_quick_prints_a_list_of_figures_in_time(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.softlabels", "--json", "--quick"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) >= 20
    assert all(set(figure) == {field.name for field in fields(Figure)} for figure in found)
    names = " ".join(figure["name"] for figure in found)
    for part in (
        "bytes a token, sampled",
        "bytes a token, topk",
        "decode",
        "encode",
        "scoring",
        "training tensors",
        "peak memory",
        "GEMM",
        "copy",
    ):
        assert part in names
    assert all(figure["ratio"] is None for figure in found if figure["peer_value"] is None)
