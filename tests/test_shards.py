"""Rows that grow: commits count, doubles are resolved one way, holes and damage are named."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pytest

from kd_core.errors import ArtifactError, IntegrityError, StoreError
from kd_core.shards import RowCache, work_in_shards
from kd_core.store import LocalStore

ROWS = [(f"k{i}", i) for i in range(7)]


def table(rows: list[tuple[str, int]], factor: int = 10) -> pa.Table:
    return pa.table({"key": [key for key, _ in rows], "value": [factor * value for _, value in rows]})


def cache_at(path: Path) -> RowCache:
    return RowCache(LocalStore(path), "answers", "n" * 32)


def values(cache: RowCache, keys: list[str]) -> list[int]:
    return cache.read(cache.snapshot(), keys)["value"].to_pylist()


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.commit(table(ROWS[:3]))
    cache.commit(table(ROWS[3:]))
    assert values(cache, ["k6", "k0", "k3", "k0"]) == [60, 0, 30, 0]
    assert cache.snapshot().keys() == {key for key, _ in ROWS}
    assert cache.snapshot().size_bytes() == sum(file.stat().st_size for file in tmp_path.rglob("*.parquet"))


def test_only_missing_rows_are_computed_shard_by_shard(tmp_path: Path) -> None:
    cache, asked, done = cache_at(tmp_path), [], []

    def compute(shard: list[tuple[str, int]]) -> pa.Table:
        asked.append([key for key, _ in shard])
        return table(shard)

    assert work_in_shards(cache, ROWS[:4], compute, shard_rows=3, done=done.append)[1] == 4
    assert (asked, done) == ([["k0", "k1", "k2"], ["k3"]], [0, 3, 1])
    snapshot, computed = work_in_shards(cache, [*ROWS, ROWS[0]], compute, shard_rows=3, done=done.append)
    assert (computed, asked[2:], done[3:]) == (3, [["k4", "k5", "k6"]], [4, 3])
    assert len(snapshot.commits) == 3
    assert work_in_shards(cache, ROWS, compute, shard_rows=3, done=done.append)[1] == 0
    assert len(asked) == 3


def test_a_broken_run_goes_on_with_the_same_shards(tmp_path: Path) -> None:
    """Trap 18: what was committed stays, what was not is computed again; the second run is complete."""

    def failing(shard: list[tuple[str, int]]) -> pa.Table:
        if shard[0][0] == "k4":
            raise OSError("the machine is gone")
        return table(shard)

    broken, unbroken = cache_at(tmp_path / "broken"), cache_at(tmp_path / "unbroken")
    with pytest.raises(OSError, match="the machine is gone"):
        work_in_shards(broken, ROWS, failing, shard_rows=2, done=lambda _: None)
    assert broken.snapshot().keys() == {"k0", "k1", "k2", "k3"}
    snapshot, computed = work_in_shards(broken, ROWS, table, shard_rows=2, done=lambda _: None)
    assert computed == 3
    assert snapshot == work_in_shards(unbroken, ROWS, table, shard_rows=2, done=lambda _: None)[0]


@pytest.mark.parametrize("point", ["answers.shard", "answers.commit"])
def test_a_shard_counts_once_its_commit_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    cache = cache_at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.failpoints._reached", {point: 0})
        patch.setenv("KD_FAILPOINT", f"{point}:1:error")
        with pytest.raises(OSError, match="fail point"):
            cache.commit(table(ROWS))
    assert bool(cache.snapshot().commits) == (point == "answers.commit")
    cache.commit(table(ROWS))
    assert len(cache.snapshot().commits) == 1


def test_doubled_rows_are_resolved_the_same_way_for_every_reader(tmp_path: Path) -> None:
    """Three workers computed overlapping rows with different results: the shard with the smallest checksum wins a key."""
    shards = [table(ROWS[:4], 1), table(ROWS[2:6], 2), table(ROWS[3:], 3)]
    keys = [key for key, _ in ROWS]
    found = []
    for i, order in enumerate(itertools.permutations(shards)):
        cache = cache_at(tmp_path / str(i))
        commits = sorted((cache.commit(shard).sha256, shard) for shard in order)
        expected = {}
        for _, shard in reversed(commits):
            expected.update(zip(shard["key"].to_pylist(), shard["value"].to_pylist(), strict=True))
        found.append(values(cache, keys))
        assert found[-1] == [expected[key] for key in keys]
    assert len({tuple(row) for row in found}) == 1


def test_missing_rows_raise_counted_and_named(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.commit(table(ROWS[:2]))
    with pytest.raises(ArtifactError, match=r"rows/answers/n{32}: 2 of 3 rows are missing, first k5"):
        cache.read(cache.snapshot(), ["k5", "k0", "k6"])


def test_asking_for_no_rows_is_a_bug(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    with pytest.raises(AssertionError, match="no rows"):
        cache.read(cache.snapshot(), [])


def test_namespaces_and_tables_do_not_mix(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.commit(table(ROWS))
    assert RowCache(cache.store, "answers", "m" * 32).snapshot().commits == ()
    assert RowCache(cache.store, "soft_labels", "n" * 32).snapshot().commits == ()


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_byte_in_a_shard_is_refused_by_name(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    sha256 = cache.commit(table(ROWS)).sha256
    damage(tmp_path / cache.prefix / "shards" / f"{sha256}.parquet")
    with pytest.raises(IntegrityError, match=rf"{tmp_path}/{cache.prefix}/shards/{sha256}\.parquet: sha256 differs from its name"):
        values(cache, ["k0"])


def test_every_flipped_byte_of_a_commit_is_refused_by_name(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.commit(table(ROWS))
    (file,) = (tmp_path / cache.prefix / "commits").iterdir()
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(IntegrityError, match=rf"commits/{file.name}: not a valid commit .*delete it"):
            cache.snapshot()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"sha256": "x"}', b"\xff\xfe"])
def test_a_commit_that_is_none_is_refused(tmp_path: Path, body: bytes) -> None:
    cache = cache_at(tmp_path)
    cache.store.create(f"{cache.prefix}/commits/{'0' * 64}.json", body)
    with pytest.raises(IntegrityError, match="not a valid commit"):
        cache.snapshot()


def test_a_commit_whose_shard_is_gone_is_an_error(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    sha256 = cache.commit(table(ROWS)).sha256
    cache.store.delete(f"{cache.prefix}/shards/{sha256}.parquet")
    with pytest.raises(StoreError, match=f"{sha256}"):
        values(cache, ["k0"])


def test_a_shard_name_that_holds_other_bytes_is_not_committed(tmp_path: Path) -> None:
    cache, other = cache_at(tmp_path), cache_at(tmp_path / "other")
    commit = other.commit(table(ROWS))
    cache.store.create(f"{cache.prefix}/shards/{commit.sha256}.parquet", b"somebody else")
    with pytest.raises(IntegrityError, match="holds other bytes than its name says"):
        cache.commit(table(ROWS))
    assert cache.snapshot().commits == ()


def test_a_shard_with_a_doubled_key_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="each key once"):
        cache_at(tmp_path).commit(table([*ROWS, ROWS[0]]))


def test_a_commit_lists_what_its_shard_holds(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    commit = cache.commit(table(ROWS))
    (info,) = cache.store.list(f"{cache.prefix}/commits/")
    assert json.loads(cache.store.get(info.key)) == {"sha256": commit.sha256, "size_bytes": commit.size_bytes, "keys": list(commit.keys)}
