"""Row stores: commits count, duplicates are resolved one way, holes and damage are named."""

import itertools
import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from kd_core.errors import ArtifactError, IntegrityError, QuarantinedError, StoreError, VersionError
from kd_core.fingerprint import canonical_json, sha256_bytes
from kd_core.rows.parquet import parse_shard, write_shard
from kd_core.rows.table import Commit, RowCache, Shard
from kd_core.rows.work import Packed, work_in_shards
from kd_core.store import LocalStore

ROWS = [(f"k{i}", i) for i in range(7)]


def table(rows: list[tuple[str, int]], factor: int = 10) -> pa.Table:
    return pa.table({"key": [key for key, _ in rows], "value": [factor * value for _, value in rows]})


def packed(rows: pa.Table) -> Packed:
    return Packed(rows, rows.num_rows)


def commit(cache: RowCache, rows: pa.Table) -> Commit:
    return cache.commit(rows, num_tokens=rows.num_rows)


def cache_at(path: Path) -> RowCache:
    return RowCache(LocalStore(path), "answers", "n" * 32)


def values(cache: RowCache, keys: list[str]) -> list[int]:
    return cache.read(cache.snapshot(), keys)["value"].to_pylist()


def test_rows_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    commit(cache, table(ROWS[:3]))
    commit(cache, table(ROWS[3:]))
    assert values(cache, ["k6", "k0", "k3", "k0"]) == [60, 0, 30, 0]
    assert cache.snapshot().keys() == {key for key, _ in ROWS}
    assert cache.snapshot().size_bytes() == sum(file.stat().st_size for file in tmp_path.rglob("*.parquet"))


def test_only_missing_rows_are_computed_shard_by_shard(tmp_path: Path) -> None:
    cache, asked, done = cache_at(tmp_path), [], []

    def compute(shard: list[tuple[str, int]]) -> pa.Table:
        asked.append([key for key, _ in shard])
        return table(shard)

    assert work_in_shards(cache, lambda: ROWS[:4], compute, packed, shard_rows=3, done=done.append)[1] == 4
    assert (asked, sum(done)) == ([["k0", "k1", "k2"], ["k3"]], 4)
    snapshot, computed = work_in_shards(cache, lambda: [*ROWS, ROWS[0]], compute, packed, shard_rows=3, done=done.append)
    assert (computed, asked[2:], sum(done)) == (3, [["k4", "k5", "k6"]], 4 + 7)
    assert len(snapshot.commits) == 3
    assert work_in_shards(cache, lambda: ROWS, compute, packed, shard_rows=3, done=done.append)[1] == 0
    assert len(asked) == 3


def test_a_broken_run_goes_on_with_the_same_shards(tmp_path: Path) -> None:
    """Trap 18: what was committed stays, what was not is computed again; the second run is complete."""

    def failing(shard: list[tuple[str, int]]) -> pa.Table:
        if shard[0][0] == "k4":
            raise OSError("the machine is gone")
        return table(shard)

    broken, unbroken = cache_at(tmp_path / "broken"), cache_at(tmp_path / "unbroken")
    with pytest.raises(OSError, match="the machine is gone"):
        work_in_shards(broken, lambda: ROWS, failing, packed, shard_rows=2, done=lambda _: None)
    assert broken.snapshot().keys() == {"k0", "k1", "k2", "k3"}
    snapshot, computed = work_in_shards(broken, lambda: ROWS, table, packed, shard_rows=2, done=lambda _: None)
    assert computed == 3
    assert snapshot == work_in_shards(unbroken, lambda: ROWS, table, packed, shard_rows=2, done=lambda _: None)[0]


