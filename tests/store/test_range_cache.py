"""Copies of a remote store's ranges on this disk: bounded, shared, verified; a store on this machine is read in place."""

from pathlib import Path

import pytest

from kd_core.fingerprint import sha256_bytes
from kd_core.store import LocalStore
from kd_core.store.range_cache import RangeCache

DATA = {f"shard-{i}": bytes([i]) * 1000 for i in range(8)}


class Remote(LocalStore):
    """A directory that says it is far away, and counts what is asked of it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def get_range(self, key: str, start: int, length: int) -> bytes:
        self.asked.append(key)
        return super().get_range(key, start, length)

    def local_path(self, key: str) -> None:
        return None


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    store = Remote(tmp_path / "remote")
    for key, data in DATA.items():
        store.create(key, data)
    return store


def read(copies: RangeCache, key: str) -> bytes:
    return copies.read(key, 100, 800, sha256_bytes(DATA[key][100:900]))


def test_a_range_is_fetched_once_for_all_processes(remote: Remote, tmp_path: Path) -> None:
    for _ in range(3):
        copies = RangeCache(remote, tmp_path / "copies", 10_000)
        assert read(copies, "shard-3") == DATA["shard-3"][100:900]
    assert remote.asked == ["shard-3"]


def test_the_directory_stays_below_its_limit_and_keeps_the_newest(remote: Remote, tmp_path: Path) -> None:
    copies = RangeCache(remote, tmp_path / "copies", 3000)
    for key in DATA:
        read(copies, key)
        assert sum(file.stat().st_size for file in (tmp_path / "copies").rglob("*") if file.is_file()) <= 3000
    remote.asked.clear()
    read(copies, "shard-7")
    assert remote.asked == []
    read(copies, "shard-0")
    assert remote.asked == ["shard-0"]


def test_a_broken_copy_is_fetched_again(remote: Remote, tmp_path: Path) -> None:
    copies = RangeCache(remote, tmp_path / "copies", 10_000)
    read(copies, "shard-1")
    (file,) = (file for file in (tmp_path / "copies").rglob("*") if file.is_file())
    file.write_bytes(b"x" * 800)
    assert read(copies, "shard-1") == DATA["shard-1"][100:900]
    assert file.read_bytes() == DATA["shard-1"][100:900]


def test_wrong_bytes_are_handed_on_and_never_kept(remote: Remote, tmp_path: Path) -> None:
    """The reader names the object; a copy of the damage would outlive its repair."""
    copies = RangeCache(remote, tmp_path / "copies", 10_000)
    assert copies.read("shard-1", 0, 10, "0" * 64) == DATA["shard-1"][:10]
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize(("local", "limit"), [(True, 10_000), (False, 0)])
def test_nothing_is_copied_of_a_local_store_or_without_a_limit(remote: Remote, tmp_path: Path, local: bool, limit: int) -> None:
    copies = RangeCache(LocalStore(tmp_path / "remote") if local else remote, tmp_path / "copies", limit)
    assert read(copies, "shard-2") == DATA["shard-2"][100:900]
    assert not (tmp_path / "copies").exists()
