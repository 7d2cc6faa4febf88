"""Real processes on one growing table: they share the work, they are killed with SIGKILL, and nothing committed is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from kd_core.recipe import S3Options
from kd_core.rows.table import RowCache
from kd_core.store import Store, open_store

SHARD_ROWS = 4

FORKS = """
import json, os, signal, sys, time
import pyarrow as pa
from kd_core.recipe import S3Options
from kd_core.rows.parquet import write_shard
from kd_core.rows.work import Packed, work_in_shards
from kd_core.rows.table import RowCache
from kd_core.store import open_store

write_shard(pa.table({"key": ["a"]}), {})  # whatever Arrow imports at its first write is paid once, here

def work(uri, s3, log, num_rows, worker, num_workers, seconds, shard_rows):
    cache = RowCache(open_store(uri, S3Options(**s3)), "soft_labels", "5" * 32)

    def compute(shard):
        with open(log, "a") as file:
            file.write(json.dumps([key for key, _ in shard]) + "\\n")
        time.sleep(seconds)
        return shard

    def pack(shard):
        keys, values = zip(*shard)
        return Packed(pa.table({"key": keys, "value": [10 * value for value in values]}), len(shard))

    rows = [(f"{i:032x}", i) for i in range(num_rows)]
    share = {"worker": worker, "num_workers": num_workers}
    work_in_shards(cache, lambda: rows, compute, pack, shard_rows=shard_rows, done=lambda _: None, **share)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.stdin.close()
        work(*json.loads(line))
        os._exit(0)
    print(pid, flush=True)
while True:
    try:
        print(os.wait()[1], flush=True)
    except ChildProcessError:
        break
"""
"""Imports once, then forks a worker for every line it is sent: thirty rounds of fresh interpreters would take minutes."""


def cache_of(store: Store) -> RowCache:
    return RowCache(store, "soft_labels", "5" * 32)


def begun(folder: Path) -> list[str]:
    """The first key of every shard that any process began to compute."""
    return [json.loads(line)[0] for log in folder.glob("*.log") for line in log.read_text().splitlines()]


class Forks:
    """Worker processes on demand."""

    def __init__(self, server: "subprocess.Popen[str]", folder: Path) -> None:
        self.server, self.folder = server, folder

    def start(self, uri: str, s3: dict[str, str], *, num_rows: int, num_workers: int, seconds: float) -> list[int]:
        pids = []
        for worker in range(num_workers):
            log = self.folder / f"{worker}-{time.monotonic_ns()}.log"
            assert self.server.stdin is not None
            assert self.server.stdout is not None
            self.server.stdin.write(json.dumps([uri, s3, str(log), num_rows, worker, num_workers, seconds, SHARD_ROWS]) + "\n")
            self.server.stdin.flush()
            pids.append(int(self.server.stdout.readline()))
        return pids

    def finish(self) -> list[int]:
        """Wait for all of them; their exit codes as the system gives them (9: killed)."""
        output, _ = self.server.communicate(timeout=120)
        return [int(line) for line in output.split()]


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        try:
            yield Forks(server, folder)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # its workers too, if a test failed


@pytest.mark.parametrize("num_workers", [2, 8])
def test_processes_share_a_table(tmp_path: Path, num_workers: int) -> None:
    assert_shared(str(tmp_path / "store"), {}, tmp_path, num_workers)


@pytest.mark.stack
def test_processes_share_a_table_on_s3(tmp_path: Path, seaweed, s3_environment) -> None:
    assert_shared("s3://distillery/shared-" + os.urandom(4).hex(), {"endpoint": seaweed.urls["s3"]}, tmp_path, 4)


def assert_shared(uri: str, s3: dict[str, str], folder: Path, num_workers: int) -> None:
    num_rows = 480
    with forks(folder) as running:
        running.start(uri, s3, num_rows=num_rows, num_workers=num_workers, seconds=0.02)
        assert running.finish() == [0] * num_workers
    cache = cache_of(open_store(uri, S3Options(**s3)))
    snapshot = cache.snapshot()
    keys = [f"{i:032x}" for i in range(num_rows)]
    assert snapshot.keys() == set(keys)
    assert cache.read(snapshot, keys)["value"].to_pylist() == [10 * i for i in range(num_rows)]
    assert len(begun(folder)) <= 1.5 * num_rows / SHARD_ROWS, "workers did each other's work"


@pytest.mark.drill
def test_thirty_kills_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    """Two workers are killed at a random moment, thirty times; each kill costs at most the shards that were not committed yet."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    moment = random.Random(seed)
    store = open_store(str(tmp_path / "store"), S3Options())
    cache, num_rows, before = cache_of(store), 20_000, set()
    with forks(tmp_path) as running:
        for _ in range(30):
            pids = running.start(store.uri, {}, num_rows=num_rows, num_workers=2, seconds=0.01)
            num_begun = len(begun(tmp_path))
            while len(begun(tmp_path)) == num_begun:
                time.sleep(0.01)
            time.sleep(moment.uniform(0.0, 0.6))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            after = cache.snapshot().keys()
            assert before <= after
            before = after
        assert running.finish() == [9] * 60
    snapshot = cache.snapshot()
    assert cache.read(snapshot, sorted(before))["value"].to_pylist() == [10 * int(key, 16) for key in sorted(before)]
    counts = Counter(begun(tmp_path))
    redone = sum(count - 1 for count in counts.values())
    committed = sum(len(commit.keys) for commit in snapshot.commits)
    assert committed == len(before), "no row stands twice"
    assert redone <= 30 * 2 * 2, "a worker redoes the shard it was computing and the one its writer held, no more"
