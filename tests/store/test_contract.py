"""One contract for both stores; the S3 half runs against a real server."""

import hashlib
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kd_core.errors import StoreError
from kd_core.recipe import S3Options
from kd_core.store import LocalStore, S3Store, Store, open_store

LARGE = os.urandom(20 << 20)  # above the lowered multipart threshold, and more than one part of 16 MiB


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.stack)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield LocalStore(tmp_path / "store")
        return
    info = request.getfixturevalue("s3_environment")
    s3 = S3Store(info.bucket, f"contract/{uuid.uuid4().hex}", options=S3Options(endpoint=info.urls["s3"]), multipart_bytes=4 << 20)
    yield s3
    s3.close()


def _keys(store: Store, prefix: str) -> list[str]:
    return [info.key for info in store.list(prefix)]


def test_create_is_true_for_the_same_bytes_and_false_for_others(store: Store) -> None:
    assert store.create("a/b.json", b"one")
    assert store.create("a/b.json", b"one")
    assert not store.create("a/b.json", b"two")
    assert not store.create("a/b.json", b"longer")
    assert store.get("a/b.json") == b"one"


def test_create_takes_a_file_and_an_empty_object(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"from a file")
    assert store.create("file", path)
    assert store.create("file", b"from a file")
    assert store.create("empty", b"")
    assert store.create("empty", b"")
    assert not store.create("empty", b"x")
    assert (store.get("file"), store.get("empty")) == (b"from a file", b"")


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_of_eight_racing_writers_exactly_one_wins(store: Store, size: int) -> None:
    bodies = [bytes([i]) * size for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda body: store.create("race", body), bodies))
    assert won.count(True) == 1
    assert store.get("race") == bodies[won.index(True)]
    assert _keys(store, "") == ["race"]


@pytest.mark.parametrize("size", [10, 5 << 20])
def test_eight_writers_of_the_same_bytes_all_succeed(store: Store, size: int) -> None:
    body = LARGE[:size]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: store.create("race", body), range(8)))
    assert store.get("race") == body


def test_a_large_object_survives_the_round_trip(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(LARGE)
    assert store.create("large", source)
    assert store.create("large", LARGE)
    assert not store.create("large", LARGE[:-1] + bytes([LARGE[-1] ^ 1]))
    store.download("large", target)
    for found in (target.read_bytes(), store.get("large")):
        assert hashlib.sha256(found).digest() == hashlib.sha256(LARGE).digest()
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert store.get_range("large", (16 << 20) - 3, 7) == LARGE[(16 << 20) - 3 : (16 << 20) + 4]


def test_ranges_are_short_only_at_the_end(store: Store) -> None:
    store.create("digits", b"0123456789")
    assert store.get_range("digits", 0, 4) == b"0123"
    assert store.get_range("digits", 8, 10) == b"89"
    assert store.get_range("digits", 10, 5) == b""
    assert store.get_range("digits", 99, 5) == b""
    assert store.get_range("digits", 3, 0) == b""
    store.create("empty", b"")
    assert store.get_range("empty", 0, 5) == b""


def test_download_of_an_empty_object_makes_an_empty_file(store: Store, tmp_path: Path) -> None:
    store.create("empty", b"")
    store.download("empty", tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_list_is_sorted_by_key_and_honours_the_prefix(store: Store) -> None:
    keys = ["a/1", "a/2/x", "a/2/y", "a-b", "a.c", "ab", "b/1", "a/10"]
    for key in keys:
        assert store.create(key, key.encode())
    assert _keys(store, "") == sorted(keys)
    assert _keys(store, "a/") == ["a/1", "a/10", "a/2/x", "a/2/y"]
    assert _keys(store, "a") == ["a-b", "a.c", "a/1", "a/10", "a/2/x", "a/2/y", "ab"]
    assert _keys(store, "a/1") == ["a/1", "a/10"]
    assert _keys(store, "c/") == []


def test_list_is_whole_over_many_pages(store: Store) -> None:
    keys = [f"many{'-./'[i % 3]}{i:04d}" for i in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: store.create(key, b"x"), keys))
    assert _keys(store, "many") == sorted(keys)


def test_info_tells_size_and_time(store: Store) -> None:
    assert store.info("a") is None
    store.create("a", b"12345")
    info = store.info("a")
    assert info is not None
    assert (info.key, info.size_bytes) == ("a", 5)
    assert list(store.list("")) == [info] or abs(next(store.list("")).modified_seconds - info.modified_seconds) < 2
    assert store.info("a/b") is None


def test_delete_removes_one_object_and_is_idempotent(store: Store) -> None:
    store.create("d/1", b"1")
    store.create("d/2", b"2")
    store.delete("d/1")
    store.delete("d/1")
    store.delete("never/there")
    assert _keys(store, "") == ["d/2"]
    assert store.create("d/1", b"other")


def test_a_missing_object_is_named(store: Store, tmp_path: Path) -> None:
    for read in (
        lambda: store.get("no/such"),
        lambda: store.get_range("no/such", 0, 1),
        lambda: store.download("no/such", tmp_path / "out"),
    ):
        with pytest.raises(StoreError, match=r"/no/such: .*no such object") as caught:
            read()
        assert str(caught.value).startswith(store.uri)
    assert list(tmp_path.glob("*out*")) == []
    assert list(tmp_path.glob("*~")) == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\\b", "a\0b", "a b", "é", "a~", "a\n", "x" * 201])
def test_a_key_that_could_leave_the_store_is_refused(store: Store, key: str, tmp_path: Path) -> None:
    for use in (
        lambda: store.create(key, b""),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.download(key, tmp_path / "out"),
        lambda: store.info(key),
        lambda: store.delete(key),
        lambda: store.local_path(key),
    ):
        with pytest.raises(StoreError, match="is refused"):
            use()


@pytest.mark.parametrize("prefix", ["../", "/", "a//", "a/../"])
def test_a_prefix_that_could_leave_the_store_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(StoreError, match="is refused"):
        store.list(prefix)


def test_local_path_is_the_object_itself_or_none(store: Store) -> None:
    store.create("a/b", b"bytes")
    path = store.local_path("a/b")
    if isinstance(store, LocalStore):
        assert path is not None
        assert path.read_bytes() == b"bytes"
    else:
        assert path is None


@pytest.mark.stack
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_open_store_finds_what_another_store_wrote(s3_environment: object, checksums: str, tmp_path: Path) -> None:
    name = uuid.uuid4().hex
    options = S3Options.model_validate({"checksums": checksums})  # the address comes from AWS_ENDPOINT_URL_S3
    s3 = open_store(f"s3://distillery/{name}/deep/", options)
    whole = open_store("s3://distillery", options)
    assert isinstance(s3, S3Store)
    assert isinstance(whole, S3Store)
    assert s3.create("rows.jsonl", b"{}")
    assert s3.uri == f"s3://distillery/{name}/deep"
    assert whole.get(f"{name}/deep/rows.jsonl") == b"{}"
    assert _keys(whole, f"{name}/") == [f"{name}/deep/rows.jsonl"]
    s3.close()
    whole.close()


def test_open_store_opens_a_directory_and_refuses_other_schemes(tmp_path: Path) -> None:
    local = open_store(str(tmp_path / "x"), S3Options())
    assert isinstance(local, LocalStore)
    assert local.uri == str(tmp_path / "x")
    assert list(local.list("")) == []
    assert not (tmp_path / "x").exists()
    for uri in ("gs://bucket/x", "s3://", "file:///x"):
        with pytest.raises(StoreError, match=r"use s3://bucket/prefix or a local directory"):
            open_store(uri, S3Options())
