"""Copies of a remote store's ranges on this disk: bounded, shared, verified; a store on this machine is read in place."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kd_core.errors import StoreError
from kd_core.fingerprint import sha256_bytes
from kd_core.rows.parquet import ByteRange
from kd_core.rows.range_cache import RangeCache, request_windows
from kd_core.store import LocalStore

DATA = {f"shard-{i}": bytes(range(i, i + 200)) * 5 for i in range(8)}


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


def read(copies: RangeCache, key: str) -> bytes | None:
    return copies.read(key, ByteRange(100, 800, sha256_bytes(DATA[key][100:900]), 1))


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


def test_what_is_not_a_copy_is_never_removed(remote: Remote, tmp_path: Path) -> None:
    """The directory is a setting: it may be somebody's own."""
    mine = [tmp_path / "copies" / name for name in ("thesis.txt", "ab/thesis.txt")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 2000)
    copies = RangeCache(remote, tmp_path / "copies", 1000)
    for key in DATA:
        read(copies, key)
    assert all(path.exists() for path in mine)
    assert sum(file.stat().st_size for file in (tmp_path / "copies").iterdir() if len(file.name) >= 64) <= 1000


def test_a_directory_that_was_removed_is_made_again(remote: Remote, tmp_path: Path) -> None:
    copies = RangeCache(remote, tmp_path / "copies", 10_000)
    read(copies, "shard-1")
    shutil.rmtree(tmp_path / "copies")
    assert read(copies, "shard-2") == DATA["shard-2"][100:900]


def test_a_broken_copy_is_fetched_again(remote: Remote, tmp_path: Path) -> None:
    copies = RangeCache(remote, tmp_path / "copies", 10_000)
    read(copies, "shard-1")
    (file,) = (file for file in (tmp_path / "copies").rglob("*") if file.is_file())
    file.write_bytes(b"x" * 800)
    assert read(copies, "shard-1") == DATA["shard-1"][100:900]
    assert file.read_bytes() == DATA["shard-1"][100:900]


def test_a_place_that_cannot_be_written_is_said(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "copies").write_bytes(b"a file")
    with pytest.raises(StoreError, match=r"copies: what was fetched cannot be kept there: .*; make room or correct run.disk_cache"):
        read(RangeCache(remote, tmp_path / "copies", 10_000), "shard-1")


@pytest.mark.parametrize("limit", [10_000, 0])
def test_wrong_bytes_are_told_and_never_kept(remote: Remote, tmp_path: Path, limit: int) -> None:
    """The reader names the object; a copy of the damage would outlive its repair."""
    copies = RangeCache(remote, tmp_path / "copies", limit)
    assert copies.read("shard-1", ByteRange(0, 10, "0" * 64, 1)) is None
    assert not (tmp_path / "copies").exists()


@pytest.mark.parametrize(("local", "limit"), [(True, 10_000), (False, 0)])
def test_nothing_is_copied_of_a_local_store_or_without_a_limit(remote: Remote, tmp_path: Path, local: bool, limit: int) -> None:
    copies = RangeCache(LocalStore(tmp_path / "remote") if local else remote, tmp_path / "copies", limit)
    assert read(copies, "shard-2") == DATA["shard-2"][100:900]
    assert not (tmp_path / "copies").exists()


WINDOW = tuple(ByteRange(start, 250, sha256_bytes(DATA["shard-5"][start : start + 250]), 1) for start in range(0, 1000, 250))


def test_one_request_brings_a_window_for_all_threads(remote: Remote, tmp_path: Path) -> None:
    copies = RangeCache(remote, tmp_path / "copies", 10_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda part: copies.read("shard-5", part, WINDOW), [*WINDOW, *WINDOW]))
    assert found == 2 * [DATA["shard-5"][part.start : part.start + part.length] for part in WINDOW]
    assert remote.asked == ["shard-5"]
    assert [path.read_bytes() for path in (tmp_path / "copies").iterdir()] == [DATA["shard-5"]], "one file for one request"
    again = RangeCache(remote, tmp_path / "copies", 10_000)
    assert [again.read("shard-5", part, WINDOW) for part in WINDOW] == found[:4]
    assert remote.asked == ["shard-5"]


def test_a_damaged_range_of_a_window_harms_no_other(remote: Remote, tmp_path: Path) -> None:
    broken = (WINDOW[0], replace(WINDOW[1], sha256="0" * 64), *WINDOW[2:])
    copies = RangeCache(remote, tmp_path / "copies", 10_000)
    for _ in range(2):
        found = [copies.read("shard-5", part, broken) for part in broken]
        assert [data is None for data in found] == [False, True, False, False]
    assert remote.asked == ["shard-5"] * 3, "once for all, and every time for the range that is never right"
    assert not (tmp_path / "copies").exists(), "its shard is about to be moved aside"


def test_windows_are_neighbours_that_are_wanted_up_to_a_size() -> None:
    size = 1 << 20
    parts = [ByteRange(i * size, size, str(i), 64) for i in range(12)]
    wanted = [i not in (3, 4) for i in range(12)]
    assert [[part.sha256 for part in window] for window in request_windows(parts, wanted)] == [
        ["0", "1", "2"],
        ["5", "6", "7", "8"],
        ["9", "10", "11"],
    ]
    huge = [ByteRange(0, 9 * size, "a", 64), ByteRange(9 * size, 9 * size, "b", 64)]
    assert [len(window) for window in request_windows(huge, [True, True])] == [1, 1]
    assert list(request_windows(parts, [False] * 12)) == []
