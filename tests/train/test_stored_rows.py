"""Rows from shards are the rows that were scored: by content, whatever the order, the layout or the place."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kd_core.errors import ArtifactError, QuarantinedError, SoftLabelError
from kd_core.recipe import Dense, Sampled, SoftLabels, TopK
from kd_core.rows.range_cache import RangeCache
from kd_core.rows.schemas import CODEC_MODEL
from kd_core.rows.table import RowCache
from kd_core.softlabels.codec import encode_rows
from kd_core.softlabels.targets import DenseTargets, SampledTargets, Targets, TopKTargets, make_targets
from kd_core.store import LocalStore, Store
from kd_core.tokens.batches import TokenRow
from kd_core.train.row_order import step_rows
from kd_core.train.stored_rows import Group, ShardGroups, StoredRows, file_rows

COLUMNS = 40
POLICIES = [
    Sampled(kind="sampled", num_draws=20, temperature=1.0),
    TopK(kind="topk", k=6, temperatures=(1.0, 2.0)),
    Dense(kind="dense"),
]


def make_rows(num: int) -> list[TokenRow]:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        length = int(generator.integers(2, 9))
        rows.append(TokenRow(tuple(int(i) for i in generator.integers(0, COLUMNS, length)), int(generator.integers(1, length))))
    return rows


def targets_of(i: int, row: TokenRow, policy: SoftLabels) -> Targets:
    logits_NV = 2.0 * torch.randn(row.num_supervised, COLUMNS, generator=torch.Generator().manual_seed(i))
    labels_N = torch.tensor(row.ids[row.first_supervised :])
    return make_targets(logits_NV, labels_N, policy, uniform_N=torch.full((row.num_supervised,), 0.5, dtype=torch.float64))


def fill(store: Store, rows: list[TokenRow], policy: SoftLabels, *, shard_rows: int) -> tuple[RowCache, list[str]]:
    """Rows in shards, in an order of their own."""
    cache = RowCache(store, "soft_labels", "7" * 32)
    keys = [f"{i:032x}" for i in range(len(rows))]
    order = random.Random(shard_rows).sample(range(len(rows)), len(rows))
    for start in range(0, len(rows), shard_rows):
        part = order[start : start + shard_rows]
        labels = [np.array(rows[i].ids[rows[i].first_supervised :], np.int64) for i in part]
        model, blobs = encode_rows([targets_of(i, rows[i], policy) for i in part], labels)
        table = pa.table(
            {
                "key": [keys[i] for i in part],
                "ids": pa.array([list(rows[i].ids) for i in part], pa.list_(pa.int32())),
                "first_supervised": pa.array([rows[i].first_supervised for i in part], pa.int32()),
                "targets": pa.array(blobs, pa.binary()),
            }
        )
        cache.commit(table, num_tokens=1, metadata={CODEC_MODEL: model})
    return cache, keys


def stored(cache: RowCache, keys: list[str], rows: list[TokenRow], copies: RangeCache) -> StoredRows:
    groups = ShardGroups(cache, cache.snapshot(), copies, keys)
    num_tokens = np.array([len(r.ids) for r in rows], np.int32)
    return StoredRows(
        groups, groups.group, groups.row, num_tokens=num_tokens, first_supervised=np.array([r.first_supervised for r in rows], np.int32)
    )


def local(tmp_path: Path, policy: SoftLabels, rows: list[TokenRow], *, shard_rows: int = 100) -> StoredRows:
    store = LocalStore(tmp_path / f"store-{shard_rows}")
    cache, keys = fill(store, rows, policy, shard_rows=shard_rows)
    return stored(cache, keys, rows, RangeCache(store, tmp_path / "copies", 1 << 20))


def assert_like(found: Targets, wanted: list[Targets]) -> None:
    """Equal row by row: ids and counts exactly, log-probabilities within the codec's bound."""
    start = 0
    for targets in wanted:
        end = start + len(targets.common.gold_logprob_N)
        assert torch.allclose(found.common.entropy_N[start:end], targets.common.entropy_N, atol=0.02)
        match targets:
            case SampledTargets():
                assert isinstance(found, SampledTargets)
                entries = slice(int(found.offsets_N1[start]), int(found.offsets_N1[end]))
                as_counts = [
                    dict(zip(t.ids_E[e].tolist(), t.counts_E[e].tolist(), strict=True))
                    for t, e in ((found, entries), (targets, slice(None)))
                ]
                assert torch.equal(found.offsets_N1[start : end + 1] - found.offsets_N1[start], targets.offsets_N1)
                assert as_counts[0] == as_counts[1]
            case TopKTargets():
                assert isinstance(found, TopKTargets)
                assert torch.equal(found.ids_NK[start:end].sort(-1).values, targets.ids_NK.sort(-1).values)
                assert torch.equal(found.log_tail_NG[start:end], targets.log_tail_NG)
            case DenseTargets():
                assert isinstance(found, DenseTargets)
                assert torch.equal(found.logprobs_NV[start:end], targets.logprobs_NV)
        start = end
    assert start == len(found.common.entropy_N)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_any_rows_in_any_order(tmp_path: Path, policy: SoftLabels) -> None:
    """Trap 16: alignment is by content."""
    rows = make_rows(230)
    reader = local(tmp_path, policy, rows)
    for picked in ([0], [229, 0, 117], random.Random(1).sample(range(230), 60), [5, 5, 4]):
        assert reader.read(picked) == [rows[i] for i in picked]
        assert_like(reader.targets(picked), [targets_of(i, rows[i], policy) for i in picked])


