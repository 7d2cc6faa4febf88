"""How sure a teacher was: the mean over all rows, the share of sure positions by hand, and damage that is seen."""

import numpy as np
import pytest
import torch

from kd_core.errors import ArtifactError, QuarantinedError
from kd_core.evaluate import certainty as module
from kd_core.evaluate.certainty import certainty
from kd_core.recipe import Dense, Sampled, TopK
from kd_core.rows.keys import soft_label_key
from kd_core.rows.table import RowCache
from kd_core.softlabels import make_targets
from kd_core.store import LocalStore

NAMESPACE = "a" * 32
POLICIES = [
    Sampled(kind="sampled", num_draws=25, temperature=2.0),
    TopK(kind="topk", k=3, temperatures=(1.0,)),
    Dense(kind="dense"),
]


def row(number):
    """Key and number of supervised positions of row number ``number`` of the fixture's shards."""
    ids, first = [(7 * number + 3 * i) % 24 for i in range(5 + number % 4)], 2
    return soft_label_key(NAMESPACE, ids, first), len(ids) - first


def asked(cache, numbers):
    keys, positions = zip(*map(row, numbers), strict=True)
    return certainty(cache, cache.snapshot(), keys, np.array(positions))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_the_mean_is_over_the_positions_of_the_asked_rows(store, add_shard, policy):
    add_shard(store, range(20), policy=policy)
    add_shard(store, range(15, 23), policy=policy)
    cache, numbers = RowCache(store, "soft_labels", NAMESPACE), [3, 21, 8, 16]
    stored = cache.read(cache.snapshot(), [row(number)[0] for number in numbers])
    weights = stored["num_supervised"].to_numpy()
    found = asked(cache, numbers)
    assert found.mean_entropy == pytest.approx(np.average(stored["mean_entropy"].to_numpy(), weights=weights))
    assert found.positions == found.positions_read == weights.sum()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_sure_positions_by_hand(policy):
    """Sure of the gold token; sure of another; nearly sure of another; sure with its rest spread out; and not sure."""
    p_NV = torch.full((5, 5), 0.0)
    p_NV[0] = torch.tensor([0.997, 0.003, 1e-9, 1e-9, 1e-9])
    p_NV[1] = torch.tensor([1e-9, 0.999, 0.001, 1e-9, 1e-9])
    p_NV[2] = torch.tensor([0.015, 0.985, 1e-9, 1e-9, 1e-9])
    p_NV[3] = torch.tensor([0.992, 0.002, 0.002, 0.002, 0.002])
    p_NV[4] = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1])
    uniform_N = torch.full((5,), 0.5, dtype=torch.float64)
    targets = make_targets(p_NV.log(), torch.zeros(5, dtype=torch.int64), policy, uniform_N=uniform_N)
    assert module._sure_positions(targets).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("policy", POLICIES[1:], ids=lambda policy: policy.kind)
def test_the_share_is_that_of_the_stored_positions(store, add_shard, policy, monkeypatch):
    monkeypatch.setattr(module, "SURE", 0.6)  # these teachers are never surer
    add_shard(store, range(24), policy=policy)
    found = asked(RowCache(store, "soft_labels", NAMESPACE), range(24))
    sure = total = 0
    for number in range(24):
        generator = torch.Generator().manual_seed(number)
        p_NV = torch.softmax(3.0 * torch.randn(row(number)[1], 24, generator=generator), -1)
        sure, total = sure + int((p_NV.amax(-1) > 0.6).sum()), total + len(p_NV)
    assert 0 < sure < total
    assert found.sure_share == pytest.approx(sure / total, abs=2.5 / total), "quantised probabilities near the bound may fall either way"


def test_of_many_rows_a_bounded_number_is_decoded_whatever_shards_they_lie_in(tmp_path, add_shard, monkeypatch):
    monkeypatch.setattr(module, "_BLOCKS", 3)
    monkeypatch.setattr(module, "GROUP_ROWS", 4)
    found = []
    for shards in ([range(24)], [range(16, 24), range(7), range(7, 16)]):
        store = LocalStore(tmp_path / f"{len(shards)}")
        for rows in shards:
            add_shard(store, rows)
        found.append(asked(RowCache(store, "soft_labels", NAMESPACE), range(24)))
    assert found[0] == found[1]
    assert found[0].positions_read == sum(row(number)[1] for number in (0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23)) < found[0].positions


def test_missing_rows_and_damage_are_errors(store, add_shard):
    commit = add_shard(store, range(6))
    cache = RowCache(store, "soft_labels", NAMESPACE)
    with pytest.raises(ArtifactError, match="1 of 2 rows are missing"):
        asked(cache, [1, 7])
    path = store.local_path(cache.shard_key(commit))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    with pytest.raises(QuarantinedError, match="moved to quarantine"):
        asked(cache, [1, 2])