@pytest.mark.parametrize("point", ["answers.shard", "answers.commit"])
def test_a_shard_counts_once_its_commit_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    cache = cache_at(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("kd_core.failpoints._reached", {point: 0})
        patch.setenv("KD_FAILPOINT", f"{point}:1:error")
        with pytest.raises(OSError, match="fail point"):
            commit(cache, table(ROWS))
    assert bool(cache.snapshot().commits) == (point == "answers.commit")
    commit(cache, table(ROWS))
    assert len(cache.snapshot().commits) == 1


def test_duplicates_are_resolved_the_same_way_for_every_reader(tmp_path: Path) -> None:
    """Three workers computed overlapping rows with different results: the shard with the smallest checksum wins a key."""
    shards = [table(ROWS[:4], 1), table(ROWS[2:6], 2), table(ROWS[3:], 3)]
    keys = [key for key, _ in ROWS]
    found = []
    for i, order in enumerate(itertools.permutations(shards)):
        cache = cache_at(tmp_path / str(i))
        commits = sorted((commit(cache, shard).sha256, shard) for shard in order)
        expected = {}
        for _, shard in reversed(commits):
            expected.update(zip(shard["key"].to_pylist(), shard["value"].to_pylist(), strict=True))
        found.append(values(cache, keys))
        assert found[-1] == [expected[key] for key in keys]
    assert len({tuple(row) for row in found}) == 1


def test_missing_rows_raise_counted_and_named(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    commit(cache, table(ROWS[:2]))
    with pytest.raises(ArtifactError, match=r"rows/answers/n{32}: 2 of 3 rows are missing, first k5"):
        cache.read(cache.snapshot(), ["k5", "k0", "k6"])


def test_asking_for_no_rows_is_a_bug(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    with pytest.raises(AssertionError, match="no rows"):
        cache.read(cache.snapshot(), [])


def test_namespaces_and_tables_do_not_mix(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    commit(cache, table(ROWS))
    assert RowCache(cache.store, "answers", "m" * 32).snapshot().commits == ()
    assert RowCache(cache.store, "soft_labels", "n" * 32).snapshot().commits == ()


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_flipped_byte_in_a_shard_is_refused_by_name(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    sha256 = commit(cache, table(ROWS)).sha256
    damage(tmp_path / cache.prefix / "shards" / f"{sha256}.parquet")
    with pytest.raises(IntegrityError, match=rf"{tmp_path}/{cache.prefix}/shards/{sha256}\.parquet: its sha256 differs .*quarantine"):
        values(cache, ["k0"])


def test_every_flipped_byte_of_a_commit_is_refused_by_name(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    commit(cache, table(ROWS))
    (file,) = (tmp_path / cache.prefix / "commits").iterdir()
    data = file.read_bytes()
    for at in range(len(data)):
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(IntegrityError, match=rf"commits/{file.name}: not a valid commit .*kd cache repair"):
            cache.snapshot()


@pytest.mark.parametrize("body", [b"", b"[]", b'{"sha256": "x"}', b"\xff\xfe"])
def test_a_commit_that_is_none_is_refused(tmp_path: Path, body: bytes) -> None:
    cache = cache_at(tmp_path)
    cache.store.create(f"{cache.prefix}/commits/{'0' * 64}.json", body)
    with pytest.raises(IntegrityError, match="not a valid commit"):
        cache.snapshot()


def test_a_commit_whose_shard_is_gone_is_an_error(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    sha256 = commit(cache, table(ROWS)).sha256
    cache.store.delete(f"{cache.prefix}/shards/{sha256}.parquet")
    with pytest.raises(StoreError, match=f"{sha256}"):
        values(cache, ["k0"])


def test_a_shard_name_that_holds_other_bytes_is_not_committed(tmp_path: Path) -> None:
    cache, other = cache_at(tmp_path), cache_at(tmp_path / "other")
    made = commit(other, table(ROWS))
    cache.store.create(f"{cache.prefix}/shards/{made.sha256}.parquet", b"somebody else")
    with pytest.raises(IntegrityError, match="holds other bytes than its name says"):
        commit(cache, table(ROWS))
    assert cache.snapshot().commits == ()


def test_a_shard_with_a_duplicate_key_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="each key once"):
        commit(cache_at(tmp_path), table([*ROWS, ROWS[0]]))


def test_a_commit_lists_what_its_shard_holds(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    made = commit(cache, table(ROWS))
    (info,) = cache.store.list(f"{cache.prefix}/commits/")
    raw = json.loads(cache.store.get(info.key))
    assert (raw["sha256"], raw["size_bytes"], raw["keys"]) == (made.sha256, made.size_bytes, list(made.keys))
    assert (raw["num_rows"], raw["num_tokens"]) == (len(ROWS), len(ROWS))
    ends = [start + length for start, length, _, _ in raw["ranges"]]
    assert [start for start, *_ in raw["ranges"]] == [0, *ends[:-1]]
    assert ends[-1] == made.size_bytes


# ------------------------------------------------------------------------------------------- row groups, damage


def shard_of(cache: RowCache, made: Commit) -> Shard:
    return Shard.open(cache, made, lambda key, part: part.verified(cache.store.get_range(key, part.start, part.length)))


def large(cache: RowCache) -> Commit:
    blobs = pa.array([bytes([i]) * (i + 1) for i in range(150)], pa.binary())
    rows = pa.table({"key": [f"k{i:03d}" for i in range(150)], "targets": blobs})
    return cache.commit(rows, num_tokens=150, metadata={b"kd.codec_model": b"\x00\xff model"})


def test_row_groups_are_read_one_by_one(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    made = large(cache)
    shard = shard_of(cache, made)
    assert [part.num_rows for part in made.ranges] == [64, 64, 22, 0]
    assert shard.metadata[b"kd.codec_model"] == b"\x00\xff model"
    rows = pa.concat_tables([shard.group(i) for i in range(3)])
    assert rows.equals(cache.read_shard(made))
    assert tuple(rows["key"].to_pylist()) == made.keys


def test_the_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    assert large(cache_at(tmp_path / "a")) == large(cache_at(tmp_path / "b"))


def test_token_ids_take_less_than_two_bytes_and_a_query_engine_reads_them(tmp_path: Path) -> None:
    """A list column is named by its path in Parquet: ``compression={"ids": ...}`` says nothing about it."""
    generator = np.random.default_rng(0)
    ids = [np.exp(generator.random(200) * np.log(49_152)).astype(np.int32) for _ in range(100)]
    rows = pa.table({"key": [str(i) for i in range(100)], "ids": pa.array(ids, pa.list_(pa.int32())), "targets": [b"x"] * 100})
    data, _ = write_shard(rows, {})
    assert len(data) < 2 * 100 * 200
    assert parse_shard(data).equals(rows)
    (tmp_path / "shard.parquet").write_bytes(data)
    found = duckdb.connect().execute("SELECT sum(list_sum(ids)) FROM read_parquet(?)", [str(tmp_path / "shard.parquet")]).fetchone()
    assert found == (sum(int(row.sum()) for row in ids),)


def test_every_flipped_byte_of_a_shard_is_met_before_a_row_is(tmp_path: Path) -> None:
    """Row group by row group, footer first: no byte of a shard is outside every checksum."""
    cache = cache_at(tmp_path)
    made = large(cache)
    data = cache.store.get(cache.shard_key(made))
    for at in range(0, len(data), 7):
        broken = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]

        def fetch(key: str, part, broken: bytes = broken) -> bytes | None:
            return part.verified(broken[part.start : part.start + part.length])

        def read_all() -> None:
            shard = Shard.open(cache, made, fetch)
            for i in range(3):
                shard.group(i)

        with pytest.raises(IntegrityError, match=rf"shards/{made.sha256}\.parquet: bytes \d+ to \d+ differ.*a second read was right"):
            read_all()
    assert cache.snapshot().commits == (made,), "the store's own bytes are right: nothing was moved"


def test_a_damaged_shard_is_moved_aside_and_its_rows_are_computed_again(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    snapshot, _ = work_in_shards(cache, lambda: ROWS, table, packed, shard_rows=4, done=lambda _: None)
    bad = snapshot.commits[0]
    damage(tmp_path / cache.shard_key(bad))
    with pytest.raises(QuarantinedError, match=f"{bad.sha256}.*{len(bad.keys)} rows are computed again"):
        shard_of(cache, bad).group(0)
    assert (tmp_path / "quarantine" / cache.shard_key(bad)).is_file()
    assert (tmp_path / "quarantine" / cache.commit_key(bad)).is_file()
    with pytest.raises(QuarantinedError, match="1 of 2 shards of a finished stage are gone"):
        cache.snapshot().frozen([commit.sha256 for commit in snapshot.commits])
    again, computed = work_in_shards(cache, lambda: ROWS, table, packed, shard_rows=4, done=lambda _: None)
    assert (computed, again) == (len(bad.keys), snapshot)


def test_the_death_of_the_writer_stops_the_work(tmp_path: Path) -> None:
    cache, asked = cache_at(tmp_path), []

    def compute(shard: list[tuple[str, int]]) -> pa.Table:
        asked.append(shard[0][0])
        return table(shard)

    def failing(rows: pa.Table) -> Packed:
        raise StoreError("no space left")

    with pytest.raises(StoreError, match="no space left"):
        work_in_shards(cache, lambda: [(f"k{i}", i) for i in range(100)], compute, failing, shard_rows=1, done=lambda _: None)
    assert len(asked) <= 4
    assert cache.snapshot().commits == ()


def test_rows_are_taken_from_the_iterator_as_they_are_needed(tmp_path: Path) -> None:
    taken = []

    def rows():
        for i in range(10):
            taken.append(i)
            yield f"k{i}", i

    def compute(shard: list[tuple[str, int]]) -> pa.Table:
        assert len(taken) == shard[-1][1] + 1
        return table(shard)

    assert work_in_shards(cache_at(tmp_path), rows, compute, packed, shard_rows=3, done=lambda _: None)[1] == 10


def test_a_shard_whose_rows_were_all_refused_leaves_no_commit(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    snapshot, computed = work_in_shards(
        cache, lambda: ROWS, table, lambda rows: Packed(rows.slice(0, 0), 0), shard_rows=7, done=lambda _: None
    )
    assert (snapshot.commits, computed) == ((), 7)


UNKNOWN = "of version 7; this code reads version 1; update the package, or use another store"


def test_a_commit_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    made = commit(cache, table(ROWS))
    raw = json.loads(cache.store.get(cache.commit_key(made)))
    assert raw["version"] == 1
    other = canonical_json({**raw, "version": 7})
    cache.store.create(f"{cache.prefix}/commits/{sha256_bytes(other)}.json", other)
    with pytest.raises(VersionError, match=rf"{tmp_path}/{cache.prefix}/commits/{sha256_bytes(other)}\.json: a commit {UNKNOWN}"):
        cache.snapshot()


def test_a_row_table_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.store.create(f"{cache.prefix}/about.json", b'{"version": 7, "words": []}')
    for call in (lambda: cache.describe({"teacher": {}}), cache.description):
        with pytest.raises(VersionError, match=rf"{tmp_path}/{cache.prefix}/about\.json: a row table {UNKNOWN}"):
            call()


def test_a_namespace_says_what_it_is_once(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    cache.describe({"teacher": {"weights": "abc"}})
    cache.describe({"teacher": {"weights": "abc"}})
    place = {"table": "answers", "namespace": cache.namespace}
    assert json.loads(cache.store.get(cache.about_key))["about"] == {**place, "teacher": {"weights": "abc"}}
    with pytest.raises(IntegrityError, match="another description"):
        cache.describe({"teacher": {"weights": "abd"}})


def test_workers_share_the_rows_and_finish_for_one_that_died(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    rows = [(f"k{i}", i) for i in range(20)]
    share = {"shard_rows": 2, "done": lambda _: None, "num_workers": 3}

    def dying(shard: list[tuple[str, int]]) -> pa.Table:
        if shard[0][1] >= 10:
            raise OSError("gone")
        return table(shard)

    with pytest.raises(OSError, match="gone"):
        work_in_shards(cache, lambda: rows, dying, packed, worker=1, **share)
    assert cache.snapshot().keys() == {"k2", "k3", "k8", "k9"}
    asked: list[str] = []

    def compute(shard: list[tuple[str, int]]) -> pa.Table:
        asked.extend(key for key, _ in shard)
        return table(shard)

    snapshot, computed = work_in_shards(cache, lambda: rows, compute, packed, worker=0, **share)
    assert (snapshot.keys(), computed) == ({key for key, _ in rows}, 16)
    assert len(asked) == len(set(asked)) == 16
    assert work_in_shards(cache, lambda: rows, compute, packed, worker=2, **share) == (snapshot, 0)


def test_of_two_readers_that_meet_the_damage_both_know_it_was_moved(tmp_path: Path) -> None:
    cache = cache_at(tmp_path)
    bad = large(cache)
    damage(tmp_path / cache.shard_key(bad))
    one, other = shard_of(cache, bad), shard_of(cache, bad)
    assert other.metadata  # it has seen the footer before
    with pytest.raises(QuarantinedError, match="differ from their checksum"):
        [one.group(i) for i in range(3)]
    with pytest.raises(QuarantinedError, match="another reader found it damaged"):
        other.group(0)
    assert isinstance(cache.quarantine(bad, "again"), QuarantinedError)
    with pytest.raises(QuarantinedError):
        cache.read_shard(bad)