def test_a_prefetched_batch_is_decoded_once_and_let_go(tmp_path: Path) -> None:
    rows, policy = make_rows(230), POLICIES[0]
    reader, plain = (local(tmp_path / name, policy, rows) for name in ("ahead", "plain"))
    picked = step_rows(230, 50, seed=3, step=0)
    for part in (picked[:20], picked[20:]):
        reader.prefetch(part, soft=True)
    for part in (picked[20:], picked[:20], picked[:20], picked):
        found, wanted = reader.targets(part), plain.targets(part)
        assert torch.equal(found.ids_E, wanted.ids_E)
        assert torch.equal(found.offsets_N1, wanted.offsets_N1)
        assert_like(found, [targets_of(i, rows[i], policy) for i in part])
    assert not reader._ahead


def test_soft_labels_that_nobody_takes_are_let_go(tmp_path: Path) -> None:
    """The weight of the soft part may fall to 0 between the step that asks for labels and the one that reads."""
    rows = make_rows(40)
    reader = local(tmp_path, POLICIES[0], rows)
    reader.prefetch([3, 1, 2], soft=True)
    assert reader.read([3, 1, 2]) == [rows[i] for i in (3, 1, 2)]
    assert not reader._ahead


def test_what_a_step_reads_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    rows, policy = make_rows(230), POLICIES[0]
    readers = [local(tmp_path, policy, rows, shard_rows=size) for size in (230, 64, 7)]
    for step in range(6):
        picked = step_rows(230, 50, seed=3, step=step)
        found = [reader.targets(picked) for reader in readers]
        assert all(reader.read(picked) == [rows[i] for i in picked] for reader in readers)
        for other in found[1:]:
            assert torch.equal(other.offsets_N1, found[0].offsets_N1)
            assert torch.equal(other.common.gold_logprob_N, found[0].common.gold_logprob_N)


def test_ranks_read_disjoint_parts_of_the_same_step(tmp_path: Path) -> None:
    """Resume on another number of ranks: the step's rows are the same, only who reads them differs."""
    rows = make_rows(100)
    reader = local(tmp_path, POLICIES[0], rows)
    picked = step_rows(100, 12, seed=0, step=4)
    for ranks in (1, 2, 5):
        parts = [reader.read(picked[rank::ranks]) for rank in range(ranks)]
        assert sorted(tuple(row.ids) for part in parts for row in part) == sorted(rows[i].ids for i in picked)


class Remote(LocalStore):
    """A directory that says it is far away, and counts the requests for shards."""

    asked = 0

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.asked += 1
        return super().get_range(key, start, length)

    def local_path(self, key: str) -> None:
        return None


@pytest.mark.parametrize(("limit", "requests"), [(1 << 30, 3), (10_000, 7)], ids=["all fits", "a part fits"])
def test_a_shard_comes_in_one_request_where_all_of_it_will_be_read_and_kept(tmp_path: Path, limit: int, requests: int) -> None:
    """Two shards of 250 rows, row groups of 64 (4 each): of the second shard one group is asked for."""
    store, rows = Remote(tmp_path / "far"), make_rows(500)
    cache, keys = fill(store, rows, POLICIES[0], shard_rows=250)
    first, second = cache.snapshot().commits
    wanted = [*first.keys, *second.keys[70:80]]
    numbers = [keys.index(key) for key in wanted]
    reader = stored(cache, wanted, [rows[i] for i in numbers], RangeCache(store, tmp_path / "copies", limit))
    store.asked = 0
    assert reader.read(list(range(len(wanted)))) == [rows[i] for i in numbers]
    # all fits: the first shard; the second one's group and its footer, which are not neighbours. Else 4 + 1 groups and 2 footers.
    assert store.asked == requests


