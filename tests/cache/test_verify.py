"""Verify names what is damaged, whatever it is; repair puts it aside so that the rows are missing, and nothing else is touched."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kd_core.artifacts import find, publish
from kd_core.cache.repair import plan_repair, repair
from kd_core.cache.verify import verify
from kd_core.errors import IntegrityError, VersionError
from kd_core.fingerprint import canonical_json, sha256_bytes
from kd_core.rows.keys import soft_label_key
from kd_core.rows.schemas import CODEC_MODEL
from kd_core.rows.table import RowCache
from kd_core.softlabels.hidden import RowStates, encode_states
from kd_core.store import LocalStore
from kd_core.summaries import plain
from tests.standins import SCORING, SHARDS

A = "a" * 32
TEACHER = {"engine": "server", "model": "big"}
FP = "f" * 32


def cache_of(store: LocalStore) -> RowCache:
    return RowCache(store, "soft_labels", A)


def freeze(store: LocalStore, directory: Path, *, fp: str = FP, keys: list[str] | None = None) -> str:
    """A soft_labels record over what the cache holds now, as the stage writes it; returns its key."""
    snapshot = cache_of(store).snapshot()
    folder = directory / fp
    folder.mkdir()
    pq.write_table(pa.table({"key": sorted(keys if keys is not None else snapshot.keys())}), folder / "keys.parquet")
    shards = replace(SHARDS, rows=len(snapshot.keys()), namespace=A, commits=tuple(commit.sha256 for commit in snapshot.commits))
    publish(store, folder, stage="soft_labels", fp=fp, identity={}, upstream={}, summary=plain(replace(SCORING, shards=shards)))
    return f"artifacts/soft_labels/{fp}/record.json"


def flip(store: LocalStore, key: str, at: int) -> None:
    path = store.local_path(key)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def objects(store: LocalStore) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list("")}


def test_a_sound_cache_has_nothing_to_report(store, add_shard, tmp_path) -> None:
    ticks = []
    add_shard(store, range(20))
    add_shard(store, range(15, 23))
    freeze(store, tmp_path)
    before = objects(store)
    found = verify(store, tick=ticks.append)
    assert (found.commits, found.shards, found.rows, found.records, found.artifacts, found.damage) == (2, 2, 28, 1, 1, ())
    assert [(tick.done, tick.total) for tick in ticks] == [(1, 3), (2, 3), (3, 3)]
    assert plan_repair(store, found.damage) == ()
    assert objects(store) == before


def test_every_97th_byte_of_a_shard_is_named(store, add_shard) -> None:
    commit = add_shard(store, range(10))
    key = cache_of(store).shard_key(commit)
    for at in range(0, commit.size_bytes, 97):
        flip(store, key, at)
        [damage] = verify(store).damage
        flip(store, key, at)
        part = next(i for i, part in enumerate(commit.ranges) if part.start <= at < part.start + part.length)
        name = "footer" if part == len(commit.ranges) - 1 else f"row group {part}"
        assert (damage.key, damage.shard, damage.also) == (key, commit.sha256, (cache_of(store).commit_key(commit),))
        assert damage.reason.startswith(f"sha256 of its {name} ")
    assert verify(store).damage == ()


def test_every_byte_of_a_commit_and_of_a_record_is_named(store, add_shard, tmp_path) -> None:
    commit = add_shard(store, range(3))
    record = freeze(store, tmp_path)
    for key in (cache_of(store).commit_key(commit), record):
        size = len(store.get(key))
        for at in range(0, size, 13):
            flip(store, key, at)
            if key == record:  # blank space between fields may change: the record's content is what is protected
                try:
                    find(store, "soft_labels", FP)
                except IntegrityError:
                    assert [found.key for found in verify(store).damage] == [key]
            else:
                assert key in [found.key for found in verify(store).damage]
            flip(store, key, at)
    assert verify(store).damage == ()


def test_a_lost_shard_a_lost_payload_and_a_missing_row_are_damage(store, add_shard, tmp_path) -> None:
    commit = add_shard(store, range(5))
    record = freeze(store, tmp_path)
    wrong = freeze(store, tmp_path, fp="e" * 32, keys=["nowhere", *commit.keys])
    short = freeze(store, tmp_path, fp="d" * 32, keys=list(commit.keys[:2]))
    [payload] = [info.key for info in store.list("artifacts/soft_labels/" + "d" * 32) if info.key.endswith(".parquet")]
    store.delete(payload)
    store.delete(cache_of(store).shard_key(commit))
    found = {damage.key: damage.reason for damage in verify(store).damage}
    assert found.keys() == {cache_of(store).shard_key(commit), wrong, payload}
    assert found[cache_of(store).shard_key(commit)] == "gone, and a commit names it"
    assert found[wrong] == "1 of 6 rows it names are in no commit, first nowhere"
    assert found[payload].startswith("gone, and its record names it")
    assert short in [key for damage in verify(store).damage for key in damage.also]
    assert record not in found


def rewritten(store: LocalStore, change, *, model=lambda model: model) -> None:
    """The only shard, its table changed, committed with right checksums: damage that only the content shows."""
    cache = cache_of(store)
    [commit] = cache.snapshot().commits
    table = cache.read_shard(commit)
    store.delete(cache.commit_key(commit))
    store.delete(cache.shard_key(commit))
    cache.commit(change(table), num_tokens=commit.num_tokens, metadata={CODEC_MODEL: model(table.schema.metadata[CODEC_MODEL])})


def _set(name: str, row: int, value):
    def change(table: pa.Table) -> pa.Table:
        column = table[name].to_pylist()
        column[row] = value(column[row])
        index = table.schema.get_field_index(name)
        return table.set_column(index, table.schema.field(name), pa.array(column, table.schema.field(name).type))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("targets", 3, lambda blob: blob[:-1]), "does not decode"),
        (_set("targets", 3, lambda blob: b""), "does not decode"),
        (_set("ids", 3, lambda ids: [*ids[:-1], 23 - ids[-1]]), "its tokens give another key"),
        (_set("num_supervised", 3, lambda n: n + 1), "supervised tokens are said, and it has"),
    ],
)
def test_a_shard_of_right_bytes_and_wrong_content_is_named(store, add_shard, change, said) -> None:
    add_shard(store, range(6))
    rewritten(store, change)
    [commit] = cache_of(store).snapshot().commits
    [damage] = verify(store).damage
    assert (damage.key, damage.shard) == (cache_of(store).shard_key(commit), commit.sha256)
    assert said in damage.reason
    assert commit.keys[3] in damage.reason


@pytest.mark.parametrize("changed", ["blob", "model", "commit", "about"])
def test_another_version_is_no_damage(store, add_shard, changed) -> None:
    """Rows that newer code wrote were paid for: repair must not get to see them."""
    add_shard(store, range(6))
    cache = cache_of(store)
    if changed == "blob":
        rewritten(store, _set("targets", 3, lambda blob: b"\7" + blob[1:]))
    elif changed == "model":
        rewritten(store, lambda table: table, model=lambda model: model[:4] + b"\7" + model[5:])
    else:
        key = cache.commit_key(cache.snapshot().commits[0]) if changed == "commit" else f"{cache.prefix}/about.json"
        other = canonical_json({**json.loads(store.get(key)), "version": 7})
        store.delete(key)
        store.create(f"{cache.prefix}/commits/{sha256_bytes(other)}.json" if changed == "commit" else key, other)
    with pytest.raises(VersionError, match=r"of version 7; this code reads version 1; update the package"):
        verify(store)


def _states(num: int) -> bytes:
    codes = torch.arange(num * 8, dtype=torch.int8).reshape(num, 2, 4)
    return encode_states(RowStates((0, 3), codes, torch.ones(num, 2)))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda row: {}, None),
        (lambda row: {"states": row["states"][:-1]}, "does not decode"),
        (lambda row: {"states": _states(row["num_supervised"] + 1)}, "supervised tokens"),
        (lambda row: {"ids": row["ids"][::-1]}, "its tokens give another key"),
    ],
)
def test_hidden_states_are_verified_row_by_row(store, broken, said) -> None:
    cache, table = RowCache(store, "hidden_states", A), []
    cache.describe({"teacher": TEACHER, "hidden_states": {"blocks": [0, 3]}})
    for first in (1, 2, 3):
        ids = [5, 6, 7, 8, 9]
        row = {"key": soft_label_key(A, ids, first), "ids": ids, "first_supervised": first, "num_supervised": 5 - first}
        table.append({**row, "states": _states(5 - first)})
    table[1] |= broken(table[1])
    commit = cache.commit(pa.Table.from_pylist(table), num_tokens=9)
    damage = verify(store).damage
    if said is None:
        assert damage == ()
    else:
        [found] = damage
        assert found.key == cache.shard_key(commit)
        assert commit.keys[1] in found.reason
        assert said in found.reason


def test_a_sample_reads_its_share_and_all_commits(store, add_shard) -> None:
    for start in range(0, 20, 2):
        add_shard(store, [start, start + 1])
    assert [verify(store, sample=share).shards for share in (1.0, 0.5, 0.01)] == [10, 5, 1]
    assert verify(store, sample=0.5).commits == 10


def test_repair_puts_aside_what_is_lost_and_who_relied_on_it(store, add_shard, tmp_path) -> None:
    """Two shards, one damaged; a record over both goes, a later one over the sound shard alone stays."""
    sound = add_shard(store, range(5, 9))
    kept = freeze(store, tmp_path, fp="e" * 32)
    lost = add_shard(store, range(5))
    gone = freeze(store, tmp_path)
    cache = cache_of(store)
    flip(store, cache.shard_key(lost), 100)
    before = objects(store)
    moves = plan_repair(store, verify(store).damage)
    assert objects(store) == before
    assert [move.key for move in moves] == [gone, cache.commit_key(lost), cache.shard_key(lost)]
    assert moves[0].reason == f"it froze the lost shard {lost.sha256[:12]}"
    repair(store, moves)
    after = objects(store)
    assert after == {f"quarantine/{key}" if key in [move.key for move in moves] else key: data for key, data in before.items()}
    assert set(cache.snapshot().keys()) == set(sound.keys)
    assert verify(store).damage == ()
    assert find(store, "soft_labels", FP) is None
    assert find(store, "soft_labels", kept.split("/")[2]) is not None


def test_a_repair_that_is_killed_anywhere_is_finished_by_the_next(store, add_shard, tmp_path) -> None:
    """After each step: no record stands that names lost rows unseen, and a second repair ends in a sound cache."""
    for stop in range(4):
        at = LocalStore(tmp_path / f"{stop}")
        commit = add_shard(at, range(5))
        (tmp_path / f"r{stop}").mkdir()
        freeze(at, tmp_path / f"r{stop}")
        flip(at, cache_of(at).shard_key(commit), 100)
        moves = plan_repair(at, verify(at).damage)
        assert len(moves) == 3
        repair(at, moves[:stop])
        if cache_of(at).snapshot().commits == ():
            assert find(at, "soft_labels", FP) is None
        repair(at, plan_repair(at, verify(at).damage))
        assert verify(at).damage == ()
        assert (cache_of(at).snapshot().commits, find(at, "soft_labels", FP)) == ((), None)


def test_a_repaired_cache_takes_the_rows_again_and_may_break_again(store, add_shard, tmp_path) -> None:
    for at in (100, 200):
        commit = add_shard(store, range(5))
        flip(store, cache_of(store).shard_key(commit), at)
        repair(store, plan_repair(store, verify(store).damage))
    commit = add_shard(store, range(5))
    assert verify(store).damage == ()
    assert set(cache_of(store).snapshot().keys()) == set(commit.keys)
    assert len([info for info in store.list("quarantine/") if ".parquet" in info.key]) == 2


def test_what_cannot_be_read_is_put_aside_too(store, add_shard, tmp_path) -> None:
    commit = add_shard(store, range(3))
    record = freeze(store, tmp_path)
    for key in (cache_of(store).commit_key(commit), f"rows/soft_labels/{A}/about.json", record):
        store.local_path(key).write_bytes(b"{")
    moves = plan_repair(store, verify(store).damage)
    assert {move.key for move in moves} == {cache_of(store).commit_key(commit), f"rows/soft_labels/{A}/about.json", record}
    repair(store, moves)
    assert verify(store).damage == ()
    assert not cache_of(store).snapshot().commits
