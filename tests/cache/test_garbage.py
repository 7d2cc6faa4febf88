"""Collection never deletes what is reached or young; what it would delete, it says first."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd_core.artifacts import Artifact, publish
from kd_core.cache.garbage import collect, plan_collection
from kd_core.errors import IntegrityError
from kd_core.ledger import Entry, append
from kd_core.rows.table import RowCache
from kd_core.store import LocalStore
from kd_core.summaries import Summary, plain
from tests.standins import SCORING, SHARDS, SUMMARIES

A, B, USED, FP = "a" * 32, "b" * 32, "c" * 32, "f" * 32
DAY = 86_400.0
NOW = time.time()


def age(store: LocalStore, key: str, days: float) -> None:
    os.utime(store.local_path(key), (NOW - days * DAY, NOW - days * DAY))


def age_all(store: LocalStore, days: float) -> None:
    for info in list(store.list("")):
        age(store, info.key, days)


def plan(store: LocalStore, *, grace_days: float = 7.0, unused: bool = False) -> dict[str, str]:
    found = plan_collection(store, grace_seconds=grace_days * DAY, now_seconds=NOW, unused_namespaces=unused)
    return {item.key: item.reason for item in found}


def make_artifact(store: LocalStore, directory: Path, *, stage: str, fp: str = FP, summary: Summary | None = None) -> str:
    folder = directory / f"{stage}{fp}"
    folder.mkdir()
    (folder / "file.bin").write_bytes(stage.encode())
    return publish(store, folder, stage=stage, fp=fp, identity={}, upstream={}, summary=plain(summary or SUMMARIES[stage])).prefix


@pytest.fixture
def full(store, add_shard, tmp_path) -> LocalStore:
    """A store with everything that is reached, all of it a year old."""
    add_shard(store, range(4), namespace=USED)
    make_artifact(store, tmp_path, stage="soft_labels", summary=replace(SCORING, shards=replace(SHARDS, namespace=USED, commits=())))
    prefix = make_artifact(store, tmp_path, stage="train")
    artifact = Artifact("train", FP, prefix.rpartition("/")[2])
    append(store, "model", Entry("model", "promote", artifact, ("good",), None, 1))
    store.create("checkpoints/" + "9" * 32 + "/00000010/record.json", b"{}")  # of a training that has no record: it may go on
    store.create("checkpoints/" + "9" * 32 + "/00000010/" + "1" * 64 + ".pt", b"state")
    store.create("notes/of-somebody/else.txt", b"not ours")
    age_all(store, 365)
    return store


def test_nothing_that_is_reached_is_garbage_at_any_age(full) -> None:
    assert len(list(full.list(""))) > 8
    assert plan(full, grace_days=0.0, unused=True) == {}


STRAYS = {
    f"rows/soft_labels/{USED}/shards/{'0' * 64}.parquet": "shard without a commit",
    f"artifacts/train/{'e' * 32}/{'d' * 32}/model/weights": "payload without a record",
    f"artifacts/train/{FP}/{'d' * 32}/file.bin": "payload without a record",
    f"checkpoints/{FP}/00000010/record.json": "checkpoint of finished work",
    f"checkpoints/{FP}/00000010/{'1' * 64}.pt": "checkpoint of finished work",
    f"checkpoints/{'9' * 32}/00000020/{'2' * 64}.pt": "checkpoint without a record",
    f"quarantine/rows/soft_labels/{USED}/shards/{'3' * 64}.parquet": "quarantined",
}


@pytest.mark.parametrize("key", STRAYS)
def test_a_stray_is_garbage_once_it_is_old_and_not_before(full, key) -> None:
    full.create(key, b"stray")
    age(full, key, 6.9)
    assert plan(full) == {}
    age(full, key, 7.1)
    assert plan(full) == {key: STRAYS[key]}
    assert plan(full, grace_days=8.0) == {}


def test_a_plan_changes_nothing_and_is_what_is_done(full) -> None:
    reached = {info.key for info in full.list("")}
    for key in STRAYS:
        full.create(key, b"stray")
        age(full, key, 30)
    listed = plan_collection(full, grace_seconds=7 * DAY, now_seconds=NOW, unused_namespaces=False)
    assert {item.key for item in listed} == set(STRAYS)
    assert all((item.size_bytes, round(item.age_seconds / DAY)) == (5, 30) for item in listed)
    assert plan_collection(full, grace_seconds=7 * DAY, now_seconds=NOW, unused_namespaces=False) == listed
    assert {info.key for info in full.list("")} == reached | set(STRAYS)
    collect(full, listed)
    assert {info.key for info in full.list("")} == reached
    assert plan(full) == {}


def test_a_shard_between_its_writing_and_its_commit_survives(full, add_shard) -> None:
    """The writer was killed, or is slow: the young shard stays, and its commit finds it."""
    commit = add_shard(full, range(4, 8), namespace=USED)
    cache = RowCache(full, "soft_labels", USED)
    content = full.get(cache.commit_key(commit))
    full.delete(cache.commit_key(commit))
    collect(full, plan_collection(full, grace_seconds=60.0, now_seconds=NOW, unused_namespaces=True))
    full.create(cache.commit_key(commit), content)
    assert cache.read(cache.snapshot(), commit.keys).num_rows == 4


def test_a_row_table_that_no_record_names_goes_only_when_asked_and_all_old(full, add_shard) -> None:
    add_shard(full, range(3), namespace=A)
    add_shard(full, range(3), namespace=B)
    mine = [info.key for info in full.list(f"rows/soft_labels/{A}/")]
    for info in list(full.list("rows/")):
        age(full, info.key, 30)
    age(full, next(info.key for info in full.list(f"rows/soft_labels/{B}/commits/")), 1)
    assert plan(full) == {}
    listed = plan(full, unused=True)
    assert sorted(listed) == mine
    assert "/commits/" in next(iter(listed)), "commits go first: a shard without a commit is harmless, the other way round is damage"
    assert set(listed.values()) == {"no record names its namespace"}


def test_an_unreadable_record_or_commit_stops_the_collection(full) -> None:
    """What it reaches is not known, so nothing can be called unreached."""
    for prefix in (f"rows/soft_labels/{USED}/commits/", f"artifacts/train/{FP}/record", "ledger/model/"):
        key = next(info.key for info in full.list(prefix))
        data = full.get(key)
        full.local_path(key).write_bytes(b"{")
        with pytest.raises(IntegrityError, match=key):
            plan(full)
        full.local_path(key).write_bytes(data)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strays=st.dictionaries(st.sampled_from(sorted(STRAYS)), st.floats(0.0, 20.0)),
    reached_days=st.floats(0.0, 400.0),
    grace=st.floats(0.0, 20.0),
    unused=st.booleans(),
)
def test_exactly_the_old_strays_go(full, strays, reached_days, grace, unused) -> None:
    reached = {info.key for info in full.list("")} - set(STRAYS)
    age_all(full, reached_days)
    for key in STRAYS:
        full.delete(key)
    for key, days in strays.items():
        full.create(key, b"stray")
        age(full, key, days)
    old = {info.key for info in full.list("") if info.key in strays and NOW - info.modified_seconds >= grace * DAY}
    collect(full, plan_collection(full, grace_seconds=grace * DAY, now_seconds=NOW, unused_namespaces=unused))
    assert {info.key for info in full.list("")} == reached | (set(strays) - old)