@pytest.mark.stack
def test_the_same_from_s3_and_the_second_epoch_from_this_disk(tmp_path: Path, seaweed, s3_environment) -> None:
    from kd_core.recipe import S3Options
    from kd_core.store import open_store

    rows, policy = make_rows(150), POLICIES[0]
    store = open_store("s3://distillery/reader", S3Options(endpoint=seaweed.urls["s3"]))
    cache, keys = fill(store, rows, policy, shard_rows=70)
    picked = step_rows(150, 150, seed=1, step=0)
    here = local(tmp_path, policy, rows)
    there = stored(cache, keys, rows, RangeCache(store, tmp_path / "copies", 1 << 30))
    assert there.read(picked) == here.read(picked)
    wanted, found = here.targets(picked), there.targets(picked)
    assert torch.equal(found.ids_E, wanted.ids_E)
    assert torch.equal(found.counts_E, wanted.counts_E)
    copies = [path for path in (tmp_path / "copies").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in copies) == sum(commit.size_bytes for commit in cache.snapshot().commits)
    for info in list(store.list("rows/")):
        if info.key.endswith(".parquet"):
            store.delete(info.key)  # the second reader finds all of it on this disk
    again = stored(cache, keys, rows, RangeCache(store, tmp_path / "copies", 1 << 30))
    assert again.read(picked) == here.read(picked)


def test_a_flipped_byte_is_met_before_a_step_sees_the_row(tmp_path: Path) -> None:
    rows = make_rows(100)
    reader = local(tmp_path, POLICIES[0], rows)
    (file,) = (tmp_path / "store-100" / "rows").rglob("*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    with pytest.raises(QuarantinedError, match=f"{file.name}.*quarantine"):
        reader.targets(list(range(100)))
    assert not file.exists()


def test_a_row_without_soft_labels_is_an_error(tmp_path: Path) -> None:
    """Trap 13: no fallback to hard labels."""
    rows = make_rows(10)
    cache, keys = fill(LocalStore(tmp_path), rows[:8], POLICIES[0], shard_rows=8)
    with pytest.raises(ArtifactError, match="1 of 9 rows are missing"):
        stored(cache, [*keys, "f" * 32], rows[:8], RangeCache(cache.store, tmp_path / "copies", 0))
    table = pa.table({"ids": [list(row.ids) for row in rows], "first_supervised": [row.first_supervised for row in rows]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=3)
    plain = file_rows(tmp_path / "rows.parquet", None)
    assert plain.read([9, 0, 4]) == [rows[9], rows[0], rows[4]]
    with pytest.raises(SoftLabelError, match="no soft labels"):
        plain.targets([1])


def test_chosen_rows_of_a_file_are_numbered_anew(tmp_path: Path) -> None:
    rows = make_rows(10)
    table = pa.table({"ids": [list(row.ids) for row in rows], "first_supervised": [row.first_supervised for row in rows]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=4)
    chosen = file_rows(tmp_path / "rows.parquet", np.array([1, 5, 9]))
    assert chosen.read([2, 0]) == [rows[9], rows[1]]
    assert chosen.num_tokens.tolist() == [len(rows[i].ids) for i in (1, 5, 9)]


def test_only_a_bounded_number_of_rows_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_core.train.stored_rows._HELD_ROWS", 128)
    rows = make_rows(64 * 6)
    reader = local(tmp_path, POLICIES[0], rows, shard_rows=64)
    for i in range(0, len(rows), 16):
        reader.prefetch([min(i + 200, len(rows) - 1)], soft=False)
        assert reader.read([i, i + 1]) == rows[i : i + 2]
        assert len(reader._held) <= 2


@pytest.mark.parametrize(
    ("group_rows", "held_rows", "fetched"),
    [(64, 256, [3]), (64, 255, []), (50, 256, []), (50, 460, [4]), (1, 256, [200]), (300, 640, [0])],
    ids=["fit", "do not fit", "groups that do not begin with blocks", "their neighbours fit", "rows of their own", "all rows fit"],
)
def test_rows_of_the_next_buffer_are_fetched_where_two_fit(
    monkeypatch: pytest.MonkeyPatch, group_rows: int, held_rows: int, fetched: list[int]
) -> None:
    monkeypatch.setattr("kd_core.train.stored_rows.BUFFER_BLOCKS", 2)
    monkeypatch.setattr("kd_core.train.stored_rows._HELD_ROWS", held_rows)
    loaded: list[int] = []

    class Groups:
        def load(self, number: int) -> Group:
            loaded.append(number)
            raise SoftLabelError("not asked for its rows")

    numbers = np.arange(640)
    reader = StoredRows(Groups(), numbers // group_rows, numbers % group_rows, num_tokens=numbers, first_supervised=numbers)
    reader.expect([200])
    reader._fetchers.shutdown()
    assert loaded == fetched


def test_a_group_has_the_asked_rows_alone(tmp_path: Path) -> None:
    rows, policy = make_rows(230), POLICIES[0]
    store = LocalStore(tmp_path / "store")
    cache, keys = fill(store, rows, policy, shard_rows=100)
    numbers = [200, 3, 7, 64, 65, 129]
    picked = [rows[i] for i in numbers]
    reader = stored(cache, [keys[i] for i in numbers], picked, RangeCache(store, tmp_path / "copies", 1 << 20))
    assert reader.read(range(6)) == picked
    assert_like(reader.targets([5, 0, 1, 2]), [targets_of(numbers[i], picked[i], policy) for i in (5, 0, 1, 2)])
    assert sum(len(group.result().first_supervised) for group in reader._held.values()) == 6
