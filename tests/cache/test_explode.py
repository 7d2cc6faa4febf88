"""Plain rows from packed ones: what the codec keeps is what is shown, each row once."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from kd_core.cache.catalog import find_namespace
from kd_core.cache.explode import EXPLODED_SCHEMA, entries, explode
from kd_core.errors import ArtifactError, IntegrityError, SoftLabelError, StoreError
from kd_core.recipe import Dense, Sampled, TopK
from kd_core.rows.keys import soft_label_key
from kd_core.rows.table import RowCache
from kd_core.softlabels import make_targets

A = "a" * 32
LOGITS_NV = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 0.0]])
P_NV = torch.softmax(LOGITS_NV, -1)


def made(policy):
    return entries(make_targets(LOGITS_NV, torch.tensor([0, 2]), policy, uniform_N=torch.tensor([0.5, 0.5], dtype=torch.float64)))


def test_entries_of_each_policy_by_hand() -> None:
    dense = made(Dense(kind="dense"))
    assert dense.position_E.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert dense.id_E.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    torch.testing.assert_close(dense.probability_E, P_NV.reshape(-1))
    topk = made(TopK(kind="topk", k=2, temperatures=(1.0,)))
    assert (topk.position_E.tolist(), topk.id_E.tolist()[:3]) == ([0, 0, 1, 1], [0, 1, 2])
    torch.testing.assert_close(topk.probability_E[:2], P_NV[0, :2])
    torch.testing.assert_close(topk.logprob_E, topk.probability_E.log())
    sampled = made(Sampled(kind="sampled", num_draws=8, temperature=1.0))
    assert sampled.logprob_E is None
    totals = torch.zeros(2).index_add(0, sampled.position_E, sampled.probability_E)
    torch.testing.assert_close(totals, torch.ones(2))
    full = torch.zeros(2, 4).index_put((sampled.position_E, sampled.id_E), sampled.probability_E)
    assert float((full - P_NV).abs().max()) < 1 / 8  # systematic draws are within one of N * p


def all_rows(found, **options) -> pa.Table:
    return pa.concat_tables(list(explode(found.cache, found.snapshot, **options)), promote_options="none")


@pytest.mark.parametrize("policy", [Sampled(kind="sampled", num_draws=25, temperature=2.0), TopK(kind="topk", k=3, temperatures=(1.0,))])
def test_every_row_once_at_its_own_positions(store, add_shard, policy) -> None:
    add_shard(store, range(20), policy=policy)  # more rows than are decoded together
    add_shard(store, range(15, 23), policy=policy)
    found = find_namespace(store, None, table="soft_labels")
    table = all_rows(found)
    assert table.schema == EXPLODED_SCHEMA
    assert set(table["key"].to_pylist()) == set(found.snapshot.keys())
    stored = found.cache.read(found.snapshot, sorted(found.snapshot.keys())).to_pylist()
    for row in stored[::5]:
        mine = table.filter(pa.compute.equal(table["key"], row["key"]))
        positions = mine["position"].to_numpy()
        assert set(positions) == set(range(row["first_supervised"], len(row["ids"])))
        assert mine["gold_token"].to_pylist() == [row["ids"][p] for p in positions]
        _, first = np.unique(positions, return_index=True)
        assert np.mean(mine["entropy"].to_numpy()[first]) == pytest.approx(row["mean_entropy"], abs=0.5 / 64)  # stored in 64ths of a nat
        assert np.mean(mine["gold_logprob"].to_numpy()[first]) == pytest.approx(row["mean_gold_logprob"], rel=0.01)
    if policy.kind == "sampled":
        by_position = table.group_by(["key", "position"]).aggregate([("probability", "sum")])
        assert np.allclose(by_position["probability_sum"].to_numpy(), 1.0)
        assert table["logprob"].null_count == table.num_rows
    else:
        assert np.allclose(np.exp(table["logprob"].to_numpy()), table["probability"].to_numpy())


def test_keys_and_limit_choose_rows(store, add_shard) -> None:
    add_shard(store, range(6))
    add_shard(store, range(6, 12))
    found = find_namespace(store, "aa", table="soft_labels")
    ids = [(7 * 3 + 3 * i) % 24 for i in range(8)]
    key = soft_label_key(A, ids, 2)
    assert set(all_rows(found, keys={key})["key"].to_pylist()) == {key}
    assert len(set(all_rows(found, limit=8)["key"].to_pylist())) == 8
    with pytest.raises(ArtifactError, match="has no row nowhere"):
        all_rows(found, keys={"nowhere", key})


def test_looking_at_a_damaged_shard_names_it_and_moves_nothing(store, add_shard) -> None:
    commit = add_shard(store, range(3))
    key = RowCache(store, "soft_labels", A).shard_key(commit)
    path = store.local_path(key)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{key}: its sha256 differs"):
        all_rows(find_namespace(store, None, table="soft_labels"))
    assert path.read_bytes() == data


def test_rows_that_do_not_decode_are_named(store) -> None:
    ids = [1, 2, 3]
    row = {"key": soft_label_key(A, ids, 1), "ids": ids, "first_supervised": 1, "num_supervised": 2, "targets": b"not soft labels"}
    cache = RowCache(store, "soft_labels", A)
    commit = cache.commit(pa.Table.from_pylist([row]), num_tokens=2)
    with pytest.raises(SoftLabelError, match=rf"{commit.sha256}\.parquet, rows from {row['key']} on: "):
        list(explode(cache, cache.snapshot()))


def test_a_namespace_must_be_one(store, add_shard) -> None:
    with pytest.raises(StoreError, match="there are: none"):
        find_namespace(store, None, table="soft_labels")
    add_shard(store, [1])
    add_shard(store, [1], namespace="b" * 32)
    with pytest.raises(StoreError, match=rf"say which namespace; there are: {A} \(soft_labels\), {'b' * 32} \(soft_labels\)"):
        find_namespace(store, None, table="soft_labels")
    assert find_namespace(store, "b", table="soft_labels").cache.namespace == "b" * 32
    with pytest.raises(StoreError, match="'c' names 0 namespaces"):
        find_namespace(store, "c", table="soft_labels")
